"""Checks of arguments that several modules share."""

from __future__ import annotations

import operator


def integer(name: str, value: object, *, least: int | None = None) -> int:
    """Return ``value`` as an int, refusing booleans, floats and text.

    Args:
        name: What the user calls the value; the error begins with it.
        value: Any object; numpy integers and other types with ``__index__`` pass.
        least: Smallest value accepted, if there is one.

    Raises:
        ValueError: If the value is no integer, or is too small.
    """
    wanted = "an integer" if least is None else f"an integer >= {least}"
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(f"{name} must be {wanted}; got {value!r} ({type(value).__name__})") from None
    if least is not None and number < least:
        raise ValueError(f"{name} must be {wanted}; got {number}")
    return number
