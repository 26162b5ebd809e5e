"""The parts of benchmarks/train_speed.py: shapes and rows, the sides and how they take turns, the matrix rate, the tables."""
