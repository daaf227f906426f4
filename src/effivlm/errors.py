"""The base of every error this package raises on purpose, and how foreign text is quoted in one."""

MOST = 160  # characters of something foreign that a message quotes


class EffivlmError(Exception):
    """Something asked for that cannot be done or found; the message says what was expected, what
    came, and what to do.
    """


def shown(value: object, most: int = MOST) -> str:
    """A value as a message quotes it: one line, printable, of bounded length."""
    if isinstance(value, str) and len(value) > 4 * most:
        value = value[: 4 * most]  # not worth a representation of megabytes
    text = printable(repr(value))
    return text if len(text) <= most else f"{text[: most - 20]}... (shortened)"


def printable(text: str) -> str:
    """Text without what a terminal would obey or could not encode; lines and tabs stay."""
    return "".join(
        c if c in "\n\t" or c.isprintable() else c.encode("unicode_escape").decode() for c in text
    )
