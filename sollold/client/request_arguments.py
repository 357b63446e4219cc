"""The named arguments of a request to a model, as editors and type checkers read them; others are refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypedDict

Messages = Iterable[Mapping[str, Any]]
"""A conversation: ``{"role": "user", "content": "…"}`` and so on."""


class ModelOptions(TypedDict, total=False):
    """Ollama's options. They may also stand in ``options``."""

    num_ctx: int | None
    num_predict: int | None
    num_keep: int | None
    seed: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None
    repeat_last_n: int | None
    repeat_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    mirostat: int | None
    mirostat_tau: float | None
    mirostat_eta: float | None
    stop: str | Sequence[str] | None


class EmbedArguments(ModelOptions, total=False):
    """Of embeddings, beside those that the methods name themselves.

    ``keep_alive``: how long the model stays afterwards, in seconds or such as ``"5m"``; ``options``: Ollama's
    by their names; ``truncate``: False refuses a text that is too long; ``dimensions``: of a vector.
    """

    options: Mapping[str, Any] | None
    keep_alive: float | str | None
    truncate: bool | None
    dimensions: int | None


class AnswerArguments(ModelOptions, total=False):
    """Of any text that a model is to write.

    ``priority``: 1 to 10, or a name such as ``"HIGH"``; ``max_tokens``: of the answer at most; ``timeout``:
    seconds for the whole answer; ``format``: ``"json"`` or a JSON schema; others as in `EmbedArguments`.
    """

    priority: int | str | None
    max_tokens: int | None
    timeout: float | None
    options: Mapping[str, Any] | None
    keep_alive: float | str | None
    format: Literal["json", ""] | Mapping[str, Any] | None
    think: bool | str | None
    logprobs: bool | None
    top_logprobs: int | None
    truncate: bool | None
    shift: bool | None


class ChatArguments(AnswerArguments, total=False):
    """Of a chat; ``tools``: in the form of Ollama and OpenAI."""

    tools: Sequence[Mapping[str, Any]] | None


class GenerateArguments(AnswerArguments, total=False):
    """Of the continuation of a prompt; ``images``: the bytes of files, or base64."""

    suffix: str | None
    system: str | None
    template: str | None
    context: Sequence[int] | None
    raw: bool | None
    images: Iterable[bytes | str] | None


OPTIONS = frozenset(ModelOptions.__annotations__)
"""The names of Ollama's options."""
_TAKEN = frozenset(("options", "priority", "timeout", "max_tokens"))
"""Arguments that a body has in another form."""


def fields_of(arguments: type[Any]) -> frozenset[str]:
    """The fields of a body that a request with such ``arguments`` may name."""
    return frozenset(arguments.__annotations__) - OPTIONS - _TAKEN
