"""Requests of OpenAI's clients, and their conversion for llama-server and Ollama. Pure."""

from __future__ import annotations

from itertools import chain
from typing import Any, Literal

import msgspec

from sollold.api.engine.calls import engine_body, ollama_body, typed_body
from sollold.api.engine.fields import stop_list
from sollold.api.engine.left_out import are_results
from sollold.api.engine.modelfile import add_parameters, with_modelfile
from sollold.api.engine.number_ranges import (
    Choices,
    Count,
    LimitOrNone,
    Penalty,
    Share,
    Small,
    Temperature,
    TopLogprobs,
    Whole,
)
from sollold.api.engine.placement import V1Fields
from sollold.api.engine.prepare import normalize_chat
from sollold.api.engine.tools import chosen_tools, require_tools, unknown_tools_message
from sollold.api.openai.chat_message import chat_message
from sollold.api.openai.llama_sampling import LlamaSampling, with_llamas_names
from sollold.errors import bad_request
from sollold.models.model import Model

_MAX_PIECES_CHARACTERS = 512 * 1024


class StreamOptions(msgspec.Struct, kw_only=True):
    """``stream_options``."""

    include_usage: bool | None = None


class Sampling(LlamaSampling, kw_only=True):
    """The fields that chat and completions have in common. Other fields are passed on unread."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    max_tokens: LimitOrNone | None = None
    n: Choices | None = None
    seed: Whole | None = None
    stop: str | list[str] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None

    @property
    def counted(self) -> bool:
        """Whether the caller of a stream asked for the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatCompletion(Sampling, kw_only=True):
    """``POST /v1/chat/completions``."""

    messages: list[dict[str, Any]] | None = None
    max_completion_tokens: LimitOrNone | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    parallel_tool_calls: bool | None = None
    functions: list[dict[str, Any]] | None = None
    function_call: str | dict[str, Any] | None = None
    modalities: list[str] | None = None
    web_search_options: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | str | None = None
    parse_tool_calls: bool | None = None
    reasoning_format: Literal["none", "auto", "deepseek", "deepseek-legacy"] | None = None
    reasoning_in_content: bool | None = None
    reasoning_budget_tokens: Small | None = None
    thinking_budget_tokens: Small | None = None

    @property
    def uses_functions(self) -> bool:
        """Whether the caller expects a ``function_call`` in the answer, not ``tool_calls``."""
        return bool(self.functions) and not self.tools


class Completion(Sampling, kw_only=True):
    """``POST /v1/completions``."""

    prompt: str | list[Any] | None = None
    suffix: str | None = None
    echo: bool | None = None
    best_of: Choices | None = None
    logprobs: Count | None = None


class Tokenize(V1Fields, kw_only=True):
    """``POST /tokenize``."""

    content: str | list[Any] | None = None
    add_special: bool | None = None
    parse_special: bool | None = None
    with_pieces: bool | None = None


class Detokenize(V1Fields, kw_only=True):
    """``POST /detokenize``."""

    tokens: list[int] | None = None


class Infill(LlamaSampling, kw_only=True):
    """``POST /infill``, an endpoint of llama-server's."""

    input_prefix: str | None = None
    input_suffix: str | None = None
    prompt: str | None = None
    input_extra: list[dict[str, Any]] | None = None
    stream: bool | None = None


class ApplyTemplate(V1Fields, kw_only=True):
    """``POST /apply-template``."""

    messages: list[dict[str, Any]] | None = None
    tools: list[Any] | None = None


def chat_completion_body(checked: dict[str, Any], ask: ChatCompletion, model: Model) -> dict[str, Any]:
    """Return the body for llama-server's ``/v1/chat/completions``; ``checked``: from `checked_chat`."""
    out = {**checked, "messages": with_modelfile(checked["messages"], model)}
    add_parameters(out, model)
    if ask.logprobs and not ask.top_logprobs:
        # llama-server takes 0 for no probabilities at all.
        out["top_logprobs"] = 1
    if ask.uses_functions:
        # The answer has room for one call.
        out["parallel_tool_calls"] = False
    return out


def native_chat_body(checked: dict[str, Any], ask: ChatCompletion, model: Model) -> dict[str, Any]:
    """Return the body for an Ollama's ``/v1/chat/completions``; ``checked``: from `checked_chat`."""
    out = ollama_body(checked, model)
    if ask.stream:
        # Even if the caller does not want it: the usage shows whether the Ollama truncated the prompt.
        out["stream_options"] = {"include_usage": True}
    return out


def checked_chat(body: dict[str, Any], ask: ChatCompletion, model: Model) -> dict[str, Any]:
    """Return a chat in the form that both engines accept, without what the model's Modelfile adds.

    Raises:
        Refusal: BAD_REQUEST.
    """
    if not ask.messages:
        raise bad_request("messages is required: a list with at least one message", field="messages")
    for name in ("max_tokens", "max_completion_tokens"):
        if getattr(ask, name) == 0:
            raise bad_request(f"{name} must be at least 1, or -1 for no limit; it is 0", field=name)
    if ask.top_logprobs and not ask.logprobs:
        raise bad_request("top_logprobs needs logprobs to be true", field="top_logprobs")
    if not ask.logprobs and "top_logprobs" in body:
        body = {key: value for key, value in body.items() if key != "top_logprobs"}
    for modality in ask.modalities or ():
        if modality != "text":
            message = f"modalities: {modality[:40]} output is not supported; only text is"
            raise bad_request(message, field="modalities")
    out = with_llamas_names(engine_body(typed_body(body, ask)), ask)
    if ask.functions is not None or ask.function_call is not None:
        out = with_functions(out, ask)
    out = normalize_chat(out)
    for name in UNSUPPORTED_FIELDS:
        out.pop(name, None)
    _set_effort(out)
    if ask.max_tokens is not None:
        # Ollama knows only max_tokens; llama-server would prefer max_completion_tokens.
        out.pop("max_completion_tokens", None)
    _clean_stop(out, ask)
    results = are_results(out["messages"])
    out["messages"] = [
        chat_message(message, model, result=result)
        for message, result in zip(out["messages"], results, strict=True)
    ]
    if "tool_choice" in out:
        _set_tool_choice(out)
    kind = (ask.response_format or {}).get("type")
    if kind not in (None, "text", "json_object", "json_schema"):
        raise bad_request(
            "response_format.type must be text, json_object or json_schema", field="response_format.type"
        )
    return out


UNSUPPORTED_FIELDS = ("modalities", "audio", "web_search_options")
"""Fields of a chat that are sent to no engine."""


def _set_effort(out: dict[str, Any]) -> None:
    """Translate the alternatives to ``reasoning_effort``: ``reasoning`` (Ollama, OpenRouter), ``thinking``
    (Anthropic) and ``enable_thinking`` (Qwen's own servers).
    """
    reasoning, thinking = out.pop("reasoning", None), out.pop("thinking", None)
    enabled = out.pop("enable_thinking", None)
    if out.get("reasoning_effort") is not None:
        return
    disabled = enabled is False or (isinstance(thinking, dict) and thinking.get("type") == "disabled")
    effort = None
    if isinstance(reasoning, dict):
        disabled = disabled or reasoning.get("enabled") is False
        effort = reasoning.get("effort")
    if disabled:
        effort = "none"
    if isinstance(effort, str) and effort:
        out["reasoning_effort"] = effort


def with_functions(body: dict[str, Any], ask: ChatCompletion) -> dict[str, Any]:
    """Return ``body`` with the deprecated ``functions`` and ``function_call`` as tools."""
    body = {key: value for key, value in body.items() if key not in ("functions", "function_call")}
    if not ask.functions:
        return body
    tools = [{"type": "function", "function": function} for function in ask.functions]
    body["tools"] = [*(ask.tools or ()), *tools]
    choice = ask.function_call
    if choice is not None and ask.tool_choice is None:
        body["tool_choice"] = {"type": "function", "function": choice} if isinstance(choice, dict) else choice
    return body


def _clean_stop(body: dict[str, Any], ask: Sampling) -> None:
    """Drop empty stop sequences."""
    body.pop("stop", None)
    stop = stop_list(ask.stop)
    if stop:
        body["stop"] = stop


def _set_tool_choice(out: dict[str, Any]) -> None:
    """Keep only the chosen functions, since llama-server ignores such a choice, and set the mode."""
    mode, names = chosen_tools(out.pop("tool_choice"))
    if names is not None:
        chosen = frozenset(names)
        tools = [tool for tool in out.get("tools", ()) if tool["function"]["name"] in chosen]
        if not tools:
            raise bad_request(unknown_tools_message(names))
        out["tools"] = tools
    require_tools(mode, out.get("tools"))
    out["tool_choice"] = mode


def completion_body(body: dict[str, Any], ask: Completion, model: Model) -> dict[str, Any]:
    """Return the body for llama-server's ``/v1/completions``.

    Raises:
        Refusal: BAD_REQUEST.
    """
    if ask.prompt is None or ask.prompt == []:
        raise bad_request("prompt is required", field="prompt")
    check_tokens(ask.prompt, "prompt")
    if ask.echo:
        raise bad_request("echo is not supported; put the prompt before the answer yourself", field="echo")
    if ask.best_of is not None and ask.best_of > max(1, ask.n or 1):
        raise bad_request("best_of is not supported; request n answers and choose one", field="best_of")
    out = with_llamas_names(engine_body(typed_body(body, ask)), ask)
    _clean_stop(out, ask)
    for name in ("echo", "best_of", "suffix"):
        out.pop(name, None)
    if ask.logprobs is not None:
        # llama-server takes 0 for no probabilities at all.
        out["logprobs"] = max(1, ask.logprobs)
    return add_parameters(out, model)


def check_tokens(prompt: str | list[Any], name: str) -> None:
    """Refuse a prompt that is neither text nor tokens nor a list of these.

    Raises:
        Refusal: BAD_REQUEST.
    """
    if isinstance(prompt, str):
        return

    lists = [value for value in prompt if type(value) is list]
    nested = list(chain.from_iterable(lists))
    if not _are_valid(prompt, {str, int, list}) or not all(lists) or not _are_valid(nested, {str, int}):
        raise bad_request(f"{name} must be a string, a list of strings, or tokens", field=name)


def check_in_vocabulary(tokens: list[int], model: Model) -> None:
    """Refuse tokens outside the model's vocabulary, if its size is known.

    Raises:
        Refusal: BAD_REQUEST.
    """
    count = model.vocabulary.partition(":")[0]
    if count and tokens and max(tokens) >= int(count):
        raise bad_request(f"{max(tokens)} is not a token of the model: it has {count}")


def check_pieces(content: str | list[Any]) -> None:
    """Refuse text that is too long to be shown token by token: the response may take 20 bytes per byte.

    Raises:
        Refusal: BAD_REQUEST with status 413.
    """
    texts = [content] if isinstance(content, str) else [text for text in content if isinstance(text, str)]
    if sum(map(len, texts)) > _MAX_PIECES_CHARACTERS:
        raise bad_request(
            f"content is longer than {_MAX_PIECES_CHARACTERS} characters, the limit of with_pieces; "
            "omit with_pieces, or send the content in parts",
            status=413,
        )


def _are_valid(values: list[Any], types: set[type]) -> bool:
    """Whether all values are of ``types`` and all numbers valid tokens. Fast: there may be many."""
    present = set(map(type, values))
    if int not in present or not present <= types:
        return present <= types
    numbers = values if present == {int} else [value for value in values if type(value) is int]
    return bool(min(numbers) >= 0 and max(numbers) < 2**31)
