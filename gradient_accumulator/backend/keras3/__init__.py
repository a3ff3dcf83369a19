"""Keras 3: its trainer and its optimizers."""
