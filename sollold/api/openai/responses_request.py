"""OpenAI's ``/v1/responses`` in llama-server's words. Pure.

It too goes through ``/v1/chat/completions``, the form in which an answer can be resumed after a fault.
"""

from __future__ import annotations

from typing import Any

import msgspec

from sollold.api.engine.fields import need
from sollold.api.engine.messages import image_url_part
from sollold.api.engine.modelfile import add_parameters, own_messages
from sollold.api.engine.prepare import normalize_chat
from sollold.api.engine.tools import NO_ARGUMENTS, arguments_text, chosen_tools
from sollold.errors import Fault, Refusal
from sollold.models.model import Model

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
    conversation: Any = None
    prompt: Any = None
    truncation: str | None = None
    store: bool | None = None
    metadata: dict[str, Any] | None = None
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
        raise Refusal(
            Fault.BAD_REQUEST, "previous_response_id is not known here: send the whole conversation"
        )
    for name in ("conversation", "prompt"):
        if getattr(ask, name) is not None:
            raise Refusal(
                Fault.BAD_REQUEST, f"{name} is kept at OpenAI alone: send the whole input and instructions"
            )
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
    add_parameters(body, model)
    _tools(body, ask, model)
    wanted = _format(ask.text)
    if wanted is not None:
        body["response_format"] = wanted
    effort = (ask.reasoning or {}).get("effort")
    if effort is not None:
        if not isinstance(effort, str):
            raise Refusal(Fault.BAD_REQUEST, "reasoning.effort must be a string")
        body["reasoning_effort"] = effort
    body["stream"] = True
    body["stream_options"] = {"include_usage": True}
    return normalize_chat(body)


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
    first = [{"role": "system", "content": system}] if system else []
    return [*first, *own_messages(model), *messages[rest:]]


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
        elif isinstance(kind, str) and kind.endswith("_call"):
            if "call_id" in item or kind == "function_call":
                _add_call(messages, item, thought)
                thought = []
        elif isinstance(kind, str) and kind.endswith("_call_output"):
            messages.append(_result(item, model))
        elif kind not in _UNREADABLE and not str(kind).startswith("mcp_"):
            raise Refusal(Fault.BAD_REQUEST, f"unsupported input item of type {str(kind)[:40]!r}")
    return messages


_UNREADABLE = ("compaction", "compaction_summary", "item_reference")
"""Items whose content only OpenAI can read. Calls without a ``call_id`` ran there, too."""


def _message(item: dict[str, Any], model: Model) -> dict[str, Any]:
    role = item.get("role")
    if role not in ("user", "assistant", "system", "developer"):
        raise Refusal(Fault.BAD_REQUEST, f"unknown role {str(role)[:40]!r}")
    return {"role": role, "content": _content(item.get("content"), model)}


def _content(content: object, model: Model) -> str | list[dict[str, Any]]:
    """A content's parts; text alone as a text, which every template knows."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise Refusal(Fault.BAD_REQUEST, "a message's content is a text or a list of parts")
    parts: list[dict[str, Any]] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("text") if isinstance(part, dict) else None
        if kind == "refusal" and isinstance(part, dict):
            text = part.get("refusal")
        if kind in ("input_text", "output_text", "text", "summary_text", "refusal") and isinstance(text, str):
            parts.append({"type": "text", "text": text})
        elif kind == "input_image" and part.get("image_url"):
            need(model, "vision", "images")
            parts.append(image_url_part(part["image_url"]))
        else:
            raise Refusal(Fault.BAD_REQUEST, f"unsupported content part of type {str(kind)[:40]!r}")
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
    kind = str(item.get("type"))
    id_, name = item.get("call_id") or item.get("id"), item.get("name", kind.removesuffix("_call"))
    if not isinstance(id_, str) or not isinstance(name, str) or name == "function":
        raise Refusal(Fault.BAD_REQUEST, f"a {kind} needs a call_id and a name")
    if kind == "custom_tool_call":
        arguments = msgspec.json.encode({"input": item.get("input") or ""}).decode()
    elif kind == "function_call":
        arguments = arguments_text(item.get("arguments"))
    else:
        arguments = arguments_text(item.get("action") or item.get("operation"))
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    if thought:
        messages[-1]["reasoning_content"] = "".join(thought)
    call = {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}}
    messages[-1].setdefault("tool_calls", []).append(call)


def _result(item: dict[str, Any], model: Model) -> dict[str, Any]:
    id_ = item.get("call_id")
    if not isinstance(id_, str):
        raise Refusal(Fault.BAD_REQUEST, f"a {item.get('type')} needs a call_id")
    output = item.get("output") or ""
    if not isinstance(output, (str, list)):
        output = msgspec.json.encode(output).decode()
    return {"role": "tool", "tool_call_id": id_, "content": _content(output, model)}


_OWN_TOOLS = ("function", "custom")
_ONE_TEXT: dict[str, Any] = {
    "type": "object",
    "properties": {"input": {"type": "string"}},
    "required": ["input"],
}
"""The schema of a custom tool, whose input is a text; a grammar for it is not enforced."""


def custom_tools(ask: ResponseAsk) -> frozenset[str]:
    """The names of the caller's custom tools."""
    return frozenset(str(tool.get("name")) for tool in ask.tools or () if tool.get("type") == "custom")


def response_warnings(ask: ResponseAsk) -> tuple[str, ...]:
    """What of a request has no effect here."""
    elsewhere = sorted({str(tool.get("type"))[:40] for tool in ask.tools or ()} - {*_OWN_TOOLS})
    found = [f"tools of type {', '.join(elsewhere)} run at OpenAI and are left out"] if elsewhere else []
    if any("format" in tool for tool in ask.tools or () if tool.get("type") == "custom"):
        found.append("the grammar of a custom tool is not enforced")
    kinds = {str(item.get("type")) for item in ask.input} if isinstance(ask.input, list) else set()
    if kinds & {*_UNREADABLE}:
        found.append("a compaction can only be read by OpenAI and is left out")
    if any(kind.startswith("mcp_") for kind in kinds):
        found.append("what a server of tools (mcp) said at OpenAI is left out")
    return tuple(found)


def _tools(body: dict[str, Any], ask: ResponseAsk, model: Model) -> None:
    """The caller's own tools; others (``web_search``) run at OpenAI, and the model is not told of them.

    Agents (Codex) offer them in every request. Only who must have one is refused.
    """
    offered = [tool for tool in ask.tools or () if tool.get("type") in _OWN_TOOLS]
    if not offered:
        if ask.tools and ask.tool_choice not in (None, "auto", "none"):
            raise Refusal(
                Fault.BAD_REQUEST,
                "tool_choice requires a tool, but only your own functions can be called here; "
                f"the tools are {', '.join(sorted({str(tool.get('type'))[:40] for tool in ask.tools}))}",
            )
        return
    need(model, "tools", "tools")
    tools: list[dict[str, Any]] = []
    for tool in offered:
        if isinstance(tool.get("function"), dict):
            # As in a chat.
            tool = {**tool["function"], "type": tool["type"]}
        name = tool.get("name")
        if not isinstance(name, str):
            raise Refusal(Fault.BAD_REQUEST, f"a tool of type '{tool['type']}' needs a name")
        function: dict[str, Any] = {"name": name, "description": str(tool.get("description") or "")}
        custom = tool["type"] == "custom"
        function["parameters"] = _ONE_TEXT if custom else tool.get("parameters") or NO_ARGUMENTS
        tools.append({"type": "function", "function": function})
    choice: object = ask.tool_choice or "auto"
    if isinstance(choice, dict):
        choice, names = chosen_tools(choice)
        tools = [tool for tool in tools if tool["function"]["name"] in names]
        if not tools:
            named = ", ".join(repr(str(name)[:60]) for name in names)
            raise Refusal(Fault.BAD_REQUEST, f"tool_choice names {named}, which is not among the tools")
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
    named = {"name": "answer", "schema": schema, "strict": wanted.get("strict") is True}
    return {"type": "json_schema", "json_schema": named}
