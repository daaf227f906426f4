"""Acceleration methods as pure decisions: each reads typed tensors and says what stays."""
