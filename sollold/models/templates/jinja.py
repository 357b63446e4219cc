"""Translates Ollama's prompt templates to Jinja for ``llama-server --chat-template-file``. Pure.

A template that uses ``.Messages`` prints a whole conversation. Any other prints one exchange (System, Prompt,
Response); Ollama prints it once for each exchange of a conversation, and the last time only up to
``.Response``. Consecutive messages of one role are joined by an empty line, as in Ollama.

All text becomes string literals and all tags strip white space, so that the engine's trimming has no effect.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import replace

from sollold.facts import dataclass
from sollold.models.templates.exchanges import field_names, until_response
from sollold.models.templates.go_parser import (
    MAX_CHARACTERS,
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
    parse_template,
)

_MAX_TRANSLATED = 1_000_000
"""Maximum length of a translated template, in characters: some constructs repeat their operands."""
_MAX_GUARDS = 50
"""Maximum number of nodes after which the rest of one loop's body is conditional, each nested in the last."""
RAW = "{{ .Prompt }}"
"""Ollama's template for a model whose file has none: the user's message and nothing around it."""

_FIELDS: dict[str, dict[str, tuple[str, str]]] = {
    "message": {
        "Role": ("role", "text"),
        "Content": ("content", "text"),
        "Thinking": ("thinking", "text"),
        "ToolCalls": ("tool_calls", "calls"),
        "ToolName": ("name", "text"),
        "ToolCallID": ("tool_call_id", "text"),
        "Images": ("images", "any"),
    },
    "call": {"Function": ("function", "called"), "ID": ("id", "text")},
    "called": {"Name": ("name", "text"), "Arguments": ("arguments", "json")},
    "tool": {"Type": ("type", "text"), "Function": ("function", "function")},
    "function": {
        "Name": ("name", "text"),
        "Description": ("description", "text"),
        "Parameters": ("parameters", "schema"),
    },
    "schema": {
        "Type": ("type", "text"),
        "Required": ("required", "any"),
        "Properties": ("properties", "properties"),
    },
    "property": {"Type": ("type", "any"), "Description": ("description", "text"), "Enum": ("enum", "any")},
}
"""Kind of a value → Go field → Jinja key and kind of the field's value."""
_ITEMS = {"messages": "message", "calls": "call", "tools": "tool", "properties": "property"}
_PRINTED_AS_JSON = frozenset({"tool", "function", "schema", "property", "called", "json", "tools", "calls"})
_EXCHANGE = {"System": "system", "Prompt": "prompt", "Response": "response"}
_THINKING = {
    "Think": "(enable_thinking is defined and enable_thinking)",
    "ThinkLevel": "(reasoning_effort if reasoning_effort is defined else '')",
    "IsThinkSet": "(enable_thinking is defined)",
}
_COMPARED = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_MESSAGE = (
    "{'role': ns.role, 'content': ns.content, "
    "'thinking': ns.first.reasoning_content if ns.first.reasoning_content else '', "
    "'tool_calls': ns.first.tool_calls if ns.first.tool_calls else [], "
    "'name': ns.first.name if ns.first.name else '', "
    "'tool_call_id': ns.first.tool_call_id if ns.first.tool_call_id else '', 'images': []}"
)


@dataclass(frozen=True, slots=True)
class _Value:
    """A Jinja expression and the kind of its value."""

    code: str
    kind: str = "any"


@dataclass(frozen=True, slots=True)
class _Scope:
    """The meaning of ``.`` and the variables.

    ``root``: the root fields; ``loop``: the namespace that says whether the innermost loop continues, if it
    has ``break`` or ``continue``; ``guards``: number of conditions on that around the present node.
    """

    root: dict[str, _Value]
    dot: _Value | None
    variables: dict[str, _Value]
    depth: int = 0
    loop: str = ""
    guards: int = 0


@functools.lru_cache(maxsize=64)
def to_jinja(template: str) -> str:
    """Return the template translated to Jinja.

    Raises:
        TemplateError: it has an unsupported part, which the message names.
    """
    nodes = parse_template(template)
    names = field_names(nodes)
    if "Messages" in names:
        return _conversation(nodes)
    if "Response" not in names:
        nodes = (*nodes, Print(Operand(".", ("Response",))))
    return _exchanges(nodes)


def untranslatable(template: str) -> str:
    """Return why a template can't be given to llama-server, as the end of a sentence; empty if it can."""
    # A longer one is refused at once and need not be kept.
    return (_reason if len(template) <= MAX_CHARACTERS else _reason.__wrapped__)(template)


@functools.lru_cache(maxsize=1024)
def _reason(template: str) -> str:
    try:
        to_jinja(template) if template else None
    except TemplateError as error:
        return str(error)
    return ""


def fingerprint(template: str) -> str:
    """Return a short hash that distinguishes loaded models by their template; empty without one."""
    return hashlib.sha256(template.encode()).hexdigest()[:16] if template else ""


def _conversation(nodes: tuple[Node, ...]) -> str:
    root = {
        "System": _Value("ns.system", "text"),
        "Messages": _Value("ns.messages", "messages"),
        "Tools": _Value("(tools if tools is defined and tools else [])", "tools"),
        **{name: _Value("''", "text") for name in ("Prompt", "Response", "Suffix")},
        **{name: _Value(code) for name, code in _THINKING.items()},
    }
    add = f"{{%- set ns.messages = ns.messages + [{_MESSAGE}] -%}}"
    return (
        "{%- set ns = namespace(system='', messages=[], role='', content='', first={}) -%}"
        + "{%- for m in messages -%}"
        + _CONTENT
        + "{%- if m.role == 'system' -%}"
        + "{%- set ns.system = (ns.system + '\\n\\n' + text.v) if ns.system else text.v -%}{%- endif -%}"
        + "{%- if m.role == ns.role and m.role != 'tool' -%}"
        + "{%- set ns.content = ns.content + '\\n\\n' + text.v -%}"
        + "{%- else -%}"
        + "{%- if ns.role -%}"
        + add
        + "{%- endif -%}{%- set ns.role = m.role -%}"
        + "{%- set ns.content = text.v -%}{%- set ns.first = m -%}"
        + "{%- endif -%}{%- endfor -%}{%- if ns.role -%}"
        + add
        + "{%- endif -%}"
        + _body(nodes, _Scope(root, None, {}))
    )


_CONTENT = (
    "{%- set text = namespace(v='') -%}{%- if m.content is string -%}{%- set text.v = m.content -%}"
    "{%- elif m.content -%}{%- for part in m.content -%}{%- if part.text -%}"
    "{%- set text.v = text.v + part.text -%}{%- endif -%}{%- endfor -%}{%- endif -%}"
)
"""Jinja code that puts the text of a message ``m`` into ``text.v``."""


def _exchanges(nodes: tuple[Node, ...]) -> str:
    root = {
        **{name: _Value(code, "text") for name, code in _EXCHANGE.items()},
        "Suffix": _Value("''", "text"),
        **{name: _Value(code) for name, code in _THINKING.items()},
    }
    scope = _Scope(root, None, {})
    opening, _ = until_response(nodes)
    flush = "{{- exchange(ns.system, ns.prompt, ns.response) -}}" + "".join(
        f"{{%- set ns.{name} = '' -%}}" for name in _EXCHANGE.values()
    )
    return (
        "{%- macro exchange(system, prompt, response) -%}"
        + _body(nodes, scope)
        + "{%- endmacro -%}{%- macro opening(system, prompt, response) -%}"
        + _body(opening, scope)
        + "{%- endmacro -%}"
        + "{%- set ns = namespace(system='', prompt='', response='', role='') -%}"
        + "{%- for m in messages -%}"
        + _CONTENT
        + "{%- if m.role == ns.role -%}{%- set text.v = '\\n\\n' + text.v -%}"
        + "{%- elif m.role == 'system' and (ns.prompt or ns.response) -%}"
        + flush
        + "{%- elif m.role == 'user' and ns.response -%}"
        + flush
        + "{%- endif -%}{%- if m.role == 'system' -%}{%- set ns.system = "
        + "(ns.system if m.role == ns.role else '') + text.v -%}"
        + "{%- elif m.role == 'user' -%}{%- set ns.prompt = "
        + "(ns.prompt if m.role == ns.role else '') + text.v -%}"
        + "{%- elif m.role == 'assistant' -%}{%- set ns.response = "
        + "(ns.response if m.role == ns.role else '') + text.v -%}{%- endif -%}"
        + "{%- set ns.role = m.role -%}{%- endfor -%}"
        + "{{- opening(ns.system, ns.prompt, ns.response) -}}"
    )


def _body(nodes: tuple[Node, ...], scope: _Scope) -> str:
    if scope.guards > _MAX_GUARDS:
        raise TemplateError("it has too many breaks and continues")
    out: list[str] = []
    size = 0
    for index, node in enumerate(nodes):
        size += len(out[-1]) if out else 0
        _check_size(size)
        match node:
            case Text(text):
                out.append(f"{{{{- {_quoted(text)} -}}}}")
            case Print(value):
                out.append(f"{{{{- {_printed(_value(value, scope))} -}}}}")
            case Assign(variable, value, new):
                assigned = _value(value, scope)
                # Jinja's ``if`` has no scope of its own.
                name = f"v{scope.depth}_{variable[1:]}"
                if new:
                    scope.variables[variable] = _Value(f"{name}.v", assigned.kind)
                    out.append(f"{{%- set {name} = namespace(v={assigned.code}) -%}}")
                elif variable in scope.variables:
                    out.append(f"{{%- set {scope.variables[variable].code} = {assigned.code} -%}}")
                else:
                    raise TemplateError(f"undeclared variable {variable}")
            case Leave(word):
                # llama.cpp's own ``break`` discards what the iteration has printed.
                stop = f"{{%- set {scope.loop}.on = false -%}}" if word == "break" else ""
                out.append(f"{{%- set {scope.loop}.go = false -%}}{stop}")
            case Branch():
                out.append(_branch(node, scope))
        if _leaves((node,)) and nodes[index + 1 :]:
            rest = _body(nodes[index + 1 :], replace(scope, guards=scope.guards + 1))
            out.append(f"{{%- if {scope.loop}.go -%}}{rest}{{%- endif -%}}")
            break
    return "".join(out)


def _check_size(characters: int) -> None:
    if characters > _MAX_TRANSLATED:
        raise TemplateError("its translation is too long")


def _leaves(nodes: tuple[Node, ...]) -> bool:
    """Return whether one of the nodes leaves the enclosing loop or its current iteration."""
    for node in nodes:
        if isinstance(node, Leave):
            return True
        if isinstance(node, Branch) and _leaves(
            node.other if node.kind == "range" else node.body + node.other
        ):
            return True
    return False


def _branch(node: Branch, scope: _Scope) -> str:
    value = _value(node.value, scope)
    inner = replace(scope, variables=dict(scope.variables), depth=scope.depth + 1)
    else_scope = replace(inner, variables=dict(scope.variables))
    other = f"{{%- else -%}}{_body(node.other, else_scope)}" if node.other else ""
    if node.kind == "if":
        return f"{{%- if {value.code} -%}}{_body(node.body, inner)}{other}{{%- endif -%}}"
    name = f"d{inner.depth}"
    if node.kind == "with":
        inner = replace(inner, dot=_Value(name, value.kind))
        body = f"{{%- set {name} = {value.code} -%}}{_body(node.body, inner)}"
        return f"{{%- if {value.code} -%}}{body}{other}{{%- endif -%}}"
    item = _Value(name, _ITEMS.get(value.kind, "any"))
    inner = replace(inner, dot=item)
    pairs = value.kind in ("properties", "json")
    index = f"k{inner.depth}"
    if node.variables:
        inner.variables[node.variables[-1]] = item
    if len(node.variables) > 1:
        inner.variables[node.variables[0]] = _Value(index if pairs else f"{index}.v")
    counted = len(node.variables) > 1 and not pairs
    count = f"{{%- set {index} = namespace(v=loop.index0) -%}}" if counted else ""
    heads = f"for {index}, {name} in {value.code}|dictsort" if pairs else f"for {name} in {value.code}"
    leaves = _leaves(node.body)
    inner = replace(inner, loop=f"l{inner.depth}" if leaves else "")
    body = _body(node.body, inner)
    flags = ""
    if leaves:
        flags = f"{{%- set {inner.loop} = namespace(on=true, go=true) -%}}"
        body = f"{{%- if {inner.loop}.on -%}}{{%- set {inner.loop}.go = true -%}}{body}{{%- endif -%}}"
    return f"{flags}{{%- {heads} -%}}{count}{body}{other}{{%- endfor -%}}"


def _value(value: Expression, scope: _Scope) -> _Value:
    match value:
        case Literal(constant):
            return _Value(_constant(constant), "text" if isinstance(constant, str) else "any")
        case FunctionCall("", (only,)):
            return _value(only, scope)
        case FunctionCall(name, arguments):
            return _call(name, [_value(argument, scope) for argument in arguments])
        case Operand(base, fields):
            return _operand(base, fields, scope)
    raise AssertionError("unreachable")


def _operand(base: str | FunctionCall, fields: tuple[str, ...], scope: _Scope) -> _Value:
    if isinstance(base, FunctionCall):
        found = _value(base, scope)
    elif base == "$" or (base == "." and scope.dot is None):
        if not fields:
            raise TemplateError("{{ . }} is not supported")
        if fields[0] not in scope.root:
            raise TemplateError(f"unknown field .{fields[0]}")
        found, fields = scope.root[fields[0]], fields[1:]
    elif base == ".":
        assert scope.dot is not None
        found = scope.dot
    elif base in scope.variables:
        found = scope.variables[base]
    else:
        raise TemplateError(f"undeclared variable {base}")
    for name in fields:
        entry = _FIELDS.get(found.kind, {}).get(name)
        if entry is None:
            raise TemplateError(f"unknown field .{name}")
        found = _Value(f"{found.code}.{entry[0]}", entry[1])
    return found


def _call(name: str, arguments: list[_Value]) -> _Value:
    codes = [argument.code for argument in arguments]
    match name, len(arguments):
        case ("eq", count) if count > 2:
            _check_size(len(codes[0]) * count + sum(map(len, codes)))
            return _Value("(" + " or ".join(f"{codes[0]} == {code}" for code in codes[1:]) + ")")
        case (("eq" | "ne" | "lt" | "le" | "gt" | "ge"), 2):
            return _Value(f"({codes[0]} {_COMPARED[name]} {codes[1]})")
        case (("and" | "or"), count) if count > 1:
            return _Value("(" + f" {name} ".join(codes) + ")", arguments[-1].kind)
        case (("and" | "or"), 1):
            return arguments[0]
        case "not", 1:
            return _Value(f"(not {codes[0]})")
        case "len", 1:
            return _Value(f"({codes[0]}|length)")
        case "index", 2:
            return _Value(f"{codes[0]}[{codes[1]}]", _ITEMS.get(arguments[0].kind, "any"))
        case "slice", 2:
            return _Value(f"{codes[0]}[{codes[1]}:]", arguments[0].kind)
        case "slice", 3:
            return _Value(f"{codes[0]}[{codes[1]}:{codes[2]}]", arguments[0].kind)
        case "json", 1:
            return _Value(f"({codes[0]}|tojson)", "text")
        case (("print" | "html"), 1):
            return arguments[0]
        case "currentDate", 0:
            return _Value('strftime_now("%Y-%m-%d")', "text")
    raise TemplateError(f"the function {name} with {len(arguments)} arguments is not supported")


def _printed(value: _Value) -> str:
    if value.kind == "json":
        # The engine passes arguments as a string to some templates and as an object to others.
        return f"({value.code} if {value.code} is string else ({value.code}|tojson))"
    if value.kind in _PRINTED_AS_JSON:
        return f"({value.code}|tojson)"
    return value.code


def _constant(value: str | int | float | bool | None) -> str:
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    return "none" if value is None else str(value)


def _quoted(text: str) -> str:
    for plain, escaped in (("\\", "\\\\"), ('"', '\\"'), ("\n", "\\n"), ("\r", "\\r"), ("\t", "\\t")):
        text = text.replace(plain, escaped)
    return f'"{text}"'
