"""Ollama's prompt templates (Go's text/template), as far as a caller's own ``template`` uses them.

Known: ``{{ .Name }}`` for System, Prompt, Response, Suffix, Think and its like; ``if`` with a name, ``not``,
``and``, ``or``; ``else``, ``else if``, ``end``; trim marks and comments. The rest is refused by name rather
than guessed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import field

from sollold.errors import Fault, Refusal
from sollold.facts import dataclass

_LEFT = re.compile(r"\{\{(- )?")
_NAME = re.compile(r"\$?\.(System|Prompt|Response|Suffix|First|Think|ThinkLevel|IsThinkSet)")
_LIMIT = 100_000
_DEPTH = 50


@dataclass(slots=True)
class _Block:
    """One ``if``: what counts at present, and whether a branch was taken already."""

    outer: bool
    live: bool
    taken: bool
    closed: bool = field(default=False)


def render_template(template: str, values: Mapping[str, str]) -> str:
    """``template`` with ``values`` (``System``, ``Prompt``, ``Suffix``, ``Think`` …; ``Response`` ends it).

    Raises:
        Refusal: BAD_REQUEST naming the part that is not supported.
    """
    if len(template) > _LIMIT:
        raise Refusal(Fault.BAD_REQUEST, f"template is longer than {_LIMIT} characters")
    out: list[str] = []
    blocks: list[_Block] = []
    live = True
    for text, action in _parts(template):
        if live:
            out.append(text)
        if action is None or (action.startswith("/*") and action.endswith("*/")):
            continue
        if action.startswith("if "):
            if len(blocks) >= _DEPTH:
                raise Refusal(Fault.BAD_REQUEST, "template: ifs are nested too deeply")
            truth = _true(action[3:], values)
            blocks.append(_Block(live, truth, truth))
            live = live and truth
        elif action == "else" or action.startswith("else if "):
            if not blocks or blocks[-1].closed:
                raise Refusal(Fault.BAD_REQUEST, "template: else without if")
            block = blocks[-1]
            truth = not block.taken and (action == "else" or _true(action[8:], values))
            block.closed = action == "else"
            block.taken = block.taken or truth
            live = block.outer and truth
        elif action == "end":
            if not blocks:
                raise Refusal(Fault.BAD_REQUEST, "template: end without if")
            live = blocks.pop().outer
        elif live and _NAME.fullmatch(action) and action.endswith(".Response"):
            # What follows the answer is not part of the prompt.
            return "".join(out)
        else:
            value = _value(action, values)
            if live:
                out.append(value)
    if blocks:
        raise Refusal(Fault.BAD_REQUEST, "template: an if has no end")
    return "".join(out)


def _parts(template: str) -> Iterator[tuple[str, str | None]]:
    """Each text with the action that follows it; None after the last."""
    place = 0
    trim = False
    # No one pattern for a whole action: it would look for the end anew at each of many beginnings.
    while match := _LEFT.search(template, place):
        text = template[place : match.start()]
        end = template.find("}}", match.end())
        if end < 0:
            raise Refusal(Fault.BAD_REQUEST, "template: a {{ has no }}")
        inner = template[match.end() : end]
        place = end + 2
        if trim:
            text = text.lstrip()
        if match[1]:
            text = text.rstrip()
        trim = inner.endswith(" -")
        yield text, (inner[:-2] if trim else inner).strip()
    rest = template[place:]
    yield (rest.lstrip() if trim else rest), None


def _value(action: str, values: Mapping[str, str]) -> str:
    match = _NAME.fullmatch(action)
    if match is None:
        raise Refusal(
            Fault.BAD_REQUEST,
            f"template: {{{{ {action[:60]} }}}} is not supported; .System, .Prompt, .Suffix, .Response and "
            'if, else, end are. Or render the prompt yourself and send "raw": true',
        )
    return values.get(match[1], "")


def _true(condition: str, values: Mapping[str, str]) -> bool:
    words = condition.split()
    if len(words) == 1:
        return words[0] == "$.First" or words[0] == ".First" or bool(_value(words[0], values))
    if words[0] == "not" and len(words) == 2:
        return not _value(words[1], values)
    if words[0] == "and":
        return all(_value(word, values) for word in words[1:])
    if words[0] == "or":
        return any(_value(word, values) for word in words[1:])
    _value(condition, values)
    return False
