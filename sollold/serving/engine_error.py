"""What an engine's error means: the caller's fault, which no other engine would answer either, or its own.

llama-server answers 500 for whatever its handlers throw, so for a tool without a name as for a fault in the
computation. Only the text tells them apart. What is not known as the caller's fault counts as the engine's.
"""

from __future__ import annotations

import re

import msgspec

from sollold.errors import Fault, Refusal
from sollold.serving.request import longest_input

_CALLERS_FAULT = re.compile(
    # nlohmann's reader: bad JSON, a wrong type, a missing key. 316 is its writer's, about the model's text.
    r"json\.exception\.(?!type_error\.316)"
    r"|Failed to parse (?:tools|messages|tool call|json|JSON|grammar)"
    r"|(?:is|are) not supported|does not support|Unsupported|not support\b"
    r"|Missing |Expected |[Uu]nknown |_M_range_check"
    r"|Invalid (?!input batch)|[Ii]nvalid (?:option|format|message|image)"
    r"|\bmust (?:be|have|contain|not|match)\b|cannot unmarshal"
    r"|Jinja|template|[Ss]chema|[Gg]rammar"
    r"|(?:load|decode|process|read) (?:the )?(?:image|audio)",
)
TEMPLATE_REFUSES = "the model's chat template refuses this conversation: "
"""How the message of a template's refusal begins; what follows are the template's own words."""
_TEMPLATE = re.compile(r"Jinja Exception: (.+)", re.DOTALL)
_DUMP = re.compile(r"; tools = \[.*", re.DOTALL)
"""llama-server repeats all tools behind what is wrong with one of them."""
_TOO_MANY_CHOICES = re.compile(r"Field 'n(?:_cmpl)?': Value must be between 1 <= value <= (\d+)")
_RUNNER_CRASHED = re.compile(r"terminated:.*(?:segmentation fault|signal: aborted|SIGSEGV|SIGABRT)")
_LONGEST = 1000
"""Characters of an engine's words that are passed on."""


class _ErrorDetail(msgspec.Struct):
    message: str = ""
    code: int | str | None = None


class _ErrorBody(msgspec.Struct):
    error: _ErrorDetail | str = ""


def engine_refusal(status: int, body: bytes) -> Refusal:
    """An error that an engine answered with ``status``: below 500 when it is the caller's fault."""
    message = message_in(body) or f"the engine answered {status}"
    if status == 500 and _is_callers_fault(message):
        status = 400
    return Refusal(Fault.ENGINE, _in_one_sentence(message), status=status)


def is_callers_fault(refusal: Refusal) -> bool:
    """Whether an engine's error says nothing against the engine: any other would refuse the request too."""
    return refusal.status < 500 or refusal.status == 501


def runner_crashed(message: str) -> bool:
    """Whether an Ollama says that the process which ran a model ended by a fault of its own."""
    return _RUNNER_CRASHED.search(message) is not None


def stream_status(event: bytes) -> int:
    """The status that an error in a stream would have had; 500 when it says none."""
    try:
        error = msgspec.json.decode(event, type=_ErrorBody).error
    except msgspec.MsgspecError:
        return 500
    code = error.code if isinstance(error, _ErrorDetail) else None
    return code if isinstance(code, int) and 400 <= code <= 599 else 500


def message_in(body: bytes) -> str:
    """What an engine's error says, in OpenAI's form or Ollama's; empty when it can't be read."""
    try:
        error = msgspec.json.decode(body, type=_ErrorBody).error
    except msgspec.MsgspecError:
        return ""
    message = error if isinstance(error, str) else error.message
    # What its engine refused, an Ollama passes on as it is: JSON within a text of JSON.
    inner = message_in(message.encode()) if message.startswith('{"error":') else ""
    return inner or message


def _is_callers_fault(message: str) -> bool:
    # llama-server calls a text too long to embed a failure of its own.
    return longest_input(message) is not None or _CALLERS_FAULT.search(message) is not None


def _in_one_sentence(message: str) -> str:
    """Without the trace of a template's refusal and the tools that are repeated, and in words that help."""
    if many := _TOO_MANY_CHOICES.search(message):
        return (
            f"n: each choice is a request to the model, which is loaded for {many[1]} at a time. Ask for "
            f"{many[1]} at most, or load it for more with `sollold load MODEL --slots N`"
        )
    if refused := _TEMPLATE.search(message):
        message = f"{TEMPLATE_REFUSES}{refused[1].strip()}"
    return _DUMP.sub("", message)[:_LONGEST]
