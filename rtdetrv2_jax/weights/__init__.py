"""Checkpoints: where they lie, how they are read, and what their tensors are called."""
