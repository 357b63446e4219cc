"""The bodies of requests from the arguments of the Python calls. Pure."""

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
    """A body for ``/api/chat``, ``/api/generate`` or ``/api/embed``.

    Args:
        model: its name.
        priority: 1 to 10, or a name.
        max_tokens: of the answer at most (``num_predict``).
        placement: what the router wants of a load.
        more: other arguments: options and fields by their names; ``options``: a mapping of options.
        arguments: what the request may name, of `sollold.client.request_arguments`.
        fields: of the body; None is left out.

    Raises:
        TypeError, ValueError: an argument is neither an option nor a field, or not what it must be.
    """
    check_model(model)
    known = fields_of(arguments)
    given = dict(more.get("options") or {})
    body: dict[str, Any] = {"model": model}
    for name, value in more.items():
        if name == "options":
            continue
        if name in OPTIONS:
            given[name] = value
        elif name in known:
            fields[name] = value
        else:
            raise TypeError(
                f"unexpected argument {name!r}: neither an option ({', '.join(sorted(OPTIONS))}) "
                f"nor a field ({', '.join(sorted(known))})"
            )
    if max_tokens is not None:
        if max_tokens != -1:
            # In Ollama 0 is no limit either.
            check_count("max_tokens", max_tokens, "None is no limit")
        given["num_predict"] = max_tokens
    if given:
        body["options"] = given
    if priority is not None:
        body["priority"] = priority if isinstance(priority, str) else int(priority)
    if placement:
        body["placement"] = dict(placement)
    body.update((name, value) for name, value in fields.items() if value is not None)
    return _with_pictures(body)


def checked_messages(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages of a conversation as the API takes them.

    Raises:
        TypeError: they are no list, or one is no mapping with a role.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Iterable):
        raise TypeError(f'messages must be a list of {{"role": "user", "content": "…"}}, not {messages!r}')
    checked = []
    for place, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise TypeError(
                f'messages[{place}] is {message!r}; it must be {{"role": "user", "content": "…"}} or like it'
            )
        checked.append(_with_pictures(dict(message)))
    return checked


def _with_pictures(given: dict[str, Any]) -> dict[str, Any]:
    """Its ``images`` in base64, also those given as the bytes of a file."""
    images = given.get("images")
    if isinstance(images, list | tuple):
        given["images"] = [
            base64.b64encode(one).decode() if isinstance(one, bytes | bytearray | memoryview) else one
            for one in images
        ]
    return given
