"""Computes the lengths of the strings that a pattern matches, and restricts them. Pure.

Patterns must be in the form that `convertible_pattern` returns.
"""

from __future__ import annotations

import math
import re

_ATOM = r"(?:\[(?:[^\]\\]|\\.)*+\]|\\.|[^\\()\[\]|*+?{}^$])"
_TIMES = r"(?:[*+?]|\{\d+(?:,\d*)?\})?"
TOKEN = re.compile(
    rf"(?:(?P<atom>{_ATOM})|(?P<open>\()|(?P<bar>\|)|(?P<close>\)))(?P<times>{_TIMES})", re.DOTALL
)
_SIMPLE = re.compile(rf"\^(?:{_ATOM}{_TIMES})*+\$", re.DOTALL)
_PART = re.compile(rf"({_ATOM})({_TIMES})", re.DOTALL)
MOST_REPEATS = 2000
"""Maximum bound of a repetition: llama.cpp treats a larger one as no bound."""

Lengths = tuple[float, float]


def lengths(pattern: str) -> Lengths:
    """Return the minimum and maximum length of strings that match ``pattern``; 0 and infinity if unknown."""
    stack: list[_Group] = [_Group()]
    position, text = 0, pattern[1:-1]
    while position < len(text):
        token = TOKEN.match(text, position)
        if token is None:
            return 0, math.inf
        position = token.end()
        if token["open"]:
            stack.append(_Group())
        elif token["bar"]:
            stack[-1].end_alternative()
        elif token["close"]:
            if len(stack) == 1:
                return 0, math.inf
            found = stack.pop().lengths()
            stack[-1].add(found, times_of(token["times"]))
        else:
            stack[-1].add((1, 1), times_of(token["times"]))
    return stack[0].lengths() if len(stack) == 1 else (0, math.inf)


def with_length(pattern: str, low_bound: float, high_bound: float) -> str | None:
    """Restrict a pattern to strings of ``least`` to ``most`` characters; None if that can't be expressed."""
    shortest, longest = lengths(pattern)
    if low_bound <= shortest and longest <= high_bound:
        return pattern
    if shortest > high_bound or longest < low_bound or not _SIMPLE.fullmatch(pattern):
        return None
    parts = [(atom, *times_of(times)) for atom, times in _PART.findall(pattern[1:-1])]
    variable = [index for index, (_, low, high) in enumerate(parts) if low != high]
    if len(variable) != 1:
        return None
    atom, low, high = parts[variable[0]]
    fixed = shortest - low
    low, high = max(low, low_bound - fixed), min(high, high_bound - fixed)
    if low > MOST_REPEATS or MOST_REPEATS < high < math.inf:
        return None
    parts[variable[0]] = (atom, low, high)
    return "^" + "".join(atom + _quantifier(*times) for atom, *times in parts) + "$"


class _Group:
    """The contents of a group."""

    def __init__(self) -> None:
        self._low = self._high = 0.0
        self._ended: list[Lengths] = []

    def add(self, part: Lengths, times: Lengths) -> None:
        """Add a part and its repetitions."""
        self._low += part[0] * times[0]
        self._high += part[1] * times[1] if part[1] and times[1] else 0

    def end_alternative(self) -> None:
        """End an alternative, at a bar."""
        self._ended.append((self._low, self._high))
        self._low = self._high = 0.0

    def lengths(self) -> Lengths:
        """End the group, and return its lengths."""
        self.end_alternative()
        return min(low for low, _ in self._ended), max(high for _, high in self._ended)


def times_of(text: str) -> Lengths:
    """Return the minimum and maximum repetitions that a quantifier means."""
    if not text:
        return 1, 1
    if text in "*+?":
        return float(text == "+"), 1 if text == "?" else math.inf
    low, comma, high = text[1:-1].partition(",")
    return int(low), math.inf if comma and not high else int(high or low)


def _quantifier(low: float, high: float) -> str:
    if low == high:
        return "" if low == 1 else f"{{{int(low)}}}"
    return f"{{{int(low)},{'' if high == math.inf else int(high)}}}"
