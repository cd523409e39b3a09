"""Check what the methods of a space return, before the search stores it."""

from typing import Any


def text(method: str, value: Any) -> str:
    """Return the value of `encode` or `canonical`, if it is a text that can be stored.

    Raises:
        TypeError: It is not a text.
        ValueError: UTF-8 cannot write it.

    >>> text("encode", 3)
    Traceback (most recent call last):
    TypeError: encode returned 3 (int): expected a text
    """
    if not isinstance(value, str):
        raise TypeError(f"{method} returned {shown(value)}: expected a text")
    if not value.isascii():
        value.encode()  # raises UnicodeEncodeError, a ValueError, for half of a surrogate pair
    return value


def child(value: Any) -> tuple[Any, str]:
    """Return the value of `mutate`, if it is an architecture with a description.

    Raises:
        TypeError: It is not.

    >>> child([(0, 1), "flip: bit 1"])
    ((0, 1), 'flip: bit 1')
    """
    if not (isinstance(value, tuple | list) and len(value) == 2 and isinstance(value[1], str)):
        raise TypeError(
            f"mutate returned {shown(value)}: expected the child and words, such as "
            "(child, 'flip: bit 2')"
        )
    architecture, words = value
    return architecture, text("mutate", words)


def shown(value: Any) -> str:
    """Return a value and its type on one short line."""
    line = " ".join(repr(value).split())
    return f"{line if len(line) <= 80 else f'{line[:77]}...'} ({type(value).__name__})"
