"""Parses Go's ``text/template`` into a tree, as far as prompt templates use it.

Supported: text with trim markers, comments, ``if`` / ``else if`` / ``else``, ``range`` with variables and
``else``, ``with``, ``break``, ``continue``, variables, pipelines, function calls, fields, strings, numbers.
Templates that define or call others are rejected.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import field

from sollold.facts import dataclass

MAX_CHARACTERS = 100_000
"""Maximum length of a template, in characters."""
_MAX_DEPTH = 50
_MAX_PIPES = 50
"""Maximum number of ``|`` in one action: each nests the value before it one level deeper."""
_MAX_NUMBER_CHARACTERS = 19
"""Maximum length of a number: Go's have 64 bits."""
_SPACE = " \t\r\n"
"""What Go's trim markers remove, and need beside them."""
_ACTION = re.compile(rf"\{{\{{(-[{_SPACE}])?")
_TOKEN = re.compile(
    r"""\s*(?:
        (?P<string>"(?:[^"\\\n]|\\.)*"|`[^`]*`)
      | (?P<number>-?\d+(?:\.\d+)?)
      | (?P<declare>:=)
      | (?P<sign>[=|(),])
      | (?P<variable>\$[A-Za-z0-9_]*)
      | (?P<field>\.[A-Za-z_][A-Za-z0-9_]*)
      | (?P<dot>\.)
      | (?P<word>[A-Za-z_][A-Za-z0-9_]*)
    )""",
    re.VERBOSE,
)
_ESCAPE = re.compile(
    r"\\(?:x([0-7][0-9a-fA-F])|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|([01][0-7]{2})|(.))", re.DOTALL
)
_ESCAPES = dict(zip("abfnrtv\\'\"", "\a\b\f\n\r\t\v\\'\"", strict=True))


class TemplateError(ValueError):
    """A template can't be parsed or translated.

    The message says which part, as a sentence without a full stop.
    """


@dataclass(frozen=True, slots=True)
class Text:
    """Text that is printed as it is."""

    text: str


@dataclass(frozen=True, slots=True)
class Literal:
    """A constant: a string, a number, true, false, or nil as None."""

    value: str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class Operand:
    """A value with fields: ``base`` is ``.``, a variable with its ``$``, or a parenthesized pipeline."""

    base: str | FunctionCall
    fields: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class FunctionCall:
    """A function and its arguments; without a name, its only argument itself."""

    name: str
    arguments: tuple[Expression, ...]


Expression = Literal | Operand | FunctionCall


@dataclass(frozen=True, slots=True)
class Print:
    """An action that prints a value."""

    value: Expression


@dataclass(frozen=True, slots=True)
class Assign:
    """``$x := value``, or ``$x = value`` when it is not ``new``."""

    variable: str
    value: Expression
    new: bool


@dataclass(frozen=True, slots=True)
class Leave:
    """``break`` or ``continue``."""

    word: str


@dataclass(frozen=True, slots=True)
class Branch:
    """``if``, ``with`` or ``range``: its value, variables (of ``range``: index and value) and both bodies."""

    kind: str
    value: Expression
    variables: tuple[str, ...]
    body: tuple[Node, ...]
    other: tuple[Node, ...]


Node = Text | Print | Assign | Leave | Branch


@dataclass(slots=True)
class _Open:
    """A branch that has not ended yet."""

    kind: str
    value: Expression
    variables: tuple[str, ...]
    body: list[Node] = field(default_factory=list)
    other: list[Node] | None = None
    chained: bool = False
    """It began with ``else if``, so it ends with the enclosing branch."""


def parse_template(text: str) -> tuple[Node, ...]:
    """Parse a template.

    Raises:
        TemplateError: it is malformed or uses an unsupported feature.
    """
    if len(text) > MAX_CHARACTERS:
        raise TemplateError(f"it is longer than {MAX_CHARACTERS} characters")
    nodes: list[Node] = []
    stack: list[_Open] = []

    def add(node: Node) -> None:
        if not stack:
            nodes.append(node)
        elif stack[-1].other is None:
            stack[-1].body.append(node)
        else:
            stack[-1].other.append(node)

    for part, action in _pieces(text):
        if part:
            add(Text(part))
        if not action:
            continue
        word = action.split(None, 1)[0]
        if word in ("if", "with", "range"):
            if len(stack) >= _MAX_DEPTH:
                raise TemplateError("it is nested too deeply")
            stack.append(_open(word, action[len(word) :]))
        elif word == "else":
            _add_else(stack, action[len(word) :].strip())
        elif action == "end":
            while True:
                if not stack:
                    raise TemplateError("{{ end }} without a block")
                top = stack.pop()
                add(Branch(top.kind, top.value, top.variables, tuple(top.body), tuple(top.other or ())))
                if not top.chained:
                    break
        elif action in ("break", "continue"):
            if not any(block.kind == "range" and block.other is None for block in stack):
                raise TemplateError(f"{{{{ {action} }}}} outside of a range")
            add(Leave(action))
        elif word in ("define", "template", "block"):
            raise TemplateError(f"{{{{ {word} }}}} is not supported")
        else:
            add(_statement(action))
    if stack:
        raise TemplateError(f"{{{{ {stack[-1].kind} }}}} without {{{{ end }}}}")
    return tuple(nodes)


def _pieces(text: str) -> Iterator[tuple[str, str]]:
    """Yield the text before each action, trimmed as marked, with the action; finally the remaining text."""
    place, trim = 0, False
    while match := _ACTION.search(text, place):
        part = text[place : match.start()]
        start = match.end()
        if text.startswith("/*", start):
            close = text.find("*/", start)
            end = text.find("}}", close) if close >= 0 else -1
        else:
            end = _end_of(text, start)
        if end < 0:
            raise TemplateError("{{ without }}")
        part = part.lstrip(_SPACE) if trim else part
        part = part.rstrip(_SPACE) if match[1] else part
        inner = text[start:end]
        trim = inner == "-" or (inner.endswith("-") and inner[-2] in _SPACE)
        action = (inner[:-1] if trim else inner).strip()
        yield part, "" if action.startswith("/*") else action
        place = end + 2
    yield (text[place:].lstrip(_SPACE) if trim else text[place:]), ""


def _end_of(text: str, start: int) -> int:
    """Return the position of an action's ``}}``, skipping strings; -1 if there is none."""
    place = start
    while place < len(text):
        character = text[place]
        if character == "}" and text.startswith("}}", place):
            return place
        if character in '"`':
            place += 1
            while place < len(text) and text[place] != character:
                place += 2 if character == '"' and text[place] == "\\" else 1
        place += 1
    return -1


def _open(kind: str, rest: str) -> _Open:
    tokens = _Tokens(rest)
    variables: tuple[str, ...] = ()
    if kind == "range" and (names := tokens.declared()):
        variables = names
    elif kind != "range" and tokens.declared():
        raise TemplateError(f"a variable declared by {{{{ {kind} }}}} is not supported")
    return _Open(kind, tokens.whole(), variables)


def _add_else(stack: list[_Open], rest: str) -> None:
    if not stack or stack[-1].other is not None:
        raise TemplateError("{{ else }} without {{ if }}")
    stack[-1].other = []
    if rest:
        word = rest.split(None, 1)[0]
        if word not in ("if", "with") or len(stack) >= _MAX_DEPTH:
            raise TemplateError(f"{{{{ else {word[:20]} }}}} is not supported")
        inner = _open(word, rest[len(word) :])
        inner.chained = True
        stack.append(inner)


def _statement(action: str) -> Node:
    tokens = _Tokens(action)
    kind, text = tokens.peek()
    if kind == "variable" and text != "$":
        operator = tokens.peek(1)
        if operator in (("declare", ":="), ("sign", "=")):
            tokens.skip(2)
            return Assign(text, tokens.whole(), operator[0] == "declare")
    return Print(tokens.whole())


class _Tokens:
    """The tokens of one action, read from left to right."""

    def __init__(self, text: str) -> None:
        self._text = text.strip()
        self._tokens: list[tuple[str, str, bool]] = []
        place = 0
        stripped = text.rstrip()
        while place < len(stripped):
            match = _TOKEN.match(stripped, place)
            if match is None or match.lastgroup is None:
                raise TemplateError(f"{{{{ {self._text[:60]} }}}} is not supported")
            token = match[match.lastgroup]
            spaced = match.start(match.lastgroup) > place or place == 0
            self._tokens.append((match.lastgroup, token, spaced))
            place = match.end()
        self._position = 0
        self._depth = 0
        self._pipes = 0

    def peek(self, ahead: int = 0) -> tuple[str, str]:
        place = self._position + ahead
        return self._tokens[place][:2] if place < len(self._tokens) else ("", "")

    def skip(self, count: int) -> None:
        self._position += count

    def declared(self) -> tuple[str, ...]:
        """Consume and return the variables before a ``:=``; if there are none, consume nothing."""
        names: list[str] = []
        ahead = 0
        while self.peek(ahead)[0] == "variable" and len(names) < 2:
            names.append(self.peek(ahead)[1])
            ahead += 1
            if self.peek(ahead) == ("declare", ":="):
                self.skip(ahead + 1)
                return tuple(names)
            if self.peek(ahead) != ("sign", ","):
                break
            ahead += 1
        return ()

    def whole(self) -> Expression:
        """Parse the rest as one pipeline."""
        value = self._pipeline()
        if self._position < len(self._tokens):
            raise self._error()
        return value

    def _pipeline(self) -> Expression:
        value = self._command()
        while self.peek() == ("sign", "|"):
            self.skip(1)
            self._pipes += 1
            if self._pipes > _MAX_PIPES:
                raise TemplateError("it is nested too deeply")
            call = self._command()
            if not isinstance(call, FunctionCall) or not call.name:
                raise self._error()
            value = FunctionCall(call.name, (*call.arguments, value))
        return value

    def _command(self) -> Expression:
        kind, text = self.peek()
        if kind == "word" and text not in ("true", "false", "nil"):
            self.skip(1)
            arguments = []
            while self.peek()[0] and self.peek() not in (("sign", "|"), ("sign", ")")):
                arguments.append(self._operand())
            return FunctionCall(text, tuple(arguments))
        return self._operand()

    def _operand(self) -> Expression:
        kind, text = self.peek()
        self.skip(1)
        match kind:
            case "string":
                return Literal(_unquoted(text))
            case "number" if len(text) <= _MAX_NUMBER_CHARACTERS:
                return Literal(float(text) if "." in text else int(text))
            case "word" if text in ("true", "false", "nil"):
                return Literal({"true": True, "false": False, "nil": None}[text])
            case "word":
                return FunctionCall(text, ())
            case "variable":
                return Operand(text, self._fields())
            case "dot":
                return Operand(".", ())
            case "field":
                return Operand(".", (text[1:], *self._fields()))
            case "sign" if text == "(":
                self._depth += 1
                if self._depth > _MAX_DEPTH:
                    raise TemplateError("it is nested too deeply")
                inner = self._pipeline()
                if self.peek() != ("sign", ")"):
                    raise self._error()
                self.skip(1)
                self._depth -= 1
                fields = self._fields()
                return Operand(FunctionCall("", (inner,)), fields) if fields else inner
        raise self._error()

    def _fields(self) -> tuple[str, ...]:
        """Parse the fields that follow without a space."""
        names: list[str] = []
        while self._position < len(self._tokens) and self._tokens[self._position][0] == "field":
            if self._tokens[self._position][2]:
                break
            names.append(self._tokens[self._position][1][1:])
            self.skip(1)
        return tuple(names)

    def _error(self) -> TemplateError:
        return TemplateError(f"{{{{ {self._text[:60]} }}}} is not supported")


def _unquoted(text: str) -> str:
    if text[0] == "`":
        return text[1:-1]
    return _ESCAPE.sub(_unescaped, text[1:-1])


def _unescaped(match: re.Match[str]) -> str:
    *hexadecimal, octal, letter = match.groups()
    code = int(octal, 8) if octal else int(next(filter(None, hexadecimal), "0"), 16)
    if letter not in (None, *_ESCAPES) or code > sys.maxunicode or 0xD800 <= code < 0xE000:
        raise TemplateError(f"{match[0]} in a string is not supported")
    return _ESCAPES[letter] if letter else chr(code)
