"""Scores and answers of a model, the base alone or with adapters."""
