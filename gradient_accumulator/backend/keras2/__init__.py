"""Keras 2: what it lacks of Keras 3's names, its trainer and its optimizers."""
