"""Parses a Modelfile into the fields of ``/api/create``, which took its text before Ollama 0.5.5. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from sollold.errors import Refusal, bad_request

_COMMAND = re.compile(r"([A-Za-z]++)[ \t]++")
_MARKS = ('"""', '"')
_MAX_CHARACTERS = 400_000
_LISTS = ("stop",)
_TEXTS = {"SYSTEM": "system", "TEMPLATE": "template"}
_WITH_WORD = ("PARAMETER", "MESSAGE")
"""Commands with a word before the value."""
_FIELDS = "from, system, template, parameters, messages, license"


def modelfile_fields(text: str) -> dict[str, Any]:
    """Return the fields to which a Modelfile's text is equivalent.

    Raises:
        Refusal: BAD_REQUEST for commands without such a field, and for text that is not a Modelfile.
    """
    if len(text) > _MAX_CHARACTERS:
        raise _refusal(f"it is longer than {_MAX_CHARACTERS} characters")
    fields: dict[str, Any] = {}
    # (Not `splitlines`: licences contain form feeds.)
    lines = iter(text.replace("\r\n", "\n").split("\n"))
    for line in lines:
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        command = _COMMAND.match(line)
        if command is None:
            raise _refusal(f"{line[:40]!r} is not a command")
        name, value = command[1].upper(), line[command.end() :]
        word, value = _first_word(value) if name in _WITH_WORD else ("", value)
        _add(fields, name, word.lower(), _unquoted(_full_value(value, lines)))
    if "from" not in fields:
        raise _refusal("it has no FROM")
    return fields


def _first_word(text: str) -> tuple[str, str]:
    """Return the first word and the rest."""
    word, *rest = text.split(None, 1)
    return word, rest[0] if rest else ""


def _full_value(value: str, lines: Iterator[str]) -> str:
    """Return a value with its continuation lines, up to the closing quotes."""
    mark = next((mark for mark in _MARKS if value.startswith(mark)), "")
    if not mark or (value.endswith(mark) and len(value) >= 2 * len(mark)):
        return value
    parts = [value]
    for line in lines:
        parts.append(line)
        if line.rstrip().endswith(mark):
            return "\n".join(parts).rstrip()
    raise _refusal(f"the string that begins with {mark} is not closed")


def _add(fields: dict[str, Any], command: str, word: str, value: str) -> None:
    if command == "FROM":
        if value.startswith(("/", ".", "~")) or value.lower().endswith(".gguf"):
            raise _refusal(
                f"FROM {value[:60]} is a file: put it into a model folder (sollold.toml, [models] folders)"
            )
        fields["from"] = value
    elif command in _TEXTS:
        fields[_TEXTS[command]] = value
    elif command == "LICENSE":
        fields.setdefault("license", []).append(value)
    elif command == "PARAMETER":
        _add_parameter(fields.setdefault("parameters", {}), word, value)
    elif command == "MESSAGE":
        fields.setdefault("messages", []).append({"role": word, "content": value})
    else:
        raise _refusal(f"{command[:40]} is not supported")


def _add_parameter(parameters: dict[str, Any], name: str, value: str) -> None:
    if name in _LISTS:
        parameters.setdefault(name, []).append(value)
        return
    for kind in (int, float):
        try:
            parameters[name] = kind(value)
        except ValueError:
            continue
        return
    parameters[name] = {"true": True, "false": False}.get(value.lower(), value)


def _unquoted(text: str) -> str:
    for mark in _MARKS:
        if len(text) >= 2 * len(mark) and text.startswith(mark) and text.endswith(mark):
            return text[len(mark) : -len(mark)]
    return text


def _refusal(reason: str) -> Refusal:
    return bad_request(f"modelfile: {reason}; the request may use {_FIELDS} instead", field="modelfile")
