"""Classifies engines' errors: the caller's fault, which any engine would refuse, or the engine's own.

llama-server responds with 500 to any exception in its handlers, to a tool without a name as well as to a
failed computation. Only the text distinguishes them. Unknown errors count as the engine's fault.
"""

from __future__ import annotations

import re

import msgspec

from sollold.engines.llamacpp.exit_reason import mentions_lack_of_memory
from sollold.errors import Fault, Refusal
from sollold.serving.request import longest_input
from sollold.undecodable import UNDECODABLE

_CALLERS_FAULT = re.compile(
    # nlohmann::json: bad JSON, a wrong type, a missing key. 316 comes from writing the model's own text.
    r"json\.exception\.(?!type_error\.316)"
    r"|Failed to parse (?:tools|messages|tool call|json|JSON|grammar)"
    r"|(?:is|are) not supported|does not support|Unsupported|not support\b"
    r"|Missing |Expected |[Uu]nknown |_M_range_check"
    r"|Invalid (?!input batch)|[Ii]nvalid (?:option|format|message|image)"
    r"|\bmust (?:be|have|contain|not|match)\b|cannot unmarshal"
    r"|Jinja|template|[Ss]chema|[Gg]rammar"
    r"|(?:load|decode|process|read) (?:the )?(?:image|audio)",
)
_ENGINES_FAULT = re.compile(r"runner process|error loading model|(?:CUDA|ROCm|HIP|Vulkan|SYCL) error")
"""Messages about the engine itself, which may quote any words: `unknown model architecture`, an assertion."""
TEMPLATE_REFUSES = "the model's chat template refuses this conversation: "
"""Prefix of the message of a template's refusal, followed by the template's own words."""
_TEMPLATE = re.compile(r"Jinja Exception: (.+)", re.DOTALL)
_DUMP = re.compile(r"; (?:tools|messages) = .*|; last read: '.*", re.DOTALL)
"""llama-server appends all tools or messages to an error about one of them, and the text to one of JSON."""
_MESSAGE = re.compile(r"(Failed to parse messages: (?:\[json[^\]]*\])?[^\[{;]*[^\[{;:\s]).*", re.DOTALL)
"""It quotes the message, too."""
_ANSWER = re.compile(r"(Failed to parse input at pos \d+): .*", re.DOTALL)
"""llama-server quotes the model's answer that it can't parse. Errors are logged and shown to others, and the
answer may contain any of the words by which errors are classified."""
_TOO_MANY_CHOICES = re.compile(r"Field 'n(?:_cmpl)?': Value must be between 1 <= value <= (\d+)")
_RUNNER_CRASHED = re.compile(r"terminated:.*(?:segmentation fault|signal: aborted|SIGSEGV|SIGABRT)")
_UNPARSED = "does not match the expected"
_MAX_CHARACTERS = 1000
"""Maximum length of an engine's message that is passed on, in characters."""


class _ErrorDetail(msgspec.Struct):
    message: str = ""
    code: int | str | None = None


class _ErrorBody(msgspec.Struct):
    error: _ErrorDetail | str = ""


def engine_refusal(status: int, body: bytes) -> Refusal:
    """Return the `Refusal` for an engine's error response; a 500 that is the caller's fault becomes 400."""
    message = message_in(body) or f"the engine answered {status}"
    if status == 500 and _is_callers_fault(message):
        status = 400
    return Refusal(Fault.ENGINE, _shortened(message), status=status)


def is_callers_fault(refusal: Refusal) -> bool:
    """Whether an engine's error is the caller's fault, so that any other engine would refuse it too."""
    return refusal.status < 500 or refusal.status == 501


def is_unparsed(message: str) -> bool:
    """Whether llama-server reports that it can't parse the model's tool call."""
    return _UNPARSED in message


def runner_crashed(message: str) -> bool:
    """Whether Ollama reports that the process running a model crashed, but not for lack of memory."""
    return _RUNNER_CRASHED.search(message) is not None and not mentions_lack_of_memory(message)


def stream_status(event: bytes) -> int:
    """The HTTP status for an error in a stream: the one that it contains, or 500."""
    try:
        error = msgspec.json.decode(event, type=_ErrorBody).error
    except UNDECODABLE:
        return 500
    code = error.code if isinstance(error, _ErrorDetail) else None
    return code if isinstance(code, int) and 400 <= code <= 599 else 500


def message_in(body: bytes) -> str:
    """The message of an engine's error, in OpenAI's or Ollama's format; empty if it can't be parsed."""
    try:
        error = msgspec.json.decode(body, type=_ErrorBody).error
    except UNDECODABLE:
        return ""
    message = error if isinstance(error, str) else error.message
    # Ollama passes on its engine's errors verbatim: JSON within a JSON string.
    inner = message_in(message.encode()) if message.startswith('{"error":') else ""
    return inner or _ANSWER.sub(r"\1", message)


def _is_callers_fault(message: str) -> bool:
    if _ENGINES_FAULT.search(message) is not None:
        return False
    # llama-server reports an input too long to embed as a server error.
    return longest_input(message) is not None or _CALLERS_FAULT.search(message) is not None


def _shortened(message: str) -> str:
    """Shorten a message by a template's traceback and the repeated tools, and improve unclear ones."""
    if match := _TOO_MANY_CHOICES.search(message):
        return (
            f"n: each choice is a separate request to the model, which is loaded for {match[1]} at a time. "
            f"Set n to at most {match[1]}, or load the model for more with `sollold load MODEL --slots N`"
        )
    if refused := _TEMPLATE.search(message):
        message = f"{TEMPLATE_REFUSES}{refused[1].strip()}"
    return _DUMP.sub("", _MESSAGE.sub(r"\1", message))[:_MAX_CHARACTERS]
