"""Acceleration methods as pure decisions: each reads typed tensors and says what to keep or merge."""
