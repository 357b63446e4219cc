"""Matches strings against patterns of `convertible_pattern`, and generates strings that match. Pure.

Matching tracks all positions at which each part may end, so that no pattern causes backtracking.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import field
from functools import lru_cache

from sollold.api.grammar.pattern_length import TOKEN, times_of
from sollold.facts import dataclass

_MAX_STEPS = 20_000
"""Maximum steps for one string; beyond that, the result is unknown."""
_MAX_CHARACTERS = 1000
_CHARS = "".join(map(chr, range(0x20, 0x7F)))
_MAX_REPEATS = 6
_MAX_SAMPLE_STEPS = 400


class _TooMuch(Exception):
    """A pattern takes too many steps, or is not of the expected form."""


@dataclass(slots=True)
class _Part:
    """A character or class, or a choice of sequences, and how often it is repeated."""

    atom: str
    choices: list[list[_Part]] = field(default_factory=list)
    low: float = 1
    high: float = 1


def matches(pattern: str, text: str) -> bool | None:
    """Whether ``pattern`` matches the whole ``text``; None if unknown."""
    if len(text) > _MAX_CHARACTERS:
        return None
    try:
        return len(text) in _Matcher(text).ends(_parse(pattern), frozenset((0,)))
    except _TooMuch:
        return None


def samples(pattern: str, count: int) -> list[str]:
    """Return ``count`` varied strings that match ``pattern``; none if they can't be generated."""
    rng = random.Random(0)
    try:
        sequence = _parse(pattern)
        return [_Sampler(rng).text(sequence) for _ in range(count)]
    except _TooMuch:
        return []


@lru_cache(maxsize=64)
def _parse(pattern: str) -> list[_Part]:
    stack: list[list[list[_Part]]] = [[[]]]
    position, text = 0, pattern[1:-1]
    while position < len(text):
        token = TOKEN.match(text, position)
        if token is None:
            raise _TooMuch
        position = token.end()
        if token["open"]:
            stack.append([[]])
        elif token["bar"]:
            stack[-1].append([])
        elif token["close"]:
            if len(stack) == 1:
                raise _TooMuch
            choices = stack.pop()
            stack[-1][-1].append(_Part("", choices, *times_of(token["times"])))
        else:
            stack[-1][-1].append(_Part(token["atom"], [], *times_of(token["times"])))
    if len(stack) != 1:
        raise _TooMuch
    return [_Part("", stack[0])]


@lru_cache(maxsize=256)
def _matcher_of(atom: str) -> Callable[[str], object]:
    return re.compile(atom if atom[0] in "[\\" else re.escape(atom), re.DOTALL).fullmatch


class _Matcher:
    """Matches one string."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._steps = 0

    def ends(self, sequence: list[_Part], starts: frozenset[int]) -> frozenset[int]:
        """Return the positions where ``sequence`` may end if it begins at one of ``starts``."""
        for part in sequence:
            starts = self._repeat(part, starts)
            if not starts:
                break
        return starts

    def _repeat(self, part: _Part, starts: frozenset[int]) -> frozenset[int]:
        ends = starts if part.low == 0 else frozenset()
        current, count = starts, 0
        while count < part.high and current:
            previous = current
            current = self._step(part, current)
            count += 1
            if count >= part.low:
                if current <= ends:
                    break
                ends |= current
            elif current == previous and part.low < math.inf:
                count = int(part.low) - 1
        return ends

    def _step(self, part: _Part, starts: frozenset[int]) -> frozenset[int]:
        self._steps += 1 + len(starts)
        if self._steps > _MAX_STEPS:
            raise _TooMuch
        if part.choices:
            return frozenset().union(*(self.ends(choice, starts) for choice in part.choices))
        fits = _matcher_of(part.atom)
        return frozenset(start + 1 for start in starts if start < len(self._text) and fits(self._text[start]))


class _Sampler:
    """Generates one string."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._steps = 0

    def text(self, sequence: list[_Part]) -> str:
        """Return a string that the sequence matches."""
        return "".join(self._parts(sequence))

    def _parts(self, sequence: list[_Part]) -> Iterator[str]:
        rng = self._rng
        for part in sequence:
            low, high = int(part.low), int(min(part.high, part.low + _MAX_REPEATS))
            for _ in range(rng.choice((low, high, rng.randint(low, high)))):
                self._steps += 1
                if self._steps > _MAX_SAMPLE_STEPS:
                    raise _TooMuch
                if part.choices:
                    yield from self._parts(rng.choice(part.choices))
                else:
                    yield rng.choice(_chars(part.atom))


@lru_cache(maxsize=256)
def _chars(atom: str) -> str:
    chars = "".join(filter(_matcher_of(atom), _CHARS))
    if not chars:
        raise _TooMuch
    return chars
