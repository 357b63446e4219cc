"""Builds request bodies from the arguments of Python calls. Pure."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from typing import Any

from sollold.client.arguments import check_count, check_model
from sollold.client.request_arguments import OPTIONS, GenerateArguments, fields_of


def request_body(
    model: str,
    *,
    priority: int | str | None = None,
    max_tokens: int | None = None,
    placement: Mapping[str, Any] | None = None,
    more: Mapping[str, Any] = {},
    arguments: type[Any] = GenerateArguments,
    **fields: Any,
) -> dict[str, Any]:
    """Build a body for ``/api/chat``, ``/api/generate`` or ``/api/embed``.

    Args:
        model: name of the model.
        priority: 1 to 10, or a name.
        max_tokens: maximum length of the answer (``num_predict``).
        placement: the router's wishes for a load.
        more: other keyword arguments: options and fields by name, or ``options`` as a mapping.
        arguments: the class in `sollold.client.request_arguments` with the permitted names.
        fields: further fields of the body; None is omitted.

    Raises:
        TypeError, ValueError: a keyword is neither an option nor a field, or its value is invalid.
    """
    check_model(model)
    permitted = fields_of(arguments)
    options = dict(more.get("options") or {})
    body: dict[str, Any] = {"model": model}
    for name, value in more.items():
        if name == "options":
            continue
        if name in OPTIONS:
            options[name] = value
        elif name in permitted:
            fields[name] = value
        else:
            raise TypeError(
                f"unexpected argument {name!r}: neither an option ({', '.join(sorted(OPTIONS))}) "
                f"nor a field ({', '.join(sorted(permitted))})"
            )
    if max_tokens is not None:
        if max_tokens != -1:
            # In Ollama 0 is no limit either.
            check_count("max_tokens", max_tokens, "None is no limit")
        options["num_predict"] = max_tokens
    if options:
        body["options"] = options
    if priority is not None:
        body["priority"] = priority if isinstance(priority, str) else int(priority)
    if placement:
        body["placement"] = dict(placement)
    body.update((name, value) for name, value in fields.items() if value is not None)
    return _with_pictures(body)


def checked_messages(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages of a conversation in the API's form.

    Raises:
        TypeError: not a list, or a message is not a mapping with a role.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Iterable):
        raise TypeError(f'messages must be a list of {{"role": "user", "content": "…"}}, not {messages!r}')
    checked = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise TypeError(
                f'messages[{index}] is {message!r}; it must be {{"role": "user", "content": "…"}} or like it'
            )
        checked.append(_with_pictures(dict(message)))
    return checked


def _with_pictures(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its ``images`` in base64; images may be given as bytes."""
    images = message.get("images")
    if isinstance(images, list | tuple):
        message["images"] = [
            base64.b64encode(image).decode() if isinstance(image, bytes | bytearray | memoryview) else image
            for image in images
        ]
    return message
