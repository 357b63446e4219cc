"""The arguments of clients, checked when they are given: what is wrong is told there and not by a request."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import isfinite
from numbers import Integral, Real


def check_seconds(name: str, value: object) -> None:
    """A time limit; None: no limit.

    Raises:
        TypeError, ValueError: it is none.
    """
    if value is None:
        return
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number of seconds such as 30.0, not {value!r}")
    if not (isfinite(value) and float(value) > 0):
        raise ValueError(f"{name} must be more than 0 seconds, not {value!r}; None is no limit")


def check_model(value: object) -> None:
    """The name of a model.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(value, str) or not value:
        raise TypeError(f"model must be a name, not {value!r}")


def check_flag(name: str, value: object) -> None:
    """True or False. A text such as "false" would count as true.

    Raises:
        TypeError: it is neither.
    """
    if value is not True and value is not False:
        raise TypeError(f"{name} must be True or False, not {value!r}")


def check_count(name: str, value: object, hint: str) -> None:
    """A whole number of at least 1, or None. ``hint``: what to give for less.

    Raises:
        TypeError, ValueError: it is none.
    """
    if value is None:
        return
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be a whole number, not {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, not {value!r}; {hint}")


def check_amount(name: str, value: object) -> None:
    """A number of at least 0, or None.

    Raises:
        TypeError, ValueError: it is none.
    """
    if value is None:
        return
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, not {value!r}")
    if not (isfinite(value) and float(value) >= 0):
        raise ValueError(f"{name} must be at least 0, not {value!r}")


def check_text(name: str, value: object) -> None:
    """A text, or None.

    Raises:
        TypeError: it is none. The value is not told: it may be a secret.
    """
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{name} must be a text, not {type(value).__name__}")


def texts_in(name: str, value: object) -> list[str]:
    """Several texts. A single one would be taken for its letters.

    Raises:
        TypeError: they are none.
    """
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise TypeError(f"{name} must be a list of texts, not {value!r}")
    texts = list(value)
    for place, one in enumerate(texts):
        if not isinstance(one, str):
            raise TypeError(f"{name}[{place}] must be a text, not {one!r}")
    return texts


def names_in(name: str, value: object) -> tuple[str, ...] | None:
    """One name or several; None: none are given.

    Raises:
        TypeError: they are no texts.
    """
    if value is None:
        return None
    names = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Iterable) else (value,)
    if wrong := [one for one in names if not isinstance(one, str)]:
        raise TypeError(f"{name} must be names of models, not {wrong[0]!r}")
    return names
