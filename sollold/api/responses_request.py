"""OpenAI's ``/v1/responses`` in llama-server's words. Pure.

It too goes through ``/v1/chat/completions``, the form in which an answer can be gone on with after a fault.
"""

from __future__ import annotations

from typing import Any

import msgspec

from sollold.api.ollama_request import need
from sollold.models.model import Model
from sollold.serving.ask import Fault, Refusal

Message = dict[str, Any]


class ResponseAsk(msgspec.Struct, kw_only=True):
    """``POST /v1/responses``."""

    model: str = ""
    input: str | list[dict[str, Any]] | None = None
    instructions: str | None = None
    stream: bool | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    previous_response_id: str | None = None
    background: bool | None = None
    priority: int | str | None = None
    timeout: float | str | None = None
    keep_alive: float | str | None = None


def response_body(ask: ResponseAsk, model: Model) -> dict[str, Any]:
    """The body for ``/v1/chat/completions``; always streamed, a whole answer is put together here.

    Raises:
        Refusal: BAD_REQUEST.
    """
    if not ask.input:
        raise Refusal(Fault.BAD_REQUEST, "input is required: a text or a list of items")
    if ask.previous_response_id:
        raise Refusal(Fault.BAD_REQUEST, "previous_response_id is not supported: send the whole conversation")
    if ask.background:
        raise Refusal(Fault.BAD_REQUEST, "background is not supported: wait for the answer, or stream it")
    messages = _instructed(_messages(ask.input, model), ask.instructions, model)
    body: dict[str, Any] = {"model": model.name, "messages": messages}
    for theirs, ours in (
        ("max_output_tokens", "max_tokens"),
        ("temperature", "temperature"),
        ("top_p", "top_p"),
        ("parallel_tool_calls", "parallel_tool_calls"),
    ):
        value = getattr(ask, theirs)
        if value is not None:
            body[ours] = value
    _tools(body, ask, model)
    wanted = _format(ask.text)
    if wanted is not None:
        body["response_format"] = wanted
    effort = (ask.reasoning or {}).get("effort")
    if effort is not None:
        if not isinstance(effort, str):
            raise Refusal(Fault.BAD_REQUEST, "reasoning.effort is a word")
        body["reasoning_effort"] = effort
    body["stream"] = True
    body["stream_options"] = {"include_usage": True}
    return body


_SYSTEM = ("system", "developer")


def _instructed(messages: list[Message], instructions: str | None, model: Model) -> list[Message]:
    """``messages`` with the instructions, and what the system or developer says at their beginning, as one.

    Agents (Codex) send both. Templates know one system message, the first: of a second some fail, others say
    nothing to the model.
    """
    texts = [instructions] if instructions else []
    rest = 0
    for message in messages:
        if message["role"] not in _SYSTEM or not isinstance(message["content"], str):
            break
        texts.append(message["content"])
        rest += 1
    if not texts and model.system and not any(message["role"] in _SYSTEM for message in messages):
        texts = [model.system]
    system = "\n\n".join(text for text in texts if text)
    return ([{"role": "system", "content": system}] if system else []) + messages[rest:]


def _messages(given: str | list[dict[str, Any]], model: Model) -> list[dict[str, Any]]:
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    messages: list[dict[str, Any]] = []
    thought: list[str] = []
    for item in given:
        kind = item.get("type") or "message"
        if kind == "message":
            message = _message(item, model)
            if thought and message["role"] == "assistant":
                message["reasoning_content"] = "".join(thought)
            messages.append(message)
            thought = []
        elif kind == "reasoning":
            thought += _thoughts(item.get("content") or [])
        elif kind == "function_call":
            _add_call(messages, item, thought)
            thought = []
        elif kind == "function_call_output":
            messages.append(_result(item, model))
        else:
            raise Refusal(Fault.BAD_REQUEST, f"an input item of type {str(kind)[:40]!r} is not known here")
    return messages


def _message(item: dict[str, Any], model: Model) -> dict[str, Any]:
    role = item.get("role")
    if role not in ("user", "assistant", "system", "developer"):
        raise Refusal(Fault.BAD_REQUEST, f"role {str(role)[:40]!r} is not known")
    return {"role": role, "content": _content(item.get("content"), model)}


def _content(content: object, model: Model) -> str | list[dict[str, Any]]:
    """A content's parts; text alone as a text, which every template knows."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Refusal(Fault.BAD_REQUEST, "a message's content is a text or a list of parts")
    parts: list[dict[str, Any]] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("text") if isinstance(part, dict) else None
        if kind in ("input_text", "output_text", "text") and isinstance(text, str):
            parts.append({"type": "text", "text": text})
        elif kind == "input_image" and isinstance(part.get("image_url"), str):
            need(model, "vision", "images")
            parts.append({"type": "image_url", "image_url": {"url": part["image_url"]}})
        else:
            raise Refusal(Fault.BAD_REQUEST, f"a part of type {str(kind)[:40]!r} is not known here")
    if all(part["type"] == "text" for part in parts):
        return "".join(part["text"] for part in parts)
    return parts


def _thoughts(content: object) -> list[str]:
    if not isinstance(content, list):
        raise Refusal(Fault.BAD_REQUEST, "a reasoning's content is a list of parts")
    texts = [part.get("text") for part in content if isinstance(part, dict)]
    return [text for text in texts if isinstance(text, str)]


def _add_call(messages: list[dict[str, Any]], item: dict[str, Any], thought: list[str]) -> None:
    """A call joins the assistant's message before it, since templates know calls only as part of one."""
    id_, name = item.get("call_id") or item.get("id"), item.get("name")
    if not isinstance(id_, str) or not isinstance(name, str):
        raise Refusal(Fault.BAD_REQUEST, "a function_call needs a call_id and a name")
    arguments = item.get("arguments")
    if not isinstance(arguments, str):
        arguments = "{}"
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    if thought:
        messages[-1]["reasoning_content"] = "".join(thought)
    call = {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}}
    messages[-1].setdefault("tool_calls", []).append(call)


def _result(item: dict[str, Any], model: Model) -> dict[str, Any]:
    id_ = item.get("call_id")
    if not isinstance(id_, str):
        raise Refusal(Fault.BAD_REQUEST, "a function_call_output needs a call_id")
    return {"role": "tool", "tool_call_id": id_, "content": _content(item.get("output") or "", model)}


def _tools(body: dict[str, Any], ask: ResponseAsk, model: Model) -> None:
    """Functions alone: other tools (``web_search``) run at OpenAI, and the model is not told of them.

    Agents (Codex) offer them in every request. Only who must have one is refused.
    """
    offered = [tool for tool in ask.tools or () if tool.get("type") == "function"]
    if not offered:
        if ask.tools and ask.tool_choice not in (None, "auto", "none"):
            raise Refusal(
                Fault.BAD_REQUEST,
                "tool_choice wants a tool, and only functions of your own can be called here; "
                f"the tools are {', '.join(sorted({str(tool.get('type'))[:40] for tool in ask.tools}))}",
            )
        return
    need(model, "tools", "tools")
    tools: list[dict[str, Any]] = []
    for tool in offered:
        name = tool.get("name")
        if not isinstance(name, str):
            raise Refusal(Fault.BAD_REQUEST, "a tool of type 'function' needs a name")
        function: dict[str, Any] = {"name": name, "description": str(tool.get("description") or "")}
        function["parameters"] = tool.get("parameters") or {"type": "object", "properties": {}}
        tools.append({"type": "function", "function": function})
    choice: object = ask.tool_choice or "auto"
    if isinstance(choice, dict):
        wanted = choice.get("name")
        tools = [tool for tool in tools if tool["function"]["name"] == wanted]
        if not tools:
            raise Refusal(
                Fault.BAD_REQUEST, f"tool_choice names {str(wanted)[:60]!r}, which is not among the tools"
            )
        choice = "required"
    if choice not in ("auto", "required", "none"):
        raise Refusal(Fault.BAD_REQUEST, "tool_choice is auto, required, none or a function")
    body["tools"] = tools
    body["tool_choice"] = choice


def _format(text: dict[str, Any] | None) -> dict[str, Any] | None:
    wanted = (text or {}).get("format")
    if wanted is None:
        return None
    kind = wanted.get("type") if isinstance(wanted, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "json_object"}
    schema = wanted.get("schema") if isinstance(wanted, dict) else None
    if kind != "json_schema" or not isinstance(schema, dict):
        raise Refusal(Fault.BAD_REQUEST, "text.format is text, json_object, or json_schema with a schema")
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
