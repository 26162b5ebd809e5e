"""Training: the step, the loop around it, checkpoints, and a whole run in one folder."""
