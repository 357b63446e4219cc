"""Checks of the clients' arguments, so that errors are raised by the call that passes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import isfinite
from numbers import Integral, Real


def check_seconds(name: str, value: object) -> None:
    """Check a time limit in seconds; None: no limit.

    Raises:
        TypeError, ValueError: ``value`` is not a positive, finite number.
    """
    if value is None:
        return
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number of seconds such as 30.0, not {value!r}")
    if not (isfinite(value) and float(value) > 0):
        raise ValueError(f"{name} must be more than 0 seconds, not {value!r}; None is no limit")


def check_model(value: object) -> None:
    """Check the name of a model.

    Raises:
        TypeError: ``value`` is not a non-empty string.
    """
    if not isinstance(value, str) or not value:
        raise TypeError(f"model must be a name, not {value!r}")


def check_flag(name: str, value: object) -> None:
    """Check a boolean; a string such as "false" would count as true.

    Raises:
        TypeError: ``value`` is not a boolean.
    """
    if value is not True and value is not False:
        raise TypeError(f"{name} must be True or False, not {value!r}")


def check_count(name: str, value: object, hint: str) -> None:
    """Check an integer of at least 1, or None. ``hint``: what to pass instead of a smaller one.

    Raises:
        TypeError, ValueError: ``value`` is neither.
    """
    if value is None:
        return
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, not {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, not {value!r}; {hint}")


def check_amount(name: str, value: object) -> None:
    """Check a number of at least 0, or None.

    Raises:
        TypeError, ValueError: ``value`` is neither.
    """
    if value is None:
        return
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, not {value!r}")
    if not (isfinite(value) and float(value) >= 0):
        raise ValueError(f"{name} must be at least 0, not {value!r}")


def check_text(name: str, value: object) -> None:
    """Check a string, or None.

    Raises:
        TypeError: ``value`` is neither. The message omits the value, which may be a secret.
    """
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{name} must be a string, not {type(value).__name__}")


def texts_in(name: str, value: object) -> list[str]:
    """Check a list of strings; a single string would be taken for its characters.

    Raises:
        TypeError: ``value`` is not a list of strings.
    """
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise TypeError(f"{name} must be a list of strings, not {value!r}")
    texts = list(value)
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"{name}[{index}] must be a string, not {text!r}")
    return texts


def names_in(name: str, value: object) -> tuple[str, ...] | None:
    """Check one name or several; None if none are given.

    Raises:
        TypeError: a name is not a string.
    """
    if value is None:
        return None
    names = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Iterable) else (value,)
    if wrong := [n for n in names if not isinstance(n, str)]:
        raise TypeError(f"{name} must be names of models, not {wrong[0]!r}")
    return names
