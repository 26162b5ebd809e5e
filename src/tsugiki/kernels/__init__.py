"""Faster equals of slow things. Each has a plain twin in the model or the trainer, and a test that they agree."""
