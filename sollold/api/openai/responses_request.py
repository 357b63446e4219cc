"""Converts requests of OpenAI's ``/v1/responses`` to those of ``/v1/chat/completions``. Pure.

That is the only form in which an answer can be resumed after a fault.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import msgspec

from sollold.api.engine.conversation import join_contents
from sollold.api.engine.fields import require_capability
from sollold.api.engine.ignored_fields import CACHE_PARTS, OF_THE_CALLER, ignored_fields, ignored_parts
from sollold.api.engine.left_out import file_part
from sollold.api.engine.messages import image_url_part, link_tool_results, result_image_part
from sollold.api.engine.modelfile import add_parameters, own_messages
from sollold.api.engine.prepare import normalize_chat
from sollold.api.engine.sealed_thought import unsealed
from sollold.api.engine.tools import arguments_text
from sollold.api.openai.responses_ask import ResponseAsk
from sollold.api.openai.responses_tools import (
    SEARCH,
    add_tools,
    brought_names,
    full_name,
    tool_warnings,
)
from sollold.errors import bad_request
from sollold.models.model import Model

Message = dict[str, Any]


def response_body(ask: ResponseAsk, model: Model) -> dict[str, Any]:
    """Return the body for ``/v1/chat/completions``, always streamed: a whole answer is assembled here.

    Raises:
        Refusal: BAD_REQUEST.
    """
    ask = ask.configured()
    if not ask.input:
        raise bad_request("input is required: a string or a list of items", field="input")
    if ask.previous_response_id:
        raise bad_request(
            "previous_response_id is not supported here: send the whole conversation",
            field="previous_response_id",
        )
    for name in ("conversation", "prompt"):
        if getattr(ask, name) is not None:
            message = f"{name} is stored only by OpenAI: send the whole input and instructions"
            raise bad_request(message, field=name)
    if ask.background:
        raise bad_request(
            "background is not supported: wait for the answer, or stream it", field="background"
        )
    if ask.truncation not in (None, "auto", "disabled"):
        raise bad_request("truncation must be auto or disabled", field="truncation")
    messages = _with_instructions(input_messages(ask.input, model), ask.instructions, model)
    body: dict[str, Any] = {"model": model.name, "messages": messages}
    for attribute, field in (
        ("max_output_tokens", "max_tokens"),
        ("temperature", "temperature"),
        ("top_p", "top_p"),
        ("parallel_tool_calls", "parallel_tool_calls"),
    ):
        value = getattr(ask, attribute)
        if value is not None:
            body[field] = value
    if ask.alternatives is not None:
        # llama-server takes 0 for no probabilities at all.
        body |= {"logprobs": True, "top_logprobs": max(1, ask.alternatives)}
    add_parameters(body, model)
    add_tools(body, ask, model)
    format_ = _format(ask.text)
    if format_ is not None:
        body["response_format"] = format_
    effort = (ask.reasoning or {}).get("effort")
    if effort is not None:
        if not isinstance(effort, str):
            raise bad_request("reasoning.effort must be a string")
        body["reasoning_effort"] = effort
    body["stream"] = True
    body["stream_options"] = {"include_usage": True}
    return normalize_chat(body)


_SYSTEM = ("system", "developer")


def _with_instructions(messages: list[Message], instructions: str | None, model: Model) -> list[Message]:
    """Return ``messages`` with the instructions and the leading system or developer messages merged into one.

    Agents (Codex) send both. Templates expect one system message, the first: some fail at a second, others
    drop it.
    """
    texts = [instructions] if instructions else []
    count = 0
    for message in messages:
        if message["role"] not in _SYSTEM or not isinstance(message["content"], str):
            break
        texts.append(message["content"])
        count += 1
    if not texts and model.system and not any(message["role"] in _SYSTEM for message in messages):
        texts = [model.system]
    system = "\n\n".join(text for text in texts if text)
    first = [{"role": "system", "content": system}] if system else []
    return [*first, *own_messages(model), *messages[count:]]


def input_messages(source: str | list[dict[str, Any]], model: Model) -> list[Message]:
    """Return the items of an input as messages of a chat.

    Raises:
        Refusal: BAD_REQUEST.
    """
    if isinstance(source, str):
        return [{"role": "user", "content": source}]
    messages: list[Message] = []
    thoughts: list[str] = []
    for item in source:
        kind = item.get("type") or "message"
        if kind == "message":
            message = _message(item, model)
            if message["role"] == "assistant":
                # After a call it belongs to the call's message, which the results must follow.
                if not (messages and messages[-1].get("tool_calls")):
                    messages.append({**message, "content": []})
                messages[-1]["content"].append(message["content"])
                _add_thoughts(messages[-1], thoughts)
            else:
                messages.append(message)
            thoughts = []
        elif kind == "agent_message":
            # A task for an agent, from the agent that started it.
            messages.append({"role": "user", "content": _content(item.get("content"), model)})
        elif kind == "reasoning":
            thoughts += _thoughts(item)
        elif kind == "tool_search_output":
            messages += _search_result(item)
        elif isinstance(kind, str) and kind.endswith("_call"):
            if _ran_at_caller(item, kind):
                _add_call(messages, item, thoughts)
                thoughts = []
        elif isinstance(kind, str) and kind.endswith("_call_output"):
            messages.append(_result(item, model))
    if not messages:
        kinds = ", ".join(repr(str(item.get("type"))[:40]) for item in source[:5])
        raise bad_request(f"input has no message, only items of type {kinds}")
    for message in messages:
        if message["role"] == "assistant":
            # Joined once, since each join copies.
            message["content"] = join_contents(*message["content"])
            if "reasoning_content" in message:
                message["reasoning_content"] = "\n\n".join(message["reasoning_content"])
    if any(message["role"] == "tool" and "tool_call_id" not in message for message in messages):
        return link_tool_results(messages)
    return messages


_RESPONSE_FIELDS = ("input", "instructions", "include", "text", "truncation", "max_output_tokens")
"""Fields that a chat completion does not have."""


def input_as_chat(body: dict[str, Any], model: Model) -> dict[str, Any]:
    """Return a chat's body with its ``input`` as messages: Cursor sends a body of ``/v1/responses`` there.

    Raises:
        Refusal: BAD_REQUEST if the input is invalid.
    """
    value = body["input"]
    if not isinstance(value, str | list):
        return body
    items = [item for item in value if isinstance(item, dict)] if isinstance(value, list) else value
    messages = input_messages(items, model)
    instructions = body.get("instructions")
    if isinstance(instructions, str) and instructions:
        messages.insert(0, {"role": "system", "content": instructions})
    chat = {key: value for key, value in body.items() if key not in _RESPONSE_FIELDS}
    if body.get("max_output_tokens") is not None:
        chat.setdefault("max_completion_tokens", body["max_output_tokens"])
    return {**chat, "messages": messages}


def _add_thoughts(message: Message, thoughts: list[str]) -> None:
    """Add the thinking before an item to the assistant's message that contains the item."""
    if thoughts:
        message.setdefault("reasoning_content", []).append("".join(thoughts))


def _ran_at_caller(item: dict[str, Any], kind: str) -> bool:
    """Whether a call ran at the caller.

    Calls without a ``call_id`` ran at OpenAI, as did a search unless it says that the client executed it.
    """
    if kind == f"{SEARCH}_call":
        return item.get("execution") == "client"
    return "call_id" in item or kind == "function_call"


def _kinds_run_at_openai(ask: ResponseAsk) -> list[str]:
    """Return the kinds of calls in the input that did not run at the caller, except searches for tools."""
    kinds = set()
    for item in ask.input if isinstance(ask.input, list) else ():
        kind = str(item.get("type"))
        is_other = kind.startswith(("mcp_", SEARCH)) or not kind.endswith("_call")
        if not is_other and not _ran_at_caller(item, kind):
            kinds.add(kind[:40])
    return sorted(kinds)


def _search_result(item: dict[str, Any]) -> list[Message]:
    """Return the result of a search for tools that the caller executed."""
    if item.get("execution") != "client" or not isinstance(item.get("call_id"), str):
        return []
    names = ", ".join(brought_names(item))
    text = f"These tools can be called now: {names}" if names else "No tools were found."
    return [{"role": "tool", "tool_call_id": item["call_id"], "content": text}]


_UNREADABLE = ("compaction", "compaction_summary", "context_compaction", "item_reference")
"""Items whose content only OpenAI can read."""
_SUPPORTED = (
    *("message", "agent_message", "reasoning", "tool_search_output", "additional_tools"),
    *("configuration_update", "None"),
)


def _message(item: dict[str, Any], model: Model) -> dict[str, Any]:
    role = item.get("role")
    if role not in ("user", "assistant", "system", "developer"):
        raise bad_request(f"unknown role {str(role)[:40]!r}")
    return {"role": role, "content": _content(item.get("content"), model)}


def _content(content: object, model: Model, *, result: bool = False) -> str | list[dict[str, Any]]:
    """Return content as parts, or as a string if it is all text, which every template supports.

    ``result``: whether it is the result of a tool.
    """
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise bad_request("a message's content must be a string or a list of parts")
    parts: list[dict[str, Any]] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("text") if isinstance(part, dict) else None
        if kind == "refusal" and isinstance(part, dict):
            text = part.get("refusal")
        if kind in ("input_text", "output_text", "text", "summary_text", "refusal") and isinstance(text, str):
            parts.append({"type": "text", "text": text})
        elif kind == "input_image" and part.get("image_url"):
            if not result:
                require_capability(model, "vision", "images")
            parts.append(result_image_part(partial(image_url_part, part["image_url"]), model))
        elif kind == "input_file":
            parts.append(file_part(part))
        elif kind == "input_image":
            raise bad_request("an input_image needs an image_url: only OpenAI stores files by id")
        elif kind == "encrypted_content" and isinstance(part, dict):
            parts += _readable(part.get("encrypted_content"))
        else:
            raise bad_request(f"unsupported content part of type {str(kind)[:40]!r}")
    if all(part["type"] == "text" for part in parts):
        return "".join(part["text"] for part in parts)
    return parts


_OPAQUE = re.compile(r"gAAAA[A-Za-z0-9_=-]{40,}\s*")
"""Data encrypted by OpenAI."""


def _readable(content: object) -> list[dict[str, Any]]:
    """Return an agent's message to another agent: OpenAI encrypts it, elsewhere it is plain text."""
    if not isinstance(content, str) or _OPAQUE.fullmatch(content):
        return []
    return [{"type": "text", "text": content}]


def _thoughts(item: dict[str, Any]) -> list[str]:
    """Return a model's thinking: in plain text, else as we sealed it, else its summary."""
    decoded = [{"text": unsealed(item.get("encrypted_content"))}]
    for parts in (item.get("content"), decoded, item.get("summary")):
        if parts is not None and not isinstance(parts, list):
            raise bad_request("the content and summary of a reasoning item must be lists of parts")
        texts = [part.get("text") for part in parts or () if isinstance(part, dict)]
        if found := [text for text in texts if isinstance(text, str) and text]:
            return found
    return []


def _add_call(messages: list[dict[str, Any]], item: dict[str, Any], thoughts: list[str]) -> None:
    """Add a call to the assistant's message before it: templates support calls only as part of one.

    The message's content and thinking are lists, see `input_messages`.
    """
    kind = str(item.get("type"))
    id_, name = item.get("call_id") or item.get("id"), item.get("name") or kind.removesuffix("_call")
    if not isinstance(id_, str) or not isinstance(name, str) or name == "function":
        raise bad_request(f"a {kind} needs a call_id and a name")
    if kind == "custom_tool_call":
        arguments = msgspec.json.encode({"input": item.get("input") or ""}).decode()
    elif kind in ("function_call", f"{SEARCH}_call"):
        arguments = arguments_text(item.get("arguments"))
    else:
        arguments = arguments_text(item.get("action") or item.get("operation"))
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": []})
    _add_thoughts(messages[-1], thoughts)
    function = {"name": full_name(item.get("namespace"), name), "arguments": arguments}
    call = {"id": id_, "type": "function", "function": function}
    messages[-1].setdefault("tool_calls", []).append(call)


def _result(item: dict[str, Any], model: Model) -> dict[str, Any]:
    kind, name = item.get("type"), item.get("name")
    output = item.get("output") or ("failed" if item.get("status") == "failed" else "")
    if isinstance(output, dict) and isinstance(output.get("image_url"), str):
        # A computer's screen.
        output = [{"type": "input_image", "image_url": output["image_url"]}]
    parts = output if isinstance(output, list) else ()
    if not isinstance(output, (str, list)) or any(
        not isinstance(part, dict) or "type" not in part for part in parts
    ):
        # For example a shell's: its output and the exit status of each command.
        output = msgspec.json.encode(output).decode()
    message = {"role": "tool", "content": _content(output, model, result=True)}
    # A local shell's result has only the id of its call; a function's may name the function instead.
    id_ = item.get("call_id") or (item.get("id") if kind == "local_shell_call_output" else None)
    if isinstance(id_, str):
        return {**message, "tool_call_id": id_}
    if not isinstance(name, str):
        raise bad_request(f"a {kind} needs a call_id or a name")
    return {**message, "name": full_name(item.get("namespace"), name)}


def _is_known(kind: str) -> bool:
    return kind.startswith("mcp_") or kind.endswith(("_call", "_call_output"))


_FIELDS = frozenset({*ResponseAsk.__struct_fields__, *OF_THE_CALLER, "stream_options"})
_PARTS = {
    "text": ("format",),
    "reasoning": ("effort", "summary"),
    "stream_options": ("include_obfuscation",),
    **CACHE_PARTS,
}
_INCLUDES = ("message.output_text.logprobs", "reasoning.encrypted_content")


def response_warnings(body: dict[str, Any], ask: ResponseAsk) -> tuple[str, ...]:
    """Return a warning for all that has no effect here; ``body``: the original request."""
    warnings = tool_warnings(ask)
    warnings += [*ignored_fields(body, _FIELDS), *ignored_parts(body, _PARTS)]
    warnings += [
        f"include {name[:60]} has no effect: only OpenAI provides it"
        for name in dict.fromkeys((ask.include or ())[:8])
        if name not in _INCLUDES
    ]
    if ask.top_logprobs and ask.alternatives is None:
        warnings.append(f"top_logprobs has no effect: include does not name {_INCLUDES[0]}")
    kinds = {str(item.get("type")) for item in ask.input} if isinstance(ask.input, list) else set()
    if elsewhere := _kinds_run_at_openai(ask):
        warnings.append(f"items of type {', '.join(elsewhere)} ran at OpenAI and are left out")
    if kinds & {*_UNREADABLE}:
        warnings.append("a compaction can only be read by OpenAI and is left out")
    if any(kind.startswith("mcp_") for kind in kinds):
        warnings.append("the output of MCP servers called by OpenAI is left out")
    unknown = sorted(kind[:40] for kind in kinds - {*_UNREADABLE, *_SUPPORTED} if not _is_known(kind))
    if unknown:
        warnings.append(f"items of type {', '.join(unknown)} are not supported and are left out")
    return tuple(warnings)


def _format(text: dict[str, Any] | None) -> dict[str, Any] | None:
    format_ = (text or {}).get("format")
    if format_ is None:
        return None
    kind = format_.get("type") if isinstance(format_, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "json_object"}
    schema = format_.get("schema") if isinstance(format_, dict) else None
    if kind != "json_schema" or not isinstance(schema, dict):
        raise bad_request("text.format must be text, json_object, or json_schema with a schema")
    json_schema = {"name": "answer", "schema": schema, "strict": format_.get("strict") is True}
    return {"type": "json_schema", "json_schema": json_schema}
