"""Renders a parsed template as Go's ``text/template`` does, within bounds. Pure.

Values are strings, numbers, booleans, None, lists, and mappings for objects with fields.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from sollold.models.templates.go_parser import (
    Assign,
    Branch,
    Expression,
    FunctionCall,
    Leave,
    Literal,
    Node,
    Operand,
    Print,
    TemplateError,
    Text,
)

_MAX_STEPS = 20_000
"""Maximum number of nodes and values of a run, and pages of processed text: some ten milliseconds."""
_PAGE = 4096
_MAX_CHARACTERS = 16 << 20
"""Maximum length of the output, in characters."""
_COMPARED: dict[str, Callable[[Any, Any], bool]] = {
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}


def render_nodes(nodes: Sequence[Node], values: Mapping[str, Any]) -> str:
    """Render ``nodes`` with ``values``, the fields of the root.

    Raises:
        TemplateError: it uses an unknown field or function, values don't fit, or a limit is exceeded.
    """
    run = _Run(values)
    run.print_all(nodes, values)
    return "".join(run.printed)


class _Run:
    def __init__(self, root: Mapping[str, Any]) -> None:
        self.printed: list[str] = []
        self._frames: list[dict[str, Any]] = [{"$": root}]
        self._steps = 0
        self._length = 0

    def _spend(self, steps: int) -> None:
        self._steps += steps
        if self._steps > _MAX_STEPS:
            raise TemplateError("it takes too many steps")

    def _write(self, text: str) -> None:
        self._length += len(text)
        if self._length > _MAX_CHARACTERS:
            raise TemplateError(f"its output is longer than {_MAX_CHARACTERS} characters")
        self.printed.append(text)

    def print_all(self, nodes: Sequence[Node], dot: Any) -> str:
        """Print ``nodes``; return ``break`` or ``continue`` if that ended them early, else an empty text."""
        self._frames.append({})
        try:
            for node in nodes:
                self._spend(1)
                if word := self._print(node, dot):
                    return word
            return ""
        finally:
            self._frames.pop()

    def _print(self, node: Node, dot: Any) -> str:
        match node:
            case Text(text):
                self._write(text)
            case Print(value):
                self._write(self._shown(self._value(value, dot)))
            case Assign(name, value, new):
                self._assign(name, self._value(value, dot), new)
            case Leave(word):
                return word
            case Branch():
                return self._branch(node, dot)
        return ""

    def _assign(self, name: str, value: Any, new: bool) -> None:
        frame = self._frames[-1]
        if not new:
            frame = next((candidate for candidate in reversed(self._frames) if name in candidate), frame)
        frame[name] = value

    def _branch(self, node: Branch, dot: Any) -> str:
        value = self._value(node.value, dot)
        if node.kind == "range":
            return self._range(node, value, dot)
        if not value:
            return self.print_all(node.other, dot)
        return self.print_all(node.body, value if node.kind == "with" else dot)

    def _range(self, node: Branch, value: Any, dot: Any) -> str:
        if isinstance(value, Mapping):
            pairs = sorted(value.items())
        elif isinstance(value, list | tuple):
            pairs = list(enumerate(value))
        elif value is None:
            pairs = []
        elif type(value) is int:
            self._spend(max(0, value))
            pairs = [(number, number) for number in range(value)]
        else:
            raise TemplateError("range over a value that is not a list")
        if not pairs:
            return self.print_all(node.other, dot)
        for key, item in pairs:
            names = (key, item)[2 - len(node.variables) :] if node.variables else ()
            self._frames.append(dict(zip(node.variables, names, strict=True)))
            try:
                if self.print_all(node.body, item) == "break":
                    break
            finally:
                self._frames.pop()
        return ""

    def _value(self, expression: Expression, dot: Any) -> Any:
        self._spend(1)
        match expression:
            case Literal(constant):
                return constant
            case FunctionCall("", (only,)):
                return self._value(only, dot)
            case FunctionCall(("and" | "or") as name, arguments) if arguments:
                return self._first(arguments, dot, wanted=name == "or")
            case FunctionCall(name, arguments):
                return self._call(name, [self._value(argument, dot) for argument in arguments])
            case Operand(base, fields):
                return self._operand(base, fields, dot)
        raise AssertionError("unreachable")

    def _first(self, arguments: Sequence[Expression], dot: Any, *, wanted: bool) -> Any:
        """Return the value of the first argument that decides, else of the last."""
        found = None
        for argument in arguments:
            found = self._value(argument, dot)
            if bool(found) is wanted:
                break
        return found

    def _operand(self, base: str | FunctionCall, fields: Sequence[str], dot: Any) -> Any:
        if isinstance(base, FunctionCall):
            found = self._value(base, dot)
        elif base == ".":
            found = dot
        else:
            holder = next((frame for frame in reversed(self._frames) if base in frame), None)
            if holder is None:
                raise TemplateError(f"undeclared variable {base}")
            found = holder[base]
        for name in fields:
            if not isinstance(found, Mapping) or name not in found:
                raise TemplateError(f"unknown field .{name}")
            found = found[name]
        return found

    def _call(self, name: str, arguments: list[Any]) -> Any:
        self._spend(sum(len(argument) for argument in arguments if isinstance(argument, str)) // _PAGE)
        try:
            return self._called(name, arguments)
        except TemplateError:
            raise
        except (TypeError, IndexError, KeyError, ValueError):
            raise TemplateError(f"invalid arguments for the function {name}") from None

    def _called(self, name: str, arguments: list[Any]) -> Any:
        match name, arguments:
            case "eq", [first, *others] if others:
                return any(first == other for other in others)
            case "ne", [first, second]:
                return first != second
            case (("lt" | "le" | "gt" | "ge"), [first, second]):
                return _COMPARED[name](first, second)
            case "not", [value]:
                return not value
            case "len", [value]:
                return len(value)
            case "index", [value, *indexes]:
                for index in indexes:
                    value = value[_index(index) if not isinstance(value, Mapping) else index]
                return value
            case "slice", [value, *bounds] if len(bounds) <= 2:
                first, *last = (_index(bound) for bound in bounds or (0,))
                return value[first : last[0] if last else None]
            case "print", values:
                return "".join(self._shown(part) for part in values)
            case "html", [value]:
                return value
            case "json", [value]:
                return self._json(value)
            case "currentDate", []:
                return time.strftime("%Y-%m-%d")
        raise TemplateError(f"the function {name} with {len(arguments)} arguments is not supported")

    def _json(self, value: Any) -> str:
        text = msgspec.json.encode(value).decode()
        self._spend(len(text) // _PAGE)
        return text

    def _shown(self, value: Any) -> str:
        if isinstance(value, str):
            return value
        if value is None:
            return "<nil>"
        return self._json(value)


def _index(value: Any) -> int:
    """Return a valid index; Go has no negative ones."""
    if type(value) is not int or value < 0:
        raise IndexError
    return value
