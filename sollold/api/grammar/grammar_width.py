"""Limits the number of ways in which a grammar, or a schema's pattern, can continue at one position. Pure.

llama.cpp follows all of them at once and compares each with each, for every token: a few thousand take
seconds, and optional parts in nested repetitions multiply to millions, on which an engine hangs.
"""

from __future__ import annotations

import re

MOST_WAYS = 2000
"""Maximum ways: with an enumeration of this many values, the first token takes about a second."""
_REPEAT_COST = 3
"""Cost factor of a way that repetitions lead to, since several of them reach it."""
_MAX_DEPTH = 200
"""Maximum depth of rules that refer to one another."""
_MAX_REPEATS = 200_000
"""Maximum repetitions of all parts of a grammar together: each becomes a rule."""
_MAX_DIGITS = 9
"""Maximum digits of a number of repetitions."""
_MAX_SYMBOLS = 20_000
"""Maximum symbols in a grammar: checking this many takes some 50 ms."""

_PATTERN = re.compile(
    r"\\.|\[(?:[^\]\\]|\\.)*+\]?|\(\?:|[()|?*+]|\{(\d*),?(\d*)\}|[^\\\[(){}|?*+]{1,64}(?![?*+{])|.", re.DOTALL
)
_GRAMMAR = re.compile(
    r'"(?:[^"\\]|\\.)*+"?|\[(?:[^\]\\]|\\.)*+\]?|#[^\r\n]*+|[A-Za-z0-9_-]+(?:\s*::=)?|[()|?*+.]'
    r"|\{\s*(\d*)\s*,?\s*(\d*)\s*\}|\s+|.",
    re.DOTALL,
)

Ways = tuple[int, bool]
"""The number of ways into a part, and whether the part may be empty."""


class TooManyWays(Exception):
    """There are more than `MOST_WAYS`, or another limit of grammars is exceeded; the message says which."""


def check_pattern(pattern: str) -> None:
    """Check a regular expression of a JSON schema.

    Raises:
        TooManyWays: a limit is exceeded.
    """
    groups = _Groups()
    for token in _PATTERN.finditer(pattern):
        text = token[0]
        if text in ("(", "(?:"):
            groups.begin_group()
        elif text == ")":
            groups.end_group()
        elif not groups.inner.follow(text, token):
            groups.inner.add(0 if text in "^$" else 1, text in "^$")
    groups.ways()


def check_grammar(grammar: str) -> None:
    """Check a grammar in llama.cpp's form (GBNF); syntax errors are left to llama.cpp.

    Raises:
        TooManyWays: a limit is exceeded.
    """
    rules: dict[str, list[re.Match[str]]] = {}
    tokens: list[re.Match[str]] = []
    repeats = 0
    for number, token in enumerate(_GRAMMAR.finditer(grammar)):
        text = token[0]
        if number > _MAX_SYMBOLS:
            raise TooManyWays(f"it has more than {_MAX_SYMBOLS} symbols")
        if text.endswith("::="):
            tokens = rules[text[:-3].rstrip()] = []
        elif not (text.isspace() or text[0] == "#"):
            tokens.append(token)
            repeats += int(token[2] or token[1] or 0)
            if repeats > _MAX_REPEATS:
                raise TooManyWays(f"its parts are repeated more than {_MAX_REPEATS} times")
    # Measured twice: whether a recursive rule may be empty is known only after the first time.
    measure = _Measure(rules, _Measure(rules, {}).known)
    if _has_left_recursion(measure.begins):
        raise TooManyWays("a rule may begin with itself (left recursion)")


class _Groups:
    """An expression being parsed, with its open groups.

    Attributes:
        inner: the sequence of the innermost group.
    """

    def __init__(self) -> None:
        self.inner = _Sequence()
        self._outer: list[_Sequence] = []

    def begin_group(self) -> None:
        """Begin a group."""
        self._outer.append(self.inner)
        self.inner = _Sequence(self.inner)

    def end_group(self) -> None:
        """End the innermost group, if there is one."""
        if self._outer:
            ways = self.inner.ways()
            self.inner = self._outer.pop()
            self.inner.add(*ways)

    def ways(self) -> Ways:
        """End all open groups, and return the ways of the whole expression."""
        while self._outer:
            self.end_group()
        return self.inner.ways()


class _Measure:
    """Measures all rules of a grammar.

    Attributes:
        known: rule → its ways.
        begins: rule → the rules with which it may begin.
    """

    def __init__(self, rules: dict[str, list[re.Match[str]]], earlier: dict[str, Ways]) -> None:
        """``earlier``: the result of an earlier measurement, for recursive rules."""
        self.known: dict[str, Ways] = {}
        self.begins: dict[str, set[str]] = {}
        self._rules = rules
        self._earlier = earlier
        for name in rules:
            if name not in self.known:
                self._measure(name, 0)

    def _measure(self, name: str, depth: int) -> Ways:
        if depth > _MAX_DEPTH:
            raise TooManyWays(f"its rules refer to one another more than {_MAX_DEPTH} levels deep")
        rules, known, begins = self._rules, self.known, self.begins.setdefault(name, set())
        known[name] = (1, self._earlier.get(name, (1, False))[1])
        groups = _Groups()
        for token in rules[name]:
            text = token[0]
            if text == "(":
                groups.begin_group()
            elif text == ")":
                groups.end_group()
            elif not groups.inner.follow(text, token):
                if text in rules:
                    if groups.inner.at_beginning:
                        begins.add(text)
                    groups.inner.add(*(known.get(text) or self._measure(text, depth + 1)))
                else:
                    groups.inner.add(1, text == '""')
        known[name] = groups.ways()
        return known[name]


def _has_left_recursion(begins: dict[str, set[str]]) -> bool:
    """Whether there is left recursion: a rule that may begin with itself, directly or through others."""
    pending = {name: len(targets) for name, targets in begins.items()}
    users: dict[str, list[str]] = {}
    for name, targets in begins.items():
        for target in targets:
            users.setdefault(target, []).append(name)
    ready = [name for name, count in pending.items() if not count]
    resolved = 0
    while ready:
        resolved += 1
        for name in users.get(ready.pop(), ()):
            pending[name] -= 1
            if not pending[name]:
                ready.append(name)
    return resolved < len(begins)


class _Sequence:
    """The contents of a group: alternatives, each a sequence of parts."""

    def __init__(self, outer: _Sequence | None = None) -> None:
        """``outer``: the enclosing sequence; None for a whole rule."""
        self._first = outer is None or outer.at_beginning
        self._parts: list[Ways] = []
        self._solid = 0
        self._count, self._empty = 0, False

    @property
    def at_beginning(self) -> bool:
        """Whether the rule may begin with the part that is added next."""
        return self._first and not self._solid

    def add(self, count: int, empty: bool) -> None:
        """Add a part."""
        self._parts.append((count, empty))
        self._solid += not empty

    def follow(self, text: str, token: re.Match[str]) -> bool:
        """Handle a bar, or the quantifier of the part before it; return False for any other token."""
        if text == "|":
            self._end_alternative()
            return True
        if text not in ("?", "*", "+") and token[1] is None:
            return False
        if not self._parts:
            return True
        count, empty = self._parts.pop()
        self._solid -= not empty
        low = high = 1
        if token[1] is not None:
            if max(len(token[1]), len(token[2])) > _MAX_DIGITS:
                raise TooManyWays(f"a part is repeated {text[:20]}… times")
            low = int(token[1] or 0)
            high = int(token[2] or low or 1)
            if high < low:
                # An engine would create rules until its memory is exhausted.
                raise TooManyWays(f"the repetition {text} has a minimum above its maximum")
        if empty:
            # Each repetition may be empty, so all of them can begin at once, and end at any other.
            count *= high * _REPEAT_COST if high > 1 else 1
        self.add(count, empty or text in ("?", "*") or (token[1] is not None and not low))
        return True

    def ways(self) -> Ways:
        """End the sequence, and return its ways.

        Raises:
            TooManyWays: there are too many at a position in it.
        """
        self._end_alternative()
        _check(self._count)
        return self._count, self._empty

    def _end_alternative(self) -> None:
        initial, empty = 0, True
        for count, may_be_empty in reversed(self._parts):
            # A part that may be empty is also reached from each part before it.
            initial = count * _REPEAT_COST + initial if may_be_empty and initial else count
            empty = empty and may_be_empty
            _check(initial)
        self._parts, self._solid = [], 0
        self._count += initial
        self._empty = self._empty or empty


def _check(count: int) -> None:
    if count > MOST_WAYS:
        raise TooManyWays(f"it can continue in more than {MOST_WAYS} ways at one place")
