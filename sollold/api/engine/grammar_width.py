"""In how many ways a grammar, or a pattern in a schema, goes on at one place. Pure.

llama.cpp follows all of them at once, compares each with each, and does so for every token: some thousands
take seconds, and optional parts that are repeated within repeated ones multiply to millions, over which an
engine hangs.
"""

from __future__ import annotations

import re

MOST_WAYS = 2000
"""Of a list of so many values an engine takes about a second for the first token."""
_REPEATED = 3
"""How much more a way costs that repetitions lead to: it can be reached by several."""
_LONGEST_CHAIN = 200
"""Rules that refer to one another."""
_MOST_SYMBOLS = 20_000
"""Of a grammar: to look at so many takes some 50 ms."""

_PATTERN = re.compile(
    r"\\.|\[(?:[^\]\\]|\\.)*+\]?|\(\?:|[()|?*+]|\{(\d*),?(\d*)\}|[^\\\[(){}|?*+]{1,64}(?![?*+{])|.", re.DOTALL
)
_GRAMMAR = re.compile(
    r'"(?:[^"\\]|\\.)*+"?|\[(?:[^\]\\]|\\.)*+\]?|#[^\r\n]*+|[A-Za-z0-9_-]+(?:\s*::=)?|[()|?*+.]'
    r"|\{\s*(\d*)\s*,?\s*(\d*)\s*\}|\s+|.",
    re.DOTALL,
)

Ways = tuple[int, bool]
"""How many ways lead into a part, and whether it may be empty."""


class TooManyWays(Exception):
    """There are more than `MOST_WAYS`; or the rules refer to one another too deeply."""


def check_pattern(pattern: str) -> None:
    """Look at a regular expression as JSON schemas have it.

    Raises:
        TooManyWays: see there.
    """
    sequence = _Sequence()
    waiting: list[_Sequence] = []
    for token in _PATTERN.finditer(pattern):
        text = token[0]
        if text in ("(", "(?:"):
            waiting.append(sequence)
            sequence = _Sequence()
        elif text == ")":
            if waiting:
                inner = sequence.ways()
                sequence = waiting.pop()
                sequence.add(*inner)
        elif not sequence.follow(text, token):
            sequence.add(0 if text in "^$" else 1, text in "^$")
    while waiting:
        inner = sequence.ways()
        sequence = waiting.pop()
        sequence.add(*inner)
    sequence.ways()


def check_grammar(grammar: str) -> None:
    """Look at a grammar in llama.cpp's form (GBNF); what is none is left to llama.cpp.

    Raises:
        TooManyWays: see there.
    """
    rules: dict[str, list[re.Match[str]]] = {}
    tokens: list[re.Match[str]] = []
    for number, token in enumerate(_GRAMMAR.finditer(grammar)):
        text = token[0]
        if number > _MOST_SYMBOLS:
            raise TooManyWays(f"it has more than {_MOST_SYMBOLS} symbols")
        if text.endswith("::="):
            tokens = rules[text[:-3].rstrip()] = []
        elif not (text.isspace() or text[0] == "#"):
            tokens.append(token)
    known: dict[str, Ways] = {}
    for name in rules:
        if name not in known:
            _measure(name, rules, known, 0)


def _measure(name: str, rules: dict[str, list[re.Match[str]]], known: dict[str, Ways], depth: int) -> Ways:
    if depth > _LONGEST_CHAIN:
        raise TooManyWays(f"its rules refer to one another more than {_LONGEST_CHAIN} deep")
    # A rule within itself comes behind something, or llama.cpp refuses the grammar.
    known[name] = (1, False)
    sequence = _Sequence()
    waiting: list[_Sequence] = []
    for token in rules[name]:
        text = token[0]
        if text == "(":
            waiting.append(sequence)
            sequence = _Sequence()
        elif text == ")":
            if waiting:
                inner = sequence.ways()
                sequence = waiting.pop()
                sequence.add(*inner)
        elif not sequence.follow(text, token):
            if text in rules:
                sequence.add(*(known.get(text) or _measure(text, rules, known, depth + 1)))
            else:
                sequence.add(1, text == '""')
    while waiting:
        inner = sequence.ways()
        sequence = waiting.pop()
        sequence.add(*inner)
    known[name] = sequence.ways()
    return known[name]


class _Sequence:
    """What stands between two brackets: parts one after the other, and alternatives of such."""

    def __init__(self) -> None:
        self._parts: list[Ways] = []
        self._count, self._empty = 0, False

    def add(self, count: int, empty: bool) -> None:
        """A further part."""
        self._parts.append((count, empty))

    def follow(self, text: str, token: re.Match[str]) -> bool:
        """Take in what is no part of its own: a bar, or how often the part before it is repeated."""
        if text == "|":
            self._end_alternative()
            return True
        if text not in ("?", "*", "+") and token[1] is None:
            return False
        if not self._parts:
            return True
        count, empty = self._parts.pop()
        low = high = 1
        if token[1] is not None:
            low = int(token[1] or 0)
            high = max(low, int(token[2] or low or 1))
        if empty:
            # Each time may be nothing, so that all of them begin at once, and may end at any other.
            count *= high * _REPEATED if high > 1 else 1
        self._parts.append((count, empty or text in ("?", "*") or (token[1] is not None and not low)))
        return True

    def ways(self) -> Ways:
        """Of all of it, which has come to its end.

        Raises:
            TooManyWays: there are too many at a place in it.
        """
        self._end_alternative()
        _check(self._count)
        return self._count, self._empty

    def _end_alternative(self) -> None:
        begin, empty = 0, True
        for count, may_be_empty in reversed(self._parts):
            begin = count + (begin if may_be_empty else 0)
            empty = empty and may_be_empty
            _check(begin)
        self._parts = []
        self._count += begin
        self._empty = self._empty or empty


def _check(count: int) -> None:
    if count > MOST_WAYS:
        raise TooManyWays(f"it goes on in more than {MOST_WAYS} ways at one place")
