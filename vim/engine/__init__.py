"""Data, training, evaluation and inference around the models."""
