"""What Ollama's ``create`` asks for, as far as it can be had without an Ollama. Pure.

A model made ``from`` another one, with a system text, parameters or a licence of its own, is that one under
a second name. New weights, adapters or a template of Ollama's make an Ollama necessary.
"""

from __future__ import annotations

from typing import Any

import msgspec

from sollold.api.ollama_request import parse_options, require_model
from sollold.models.model import Model
from sollold.models.own_models import Told
from sollold.serving.ask import Fault, Refusal


class Create(msgspec.Struct, kw_only=True, rename={"base": "from"}):
    """``POST /api/create``. ``base`` is ``from``."""

    model: str = ""
    name: str = ""
    base: str = ""
    system: str | None = None
    parameters: dict[str, Any] | None = None
    license: str | list[str] | None = None
    template: str | None = None
    messages: list[Any] | None = None
    files: dict[str, str] | None = None
    adapters: dict[str, str] | None = None
    quantize: str | None = None
    modelfile: str | None = None
    stream: bool | None = None

    @property
    def renames(self) -> bool:
        """Whether it asks for nothing but what a second name can say."""
        more = (self.template, self.messages, self.files, self.adapters, self.quantize, self.modelfile)
        return bool(self.base) and not any(more)

    @property
    def needed(self) -> str:
        """The model it is made from.

        Raises:
            Refusal: BAD_REQUEST.
        """
        return require_model(self.base)


def told(create: Create, base: Model) -> Told:
    """What the second name says otherwise than ``base``.

    Raises:
        Refusal: BAD_REQUEST for a parameter of a wrong type.
    """
    params = None
    if create.parameters:
        parse_options(create.parameters, None)
        try:
            before = msgspec.json.decode(base.params, type=dict[str, Any])
        except msgspec.MsgspecError:
            before = {}
        params = msgspec.json.encode({**before, **create.parameters}).decode()
        if len(params) > _LONGEST:
            raise Refusal(Fault.BAD_REQUEST, f"the parameters are longer than {_LONGEST} characters")
    if create.system is not None and len(create.system) > _LONGEST:
        raise Refusal(Fault.BAD_REQUEST, f"the system text is longer than {_LONGEST} characters")
    licence = create.license
    return Told(create.system, params, "\n".join(licence) if isinstance(licence, list) else licence)


_LONGEST = 100_000
"""Characters of a text that every node keeps and tells the others."""
