"""A GPU for all but the experts of the first layers, which stay with the head's processor.

Of a mixture of experts a token reads few, but all have to lie somewhere: in RAM they cost little time, while
attention, its cache and what every token reads stay on the GPU.
"""

from __future__ import annotations

from sollold.placement import speed
from sollold.placement.draft import Draft, draft
from sollold.placement.fleet import Machine, Spot
from sollold.placement.rung import Rung


def experts_on_host(rung: Rung, head: Machine, gpu: Spot) -> Draft | None:
    """The placement with as few layers' experts in the head's RAM as must be; None: it does not fit so."""
    footprint = rung.footprint
    if head.cpu is None or not any(footprint.experts):
        return None

    def made(layers: int) -> Draft:
        links = {head.node: speed.LOOPBACK}
        holds = [(gpu, 0, rung.total)]
        return draft(
            head, footprint, rung.run, 0, holds, links, rung.correction, rung.density, cpu_moe=layers
        )

    def too_much(one: Draft) -> bool:
        """Whether the GPU holds too much still."""
        return any(short.device == gpu.device for short in one.short)

    low, high = 0, footprint.layers
    if too_much(made(high)):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if too_much(made(middle)) else (low, middle)
    best = made(high)
    return None if best.short else best
