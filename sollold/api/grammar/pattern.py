"""Converts JSON Schema's ``pattern`` to the subset of regular expressions that llama.cpp supports. Pure.

llama.cpp accepts only patterns between ``^`` and ``$`` of literals, classes, groups, alternatives and
repetitions; it silently ignores any other, and a class that includes a quote or a control character breaks
the JSON around it. Patterns that have an equivalent form are rewritten; classes are narrowed to characters
that JSON does not escape.
"""

from __future__ import annotations

import re

_CLASSES = {"d": "0-9", "w": "A-Za-z0-9_", "s": " "}
"""Classes of escapes. Of whitespace, only the space appears unescaped in a JSON string."""
_NOT_IN_JSON = '"\\\\\\x00-\\x1F'
"""For a negated class: the quote, the backslash and the control characters."""
_ANY = f"[^{_NOT_IN_JSON}]"
_LITERAL_ESCAPES = frozenset("^$.[]()|{}*+?-/ ,:;=!<>@#%&~'`_")
_QUANTIFIER = re.compile(r"[*+?]|\{\d+(?:,\d*)?\}")
_GROUP_NAME = re.compile(r"<[A-Za-z_]\w*>")
_MAX_CHARACTERS = 2000
_MAX_DEPTH = 30
_MAX_TIMES = 1000


_EQUIVALENT = {
    r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$": (
        r"^([A-Za-z0-9_'+-]+\.)*[A-Za-z0-9_'+-]*[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9-]*\.)+[A-Za-z]{2,}$"
    )
}
"""Patterns that programs (zod) write with look-arounds → the same without."""


class Unsupported(ValueError):
    """The pattern can't be expressed by llama.cpp's grammars."""


def convertible_pattern(pattern: str) -> str:
    """Return ``pattern`` as llama.cpp can enforce it; it matches no string that ``pattern`` does not.

    Raises:
        Unsupported: look-arounds, back references, word boundaries, character properties, flags, quotes …
    """
    pattern = _EQUIVALENT.get(pattern, pattern)
    if len(pattern) > _MAX_CHARACTERS:
        raise Unsupported("it is too long")
    return f"^{_Translator(pattern).alternatives()}$"


class _Translator:
    """One pass over a pattern."""

    def __init__(self, pattern: str) -> None:
        self._text = pattern
        self._position = 0
        self._depth = 0

    def alternatives(self) -> str:
        """Translate the whole pattern; an alternative without an anchor may have any text there."""
        parts = [self._anchored()]
        while self._take("|"):
            parts.append(self._anchored())
        if self._position < len(self._text):
            raise Unsupported(f"unexpected {self._text[self._position]!r}")
        return parts[0] if len(parts) == 1 else "(" + "|".join(parts) + ")"

    def _anchored(self) -> str:
        start = self._take("^")
        body = self._sequence()
        end = self._take("$")
        prefix = "" if start else f"{_ANY}*"
        suffix = "" if end else f"{_ANY}*"
        return prefix + body + suffix

    def _sequence(self) -> str:
        out: list[str] = []
        while self._position < len(self._text) and self._text[self._position] not in "|)$":
            atom, times = self._atom(), self._quantifier()
            if times and atom[0] == "\\":
                # llama.cpp would repeat the letters before it as well.
                atom = f"[{_in_class(atom)}]"
            out.append(atom + times)
        return "".join(out)

    def _atom(self) -> str:
        char = self._text[self._position]
        self._position += 1
        if char == "(":
            return self._group()
        if char == "[":
            return self._class()
        if char == ".":
            return _ANY
        if char == "\\":
            return self._escape()
        if char in "*+?^" or (char == "{" and _QUANTIFIER.match(self._text, self._position - 1)):
            raise Unsupported(f"unexpected {char!r}")
        return self._literal(char)

    def _literal(self, char: str) -> str:
        if char in '"\\' or char < " ":
            raise Unsupported(f"{char!r} must be escaped in JSON")
        if char > "~":
            # llama.cpp would repeat only its last byte.
            return f"[{char}]"
        return "\\" + char if char in "{}]" else char

    def _group(self) -> str:
        if self._take("?") and not self._take(":"):
            name = _GROUP_NAME.match(self._text, self._position)
            if name is None:
                raise Unsupported("look-arounds and flags are not supported")
            self._position = name.end()
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise Unsupported("its groups are nested too deeply")
        parts = [self._sequence()]
        while self._take("|"):
            parts.append(self._sequence())
        self._depth -= 1
        if not self._take(")"):
            raise Unsupported("an anchor inside a group is not supported")
        return "(" + "|".join(parts) + ")"

    def _quantifier(self) -> str:
        match = _QUANTIFIER.match(self._text, self._position)
        if match is None:
            return ""
        self._position = match.end()
        if any(int(number) > _MAX_TIMES for number in re.findall(r"\d+", match[0])):
            raise Unsupported(f"{match[0]} repeats too often")
        self._take("?")  # lazy: the same strings match
        return match[0]

    def _escape(self) -> str:
        char = self._next()
        if char in _CLASSES:
            return f"[{_CLASSES[char]}]"
        if char in "DWS":
            return f"[^{_CLASSES[char.lower()]}{_NOT_IN_JSON}]"
        literal = self._escaped(char, _LITERAL_ESCAPES)
        return f"[{literal}]" if literal > "~" else literal

    def _escaped(self, char: str, literals: frozenset[str]) -> str:
        if char in "xu":
            digits = 2 if char == "x" else 4
            code = self._text[self._position : self._position + digits]
            if len(code) < digits or any(digit not in "0123456789abcdefABCDEF" for digit in code):
                raise Unsupported(f"\\{char} needs {digits} hex digits")
            self._position += digits
            literal = chr(int(code, 16))
            if literal in '"\\' or literal < " ":
                raise Unsupported(f"{literal!r} must be escaped in JSON")
            return "\\" + literal if literal in literals and literal in "^$.[]()|{}*+?-" else literal
        if char in "^$.[]()|{}*+?":
            return "\\" + char
        if char in literals:
            return char
        raise Unsupported(f"\\{char} is not supported")

    def _class(self) -> str:
        negated = self._take("^")
        out: list[str] = []
        while True:
            char = self._next()
            if char == "]":
                break
            if char == "[" and self._text.startswith(":", self._position):
                raise Unsupported("[:…:] is not supported")
            if char == "\\":
                escaped = self._next()
                if escaped in _CLASSES:
                    out.append(_CLASSES[escaped] if not negated else _NEGATED.get(escaped, _CLASSES[escaped]))
                    continue
                if escaped == "-":
                    out.append("\\-")
                    continue
                if escaped in "nrtfv0":
                    if negated:
                        continue  # excluded anyway
                    raise Unsupported(f"\\{escaped} must be escaped in JSON")
                if escaped in '"\\':
                    if negated:
                        continue
                    raise Unsupported(f"{escaped!r} must be escaped in JSON")
                out.append(_in_class(self._escaped(escaped, _LITERAL_ESCAPES)))
                continue
            if char == '"' or char < " ":
                if negated:
                    continue
                raise Unsupported(f"{char!r} must be escaped in JSON")
            out.append(_in_class(char) if char == "[" else char)
        if not out and not negated:
            raise Unsupported("an empty class matches nothing")
        return "[" + ("^" if negated else "") + "".join(out) + (_NOT_IN_JSON if negated else "") + "]"

    def _next(self) -> str:
        if self._position >= len(self._text):
            raise Unsupported("it ends too early")
        self._position += 1
        return self._text[self._position - 1]

    def _take(self, text: str) -> bool:
        taken = self._text.startswith(text, self._position)
        self._position += len(text) if taken else 0
        return taken


def _in_class(literal: str) -> str:
    """Convert an escaped character for use in a class, where llama.cpp accepts only necessary escapes."""
    char = literal[-1]
    return "\\x5E" if char == "^" else "\\" + char if char in "[]-" else char


_NEGATED = {"s": " "}
