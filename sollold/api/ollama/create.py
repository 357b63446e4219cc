"""Requests of Ollama's ``create``, as far as they need no Ollama. Pure.

A model made ``from`` another one, with its own template, system prompt, messages, parameters or licence, is
that model under a second name. New weights and adapters need an Ollama.
"""

from __future__ import annotations

from typing import Any

import msgspec

from sollold.api.engine.fields import require_model
from sollold.api.engine.modelfile import with_parameters
from sollold.api.ollama.request import Message, parse_options
from sollold.control.local_models import NameOverrides
from sollold.errors import bad_request
from sollold.models.model import Model
from sollold.models.templates.jinja import untranslatable


class Create(msgspec.Struct, kw_only=True, rename={"base": "from"}):
    """``POST /api/create``. ``base`` is ``from``."""

    model: str = ""
    name: str = ""
    base: str = ""
    system: str | None = None
    parameters: dict[str, Any] | None = None
    license: str | list[str] | None = None
    template: str | None = None
    messages: list[Message] | None = None
    files: dict[str, str] | None = None
    adapters: dict[str, str] | None = None
    quantize: str | None = None
    modelfile: str | None = None
    stream: bool | None = None

    @property
    def renames(self) -> bool:
        """Whether a second name can express the whole request."""
        weights = (self.files, self.adapters, self.quantize)
        return bool(self.base) and not any(weights)

    @property
    def needed(self) -> str:
        """Name of the base model.

        Raises:
            Refusal: BAD_REQUEST.
        """
        return require_model(self.base, "from")


def name_overrides(create: Create, base: Model) -> NameOverrides:
    """Return the settings in which the second name differs from ``base``.

    Raises:
        Refusal: BAD_REQUEST for a parameter of a wrong type, a template that can't be translated for
            llama.cpp, an unknown role, or a text that is too long.
    """
    params = None
    if create.parameters:
        parse_options(create.parameters, None)
        params = with_parameters(base, create.parameters)
        if len(params) > _MAX_CHARACTERS:
            raise bad_request(f"the parameters are longer than {_MAX_CHARACTERS} characters")
    messages = tuple((message.role, message.content or "") for message in create.messages or ())
    for label, length in (
        ("system prompt", len(create.system or "")),
        ("template", len(create.template or "")),
        ("text of the messages", sum(len(content) for _, content in messages)),
    ):
        if length > _MAX_CHARACTERS:
            raise bad_request(f"the {label} is longer than {_MAX_CHARACTERS} characters")
    if any(role not in _ROLES for role, _ in messages):
        raise bad_request(f"a message's role must be one of {', '.join(_ROLES)}")
    if reason := untranslatable(create.template or ""):
        raise bad_request(f"the template can't be used without an Ollama: {reason}")
    licence = create.license
    return NameOverrides(
        create.system or None,
        params,
        ("\n".join(licence) if isinstance(licence, list) else licence) or None,
        create.template or None,
        messages or None,
    )


_MAX_CHARACTERS = 100_000
"""Maximum length of a text, in characters; every node stores it and sends it to the others."""
_ROLES = ("system", "user", "assistant")
