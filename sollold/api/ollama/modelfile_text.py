"""The text of a Modelfile as the fields of ``/api/create``, which Ollama had it in before 0.5.5. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from sollold.errors import Fault, Refusal

_COMMAND = re.compile(r"([A-Za-z]++)[ \t]++")
_MARK = '"""'
_LONGEST = 400_000
_LISTED = ("stop",)
_TEXTS = {"SYSTEM": "system", "TEMPLATE": "template"}
_FIELDS = "from, system, template, parameters, messages, license"


def modelfile_fields(text: str) -> dict[str, Any]:
    """The fields that a Modelfile's text stands for.

    Raises:
        Refusal: BAD_REQUEST for what has no such field, and for a text that is no Modelfile.
    """
    if len(text) > _LONGEST:
        raise _refused(f"it is longer than {_LONGEST} characters")
    found: dict[str, Any] = {}
    lines = iter(text.splitlines())
    for line in lines:
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        command = _COMMAND.match(line)
        if command is None:
            raise _refused(f"{line[:40]!r} is no command of one")
        _add(found, command[1].upper(), _whole(line[command.end() :], lines))
    if "from" not in found:
        raise _refused("it has no FROM")
    return found


def _whole(value: str, lines: Iterator[str]) -> str:
    """A value with the lines that it goes on over, up to the end of what is in three quotes."""
    if value.count(_MARK) != 1:
        return value
    further = [value]
    for line in lines:
        further.append(line)
        if _MARK in line:
            return "\n".join(further).rstrip()
    raise _refused(f"the text in {_MARK} has no end")


def _add(found: dict[str, Any], command: str, value: str) -> None:
    if command == "FROM":
        value = _unquoted(value)
        if value.startswith(("/", ".", "~")) or value.lower().endswith(".gguf"):
            raise _refused(
                f"FROM {value[:60]} is a file: put it into a model folder (sollold.toml, [models] folders)"
            )
        found["from"] = value
    elif command in _TEXTS:
        found[_TEXTS[command]] = _unquoted(value)
    elif command == "LICENSE":
        found.setdefault("license", []).append(_unquoted(value))
    elif command == "PARAMETER":
        name, _, given = value.partition(" ")
        _add_parameter(found.setdefault("parameters", {}), name.lower(), _unquoted(given.strip()))
    elif command == "MESSAGE":
        role, _, content = value.partition(" ")
        found.setdefault("messages", []).append({"role": role.lower(), "content": _unquoted(content.strip())})
    else:
        raise _refused(f"{command[:40]} is not supported without an Ollama")


def _add_parameter(parameters: dict[str, Any], name: str, given: str) -> None:
    if name in _LISTED:
        parameters.setdefault(name, []).append(given)
        return
    for kind in (int, float):
        try:
            parameters[name] = kind(given)
        except ValueError:
            continue
        return
    parameters[name] = {"true": True, "false": False}.get(given.lower(), given)


def _unquoted(text: str) -> str:
    for mark in (_MARK, '"'):
        if len(text) >= 2 * len(mark) and text.startswith(mark) and text.endswith(mark):
            return text[len(mark) : -len(mark)]
    return text


def _refused(why: str) -> Refusal:
    return Refusal(
        Fault.BAD_REQUEST, f"modelfile: {why}; a request says the same in {_FIELDS}", field="modelfile"
    )
