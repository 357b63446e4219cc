"""The fields of a deployment's endpoint that depend only on its plan, computed once. Pure."""

from __future__ import annotations

from sollold.cluster.gossip.record import Backend, Placed
from sollold.engines.llamacpp.command_line import external_workers
from sollold.facts import dataclass
from sollold.models.templates.jinja import fingerprint
from sollold.placement.plan import Plan


@dataclass(frozen=True, slots=True)
class FixedFields:
    """Fields of an `Endpoint` that never change."""

    backend: Backend
    bytes: int
    placed: tuple[Placed, ...]
    template: str


def planned(plan: Plan) -> FixedFields:
    """Return the fixed fields of the endpoint of ``plan``."""
    shares = [share for share in (plan.host, *plan.shares) if share.layers or share is plan.host]
    several = len({share.node for share in shares}) > 1 or external_workers(plan)
    return FixedFields(
        Backend.SHARDED if several else Backend.LOCAL,
        sum(sum(devices.values()) for devices in plan.bytes_by_owner().values()),
        tuple(Placed(share.node, share.device, share.first, share.last, share.total) for share in shares),
        fingerprint(plan.template),
    )
