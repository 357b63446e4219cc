"""The request field ``placement``: the caller's wishes for the placement of the model."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from aiohttp import web

from sollold.api.engine.fields import CallerFields, require_model
from sollold.api.engine.number_ranges import Small
from sollold.api.http.access import client_of, require
from sollold.api.http.services import AppServices
from sollold.control.keys import Scope
from sollold.errors import bad_request
from sollold.leader.wish import PlacementWish
from sollold.models.listing import Listed
from sollold.placement.request import MOST_DEVICES, normalised_speculation
from sollold.settings.schema import Speculate

PolicyName = Literal["", "fastest", "memory_aware", "even", "spread"]

_Workers = Annotated[int, msgspec.Meta(ge=0, le=MOST_DEVICES)]
_Billions = Annotated[float, msgspec.Meta(ge=0)]


class PlacementBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Overrides the settings of ``[placement]`` for this request; null keeps the setting.

    ``workers``: maximum machines besides the head; ``distributed``: whether the model may be spread over
    machines; ``threshold``: billions of parameters from which it must be, 0 for never; ``external``:
    addresses of the external workers that may be used; ``speculation``: how tokens are drafted; ``file``: a
    GGUF file on this machine, instead of the model's name.
    """

    workers: _Workers | None = None
    distributed: bool | None = None
    threshold: _Billions | None = None
    policy: PolicyName | None = None
    external: Annotated[list[str], msgspec.Meta(max_length=MOST_DEVICES)] | None = None
    speculation: Speculate | None = None
    file: str = ""

    def wish(self, policy: str = "", speculation: str = "") -> PlacementWish:
        """Return the wish for the leader; ``policy``, ``speculation``: defaults where the body has none.

        The file is not included, since only this node reads it.
        """
        external = tuple(self.external) if self.external is not None else None
        return PlacementWish(
            self.workers,
            self.distributed,
            self.threshold,
            self.policy or policy,
            external,
            normalised_speculation(self.speculation or speculation),
        )


class PlacedFields(CallerFields, kw_only=True):
    """`CallerFields`, with the model and the wishes for its placement."""

    model: str = ""
    placement: PlacementBody | None = None


class V1Fields(PlacedFields, kw_only=True):
    """`PlacedFields`, with the context to load the model with, for which ``/v1`` has no options."""

    num_ctx: Small | None = None


async def prepare_placement(
    request: web.Request, services: AppServices, placement: PlacementBody | None
) -> str:
    """Register a request's file and external workers. Return the file's model; empty if there is no file.

    Raises:
        Refusal: BAD_REQUEST, also for a file named by a caller on another machine, and for workers that no
            node knows if the caller lacks the scope for them, since this node would connect to them.
    """
    if placement is None:
        return ""
    if placement.external:
        _check_external(request, services, placement.external)
        await services.cluster.use_external(placement.external)
    if not placement.file:
        return ""
    if not client_of(request).local:
        message = "placement.file: a file is only accepted from callers on the node's own machine"
        raise bad_request(message, status=403)
    return await services.library.add_file(placement.file)


async def find_placed(
    request: web.Request, services: AppServices, placement: PlacementBody | None, model: str
) -> Listed:
    """Return the model in the file that ``placement`` names, else the one named ``model``.

    Raises:
        Refusal: as `prepare_placement`; NOT_FOUND, AMBIGUOUS, BAD_REQUEST if there is no such model.
    """
    name = await prepare_placement(request, services, placement) or model
    return await services.library.find(require_model(name))


def _check_external(request: web.Request, services: AppServices, addresses: list[str]) -> None:
    known = {address.address for record in services.cluster.live() for address in record.plain}
    for address in addresses:
        if address not in known:
            require(request, Scope.MODELS, f"naming {address[:100]!r}, a worker that no node knows,")
