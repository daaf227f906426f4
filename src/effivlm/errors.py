"""The base of every error this package raises on purpose."""


class EffivlmError(Exception):
    """Something asked for that cannot be done or found; the message says what was expected, what
    came, and what to do.
    """
