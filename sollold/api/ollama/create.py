"""What Ollama's ``create`` asks for, as far as it can be had without an Ollama. Pure.

A model made ``from`` another one, with a template, a system text, messages, parameters or a licence of its
own, is that one under a second name. New weights and adapters make an Ollama necessary.
"""

from __future__ import annotations

from typing import Any

import msgspec

from sollold.api.engine.fields import require_model
from sollold.api.engine.modelfile import with_parameters
from sollold.api.ollama.request import Message, parse_options
from sollold.control.local_models import NameOverrides
from sollold.errors import Fault, Refusal
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
        """Whether it asks for nothing but what a second name can say."""
        more = (self.files, self.adapters, self.quantize)
        return bool(self.base) and not any(more)

    @property
    def needed(self) -> str:
        """The model it is made from.

        Raises:
            Refusal: BAD_REQUEST.
        """
        return require_model(self.base, "from")


def told(create: Create, base: Model) -> NameOverrides:
    """What the second name says otherwise than ``base``.

    Raises:
        Refusal: BAD_REQUEST for a parameter of a wrong type, a template that llama.cpp can't be given, a role
            that is none.
    """
    params = None
    if create.parameters:
        parse_options(create.parameters, None)
        params = with_parameters(base, create.parameters)
        if len(params) > _LONGEST:
            raise Refusal(Fault.BAD_REQUEST, f"the parameters are longer than {_LONGEST} characters")
    messages = tuple((one.role, one.content or "") for one in create.messages or ())
    for what, length in (
        ("system text", len(create.system or "")),
        ("template", len(create.template or "")),
        ("text of the messages", sum(len(content) for _, content in messages)),
    ):
        if length > _LONGEST:
            raise Refusal(Fault.BAD_REQUEST, f"the {what} is longer than {_LONGEST} characters")
    if any(role not in _ROLES for role, _ in messages):
        raise Refusal(Fault.BAD_REQUEST, f"a message's role must be one of {', '.join(_ROLES)}")
    if why := untranslatable(create.template or ""):
        raise Refusal(Fault.BAD_REQUEST, f"the template can't be used without an Ollama: {why}")
    licence = create.license
    return NameOverrides(
        create.system or None,
        params,
        ("\n".join(licence) if isinstance(licence, list) else licence) or None,
        create.template or None,
        messages or None,
    )


_LONGEST = 100_000
"""Characters of a text that every node keeps and tells the others."""
_ROLES = ("system", "user", "assistant")
