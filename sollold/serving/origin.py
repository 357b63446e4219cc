"""Where an answer comes from, in words for its caller."""

from __future__ import annotations

from collections.abc import Iterable

from sollold.cluster.record import Endpoint, Record
from sollold.serving.ask import Routing
from sollold.serving.router import engine_of


def routing_of(model: str, record: Record, endpoint: Endpoint, records: Iterable[Record]) -> Routing:
    """The routing for an endpoint of ``record``'s node; ``records`` give the other nodes their names."""
    names = {other.node: other.name or other.node for other in records}
    address = record.addresses[0] if record.addresses else "127.0.0.1"
    return Routing(
        backend=endpoint.backend,
        engine=engine_of(endpoint),
        model=model,
        node=record.name or record.node,
        coordinator_url=f"http://{f'[{address}]' if ':' in address else address}:{record.http_port}",
        devices=tuple(
            f"{names.get(placed.node, placed.node)}/{placed.device}"
            for placed in endpoint.placed
            if placed.last > placed.first
        ),
    )
