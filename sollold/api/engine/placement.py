"""The field ``placement`` of a request: how its caller wants the model placed."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from aiohttp import web

from sollold.api.engine.fields import require_model
from sollold.api.http.access import client_of, require
from sollold.api.http.body import as_type
from sollold.api.http.services import AppServices
from sollold.control.keys import Scope
from sollold.errors import Fault, Refusal
from sollold.leader.wish import PlacementWish
from sollold.models.listing import Listed
from sollold.placement.request import MOST_DEVICES, normalised_speculation
from sollold.settings.schema import Speculate

PolicyName = Literal["", "fastest", "memory_aware", "even", "spread"]

_Workers = Annotated[int, msgspec.Meta(ge=0, le=MOST_DEVICES)]
_Billions = Annotated[float, msgspec.Meta(ge=0)]


class PlacementBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Overrides the settings of ``[placement]`` for this request; null: as they say.

    ``workers``: machines besides the head at most; ``distributed``: it may be spread over machines;
    ``threshold``: billions of parameters from which it must be, 0: never; ``external``: addresses of the
    external workers that may be used; ``speculation``: how tokens are drafted; ``file``: a GGUF file on this
    machine, instead of the model's name.
    """

    workers: _Workers | None = None
    distributed: bool | None = None
    threshold: _Billions | None = None
    policy: PolicyName | None = None
    external: Annotated[list[str], msgspec.Meta(max_length=MOST_DEVICES)] | None = None
    speculation: Speculate | None = None
    file: str = ""

    def wish(self, policy: str = "", speculation: str = "") -> PlacementWish:
        """What the leader is told; ``policy``, ``speculation``: where it names none itself. The file is not
        in it: only this node reads that."""
        external = tuple(self.external) if self.external is not None else None
        return PlacementWish(
            self.workers,
            self.distributed,
            self.threshold,
            self.policy or policy,
            external,
            normalised_speculation(self.speculation or speculation),
        )


async def prepare_placement(
    request: web.Request, services: AppServices, placement: PlacementBody | None
) -> str:
    """Make known what a request names: its file and its external workers. The file's model; empty: no file.

    Raises:
        Refusal: BAD_REQUEST, also for a file that a caller of another machine names, and for workers that no
            node knows when the caller may give no orders: this node connects to what is named.
    """
    if placement is None:
        return ""
    if placement.external:
        _check_external(request, services, placement.external)
        await services.cluster.use_external(placement.external)
    if not placement.file:
        return ""
    if not client_of(request).local:
        message = "placement.file: a file is only taken from callers on the node's own machine"
        raise Refusal(Fault.BAD_REQUEST, message, status=403)
    return await services.library.add_file(placement.file)


async def find_placed(
    request: web.Request, services: AppServices, placement: PlacementBody | None, model: str
) -> Listed:
    """The model in the file that ``placement`` names, else the one of the name ``model``.

    Raises:
        Refusal: as `prepare_placement`; NOT_FOUND, AMBIGUOUS, BAD_REQUEST when there is no such model.
    """
    name = await prepare_placement(request, services, placement) or model
    return await services.library.find(require_model(name))


def _check_external(request: web.Request, services: AppServices, addresses: list[str]) -> None:
    known = {one.address for record in services.cluster.live() for one in record.plain}
    for address in addresses:
        if address not in known:
            require(request, Scope.MODELS, f"naming {address[:100]!r}, a worker that no node knows,")


class _Placed(msgspec.Struct):
    """A request of which only its placement is read."""

    placement: PlacementBody | None = None


def placement_of(body: dict[str, Any]) -> PlacementBody | None:
    """The field in ``body``, which has it.

    Raises:
        Refusal: BAD_REQUEST.
    """
    return as_type({"placement": body["placement"]}, _Placed).placement
