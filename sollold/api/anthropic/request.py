"""Converts requests of Anthropic's clients to those of ``/v1/chat/completions``. Pure.

llama-server has Anthropic's API too, but an answer can be resumed after a fault in one form only, so every
request goes through ``/v1/chat/completions`` and the answer is translated back (`events`).
"""

from __future__ import annotations

import re
from typing import Any

from sollold.api.anthropic.blocks import READ, is_known
from sollold.api.anthropic.messages_ask import Messages, Thinking, Tokens, Turn
from sollold.api.anthropic.tools import add_tools
from sollold.api.engine.fields import require_capability
from sollold.api.engine.left_out import unread_document
from sollold.api.engine.messages import image_part, image_url_part, result_image_part
from sollold.api.engine.modelfile import add_parameters, own_messages
from sollold.api.engine.prepare import normalize_chat
from sollold.api.engine.sealed_thought import unsealed
from sollold.api.engine.tools import arguments_text
from sollold.errors import Refusal, bad_request
from sollold.models.model import Model

_MAX_STOP_SEQUENCES = 256


def messages_body(ask: Messages, model: Model) -> dict[str, Any]:
    """Return the body for ``/v1/chat/completions``, always streamed: a whole answer is assembled here.

    It has no stop sequences: `stop_sequences` finds them, since the answer must name the one that matched.

    Raises:
        Refusal: BAD_REQUEST.
    """
    if ask.max_tokens is None:
        raise bad_request("max_tokens is required and must be at least 1")
    if len(ask.stop_sequences or ()) > _MAX_STOP_SEQUENCES:
        # Each is searched for in the answer, token by token.
        raise bad_request(f"stop_sequences has more than {_MAX_STOP_SEQUENCES} entries")
    body = prompt_body(ask, model)
    body["max_tokens"] = ask.max_tokens
    for name in ("temperature", "top_p", "top_k"):
        value = getattr(ask, name)
        if value is not None:
            body[name] = value
    add_parameters(body, model)
    format_ = (ask.output_config or {}).get("format") or ask.output_format
    if format_:
        schema = format_.get("schema") if isinstance(format_, dict) else None
        if not isinstance(schema, dict) or format_.get("type") != "json_schema":
            raise bad_request("the output format must be of type json_schema, with a schema")
        if body["messages"][-1]["role"] == "assistant":
            # The format applies to what is generated, so the whole answer would not have it.
            raise bad_request("an output format can't be combined with the beginning of an answer")
        json_schema = {"name": "answer", "schema": schema, "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": json_schema}
    body["stream"] = True
    body["stream_options"] = {"include_usage": True}
    # The first event then contains the prompt's length, which message_start must report.
    body["timings_per_token"] = True
    return body


def prompt_body(ask: Tokens, model: Model) -> dict[str, Any]:
    """Return the part of the body that determines the prompt; also used for counting its tokens.

    Raises:
        Refusal: BAD_REQUEST.
    """
    if not ask.messages:
        raise bad_request("messages is required: a list with at least one message")
    if ask.thread:
        raise bad_request("thread: only Anthropic stores conversations; send all messages", field="thread")
    system = _system_text(ask.system) or model.system
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    messages += own_messages(model)
    for turn in ask.messages:
        messages += _turn(turn, model)
    body: dict[str, Any] = {"model": model.name, "messages": messages}
    add_tools(body, ask, model)
    _thinking(body, ask, model)
    return normalize_chat(body)


_BILLING = re.compile(r"x-anthropic-billing-header:(?:[ \t]*+[\w.-]++=[^;\s]*+;?)*+\s*+")
"""Where Claude Code's system prompt begins. Anthropic removes it; it differs in each request, so no engine
could reuse the prompt before."""


def _system_text(system: str | list[dict[str, Any]] | None) -> str:
    text = _text_of(system, "system") if system is not None else ""
    return text[billing.end() :] if (billing := _BILLING.match(text)) else text


def _text_of(content: str | list[Any], subject: str) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for block in content:
        text = block.get("text") if isinstance(block, dict) and block.get("type") == "text" else None
        if not isinstance(text, str):
            raise bad_request(f"{subject} must be a string or a list of text blocks")
        texts.append(text)
    return "\n".join(texts)


def _turn(turn: Turn, model: Model) -> list[dict[str, Any]]:
    """Convert one message to one or more: the result of a tool is a separate message, and comes first."""
    if turn.role not in ("user", "assistant", "system"):
        raise bad_request(f"unknown role {turn.role[:40]!r}; it must be user or assistant")
    if turn.content is None or isinstance(turn.content, str):
        return [{"role": turn.role, "content": turn.content or ""}]
    out: list[dict[str, Any]] = []
    parts: list[dict[str, Any]] = []
    calls: list[dict[str, Any]] = []
    thoughts: list[str] = []
    unknown = ""
    for block in turn.content:
        kind = block.get("type")
        if kind == "text" and isinstance(block.get("text"), str):
            parts.append({"type": "text", "text": block["text"]})
        elif kind == "image":
            parts.append(_image(block, model))
        elif kind == "document":
            parts.append({"type": "text", "text": _document(block)})
        elif kind == "tool_use" and turn.role == "assistant":
            calls.append(_call(block))
        elif kind == "tool_result" and turn.role == "user":
            out.append(_result(block, model))
        elif kind == "thinking" and isinstance(block.get("thinking"), str):
            # Omitted thinking is returned in the signature.
            thoughts.append(block["thinking"] or unsealed(block.get("signature")))
        elif kind == "compaction" and isinstance(block.get("content"), str):
            # The summary of the messages that it replaces.
            parts.append({"type": "text", "text": block["content"]})
        elif kind == "search_result":
            parts.append({"type": "text", "text": _search_result(block)})
        elif not isinstance(kind, str) or kind in READ:
            raise _unsupported(kind)
        elif not is_known(kind):
            unknown = kind
    if unknown and turn.role == "user" and not (parts or out):
        raise _unsupported(unknown)
    if parts or calls or thoughts or not (out or turn.role == "system"):
        message: dict[str, Any] = {"role": turn.role, "content": _plain(parts)}
        if calls:
            message["tool_calls"] = calls
        if thought := "".join(thoughts):
            message["reasoning_content"] = thought
        out.append(message)
    return out


def _unsupported(kind: object) -> Refusal:
    return bad_request(f"unsupported content block of type {str(kind)[:40]!r}")


def _search_result(block: dict[str, Any]) -> str:
    texts = [str(block.get(name)) for name in ("title", "source") if block.get(name)]
    content = block.get("content")
    return "\n".join([*texts, _text_of(content if isinstance(content, list) else [], "a search_result")])


def _plain(parts: list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """Return parts as a string if they are all text: every template supports that."""
    if all(part["type"] == "text" for part in parts):
        return "\n".join(part["text"] for part in parts)
    return parts


def _image(block: dict[str, Any], model: Model) -> dict[str, Any]:
    require_capability(model, "vision", "images")
    source = block.get("source")
    if isinstance(source, dict) and source.get("type") == "base64" and isinstance(source.get("data"), str):
        return image_part(source["data"])
    if isinstance(source, dict) and source.get("type") == "url" and isinstance(source.get("url"), str):
        return image_url_part(source["url"])
    raise bad_request("an image needs a source of type base64 or url")


def _document(block: dict[str, Any]) -> str:
    """Return a document's title, context and text, each of which the model is meant to see."""
    title, context = (value if isinstance(value := block.get(name), str) else "" for name in _ABOUT)
    text = _document_text(block.get("source"))
    lines = (unread_document(title), context) if text is None else (title, context, text)
    return "\n".join(filter(None, lines))


_ABOUT = ("title", "context")
"""Fields of a document that describe it."""


def _document_text(source: object) -> str | None:
    """Return a document's text; None if it is not plain text."""
    if not isinstance(source, dict) or not isinstance(source.get("type"), str):
        raise bad_request("a document needs a source with a type")
    text, content = source.get("data"), source.get("content")
    if source["type"] == "text" and isinstance(text, str):
        return text
    return _text_of(content, "a document's content") if isinstance(content, (str, list)) else None


def _call(block: dict[str, Any]) -> dict[str, Any]:
    name, id_ = block.get("name"), block.get("id")
    if not isinstance(name, str) or not isinstance(id_, str):
        raise bad_request("a tool_use block needs an id and a name")
    arguments = arguments_text(block.get("input"))
    return {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}}


def _result(block: dict[str, Any], model: Model) -> dict[str, Any]:
    id_ = block.get("tool_use_id")
    if not isinstance(id_, str):
        raise bad_request("a tool_result block needs a tool_use_id")
    content = block.get("content") or ""
    if isinstance(content, list):
        content = _plain([_result_part(part, model) for part in content])
    elif not isinstance(content, str):
        raise bad_request("a tool_result's content must be a string or a list of blocks")
    if block.get("is_error") is True:
        content = _as_error(content)
    return {"role": "tool", "tool_call_id": id_, "content": content}


def _as_error(content: str | list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """Mark a tool's result as an error in its text: templates can't otherwise show that a call failed."""
    if not isinstance(content, str):
        return [{"type": "text", "text": "Error:"}, *content]
    if "error" in content[:_SEARCHED_CHARACTERS].lower():
        return content
    return f"Error: {content}" if content else "Error"


_SEARCHED_CHARACTERS = 40
"""Number of leading characters searched for a client's own mention of an error."""


def _result_part(block: Any, model: Model) -> dict[str, Any]:
    """Convert one block of a tool's result; a tool found by a search (``tool_reference``) to its name."""
    kind = block.get("type") if isinstance(block, dict) else None
    if kind == "image":
        return result_image_part(lambda: _image(block, model), model)
    if kind == "document":
        return {"type": "text", "text": _document(block)}
    if kind == "search_result":
        return {"type": "text", "text": _search_result(block)}
    if kind == "tool_reference":
        return {"type": "text", "text": str(block.get("tool_name") or "")}
    if isinstance(kind, str) and kind not in READ:
        return {"type": "text", "text": str(block.get("text") or "")}
    return {"type": "text", "text": _text_of([block], "a tool_result's content")}


def _thinking(body: dict[str, Any], ask: Tokens, model: Model) -> None:
    """Set thinking: off unless requested, as at Anthropic; ignored for a model that can't think.

    Programs made for Anthropic's models (Claude Code) request it for every model. Ollama accepts their
    requests too.
    """
    thinking = ask.thinking or Thinking()
    if not thinking.enabled and thinking.type not in ("disabled", "between_tools"):
        raise bad_request("thinking.type must be enabled, adaptive, between_tools or disabled")
    if not thinking.enabled:
        if "thinking" in model.capabilities:
            body["reasoning_effort"] = "none"
        return
    if "thinking" not in model.capabilities:
        return
    body["chat_template_kwargs"] = {"enable_thinking": True}
    if isinstance(effort := (ask.output_config or {}).get("effort"), str):
        body["reasoning_effort"] = effort
    if thinking.budget_tokens is not None and thinking.type == "enabled":
        body["reasoning_budget_tokens"] = max(0, thinking.budget_tokens)
