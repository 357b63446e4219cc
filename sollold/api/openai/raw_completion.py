"""``/v1/completions`` at an Ollama with a raw prompt, as OpenAI and llama-server define it. Pure.

An Ollama's own ``/v1/completions`` puts the prompt into the model's template, so the same request would have
two meanings on two engines. Its ``/api/generate`` takes a raw prompt, and such an answer can be continued.
"""

from __future__ import annotations

from typing import Any

import msgspec

from sollold.api.engine.chunks import decoded
from sollold.api.openai.request import Completion
from sollold.api.openai.text_completion import TextPiece
from sollold.models.model import Model
from sollold.serving.request import Call

OPTIONS = {
    "max_tokens": "num_predict",
    "n_predict": "num_predict",
    **{
        name: name
        for name in (
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "typical_p",
            "seed",
            "presence_penalty",
            "frequency_penalty",
            "repeat_penalty",
            "repeat_last_n",
        )
    },
}
"""OpenAI's or llama-server's name → Ollama's."""


def raw_generate(body: dict[str, Any], ask: Completion, model: Model, notes: tuple[str, ...]) -> Call | None:
    """Return the call for an Ollama, or None if Ollama can't express the request.

    ``body``: the result of ``completion_body``; ``notes``: warnings about fields that have no effect.
    """
    prompt = ask.prompt
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str) or (ask.n or 1) > 1 or "grammar" in body:
        return None
    if 0 in (ask.max_tokens, ask.n_predict):
        # An Ollama takes a limit of 0 tokens for no limit.
        return None
    options = {OPTIONS[name]: value for name, value in body.items() if name in OPTIONS}
    if ask.num_ctx:
        options["num_ctx"] = ask.num_ctx
    if body.get("stop"):
        options["stop"] = body["stop"]
    out: dict[str, Any] = {"model": ask.model, "prompt": prompt, "raw": True, "stream": bool(ask.stream)}
    if options:
        out["options"] = options
    if ask.keep_alive is not None:
        out["keep_alive"] = ask.keep_alive
    if ask.logprobs is not None:
        out |= {"logprobs": True, "top_logprobs": ask.logprobs}
    if "thinking" in model.capabilities:
        # Otherwise Ollama takes thinking, which it recognizes by its tags, out of the text.
        out["think"] = False
    schema = body.get("json_schema") or _schema_in(body.get("response_format"))
    if schema is not None:
        out["format"] = schema
    return Call("/api/generate", out, notes)


def _schema_in(response_format: Any) -> Any:
    if not isinstance(response_format, dict) or response_format.get("type") in (None, "text"):
        return None
    json_schema = response_format.get("json_schema")
    schema = json_schema.get("schema") if isinstance(json_schema, dict) else response_format.get("schema")
    return schema if isinstance(schema, dict) else "json"


class _Record(msgspec.Struct):
    """The fields used of a line of ``/api/generate``."""

    response: str = ""
    done: bool = False
    done_reason: str = ""
    prompt_eval_count: int = 0
    eval_count: int = 0
    logprobs: list[dict[str, Any]] | None = None


_record = msgspec.json.Decoder(_Record)


def read_generated(raw: bytes) -> TextPiece:
    """Decode a line of ``/api/generate``.

    Raises:
        Refusal: ENGINE if it can't be parsed.
    """
    record = decoded(raw, _record, "response from Ollama")
    finish = ("length" if record.done_reason == "length" else "stop") if record.done else None
    return TextPiece(record.response, record.logprobs, finish, record.prompt_eval_count, record.eval_count)
