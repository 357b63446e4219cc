"""Keyword arguments of requests, typed for editors and type checkers; others are refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypedDict

Messages = Iterable[Mapping[str, Any]]
"""A conversation: ``{"role": "user", "content": "…"}`` and so on."""


class ModelOptions(TypedDict, total=False):
    """Ollama's options. They may also be passed in ``options``."""

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
    """Arguments of embeddings, besides those that the methods declare themselves.

    ``keep_alive``: how long the model stays loaded, in seconds or as ``"5m"``; ``options``: Ollama's options
    by name; ``truncate``: False refuses texts that are too long; ``dimensions``: length of each vector.
    """

    options: Mapping[str, Any] | None
    keep_alive: float | str | None
    truncate: bool | None
    dimensions: int | None


class AnswerArguments(ModelOptions, total=False):
    """Arguments of text generation.

    ``priority``: 1 to 10, or a name such as ``"HIGH"``; ``max_tokens``: maximum length of the answer;
    ``timeout``: limit for the whole answer, in seconds; ``format``: ``"json"`` or a JSON schema; others as in
    `EmbedArguments`.
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
    """Arguments of a chat; ``tools``: in the form used by Ollama and OpenAI."""

    tools: Sequence[Mapping[str, Any]] | None


class GenerateArguments(AnswerArguments, total=False):
    """Arguments of a completion; ``images``: bytes of image files, or base64."""

    suffix: str | None
    system: str | None
    template: str | None
    context: Sequence[int] | None
    raw: bool | None
    images: Iterable[bytes | str] | None


OPTIONS = frozenset(ModelOptions.__annotations__)
"""Names of Ollama's options."""
_RESERVED = frozenset(("options", "priority", "timeout", "max_tokens"))
"""Arguments that take another form in the body."""


def fields_of(arguments: type[Any]) -> frozenset[str]:
    """The fields of a body that ``arguments`` permits."""
    return frozenset(arguments.__annotations__) - OPTIONS - _RESERVED
