"""A GPU for all but the experts of the first layers, which stay with the head's processor.

Of a mixture of experts a token reads few, but all have to lie somewhere: in RAM they cost little time, while
attention, its cache and what every token reads stay on the GPU.
"""

from __future__ import annotations

from sollold.placement import cost_model
from sollold.placement.evaluate import Candidate, evaluate
from sollold.placement.inventory import DeviceCapacity, Machine
from sollold.placement.search import SearchContext


def experts_on_host(search: SearchContext, head: Machine, gpu: DeviceCapacity) -> Candidate | None:
    """The placement with as few layers' experts in the head's RAM as must be; None: it does not fit so."""
    footprint = search.footprint
    if head.cpu is None or not any(footprint.experts):
        return None

    def made(layers: int) -> Candidate:
        links = {head.node: cost_model.LOOPBACK}
        holds = [(gpu, 0, search.total)]
        return evaluate(
            head, footprint, search.run, 0, holds, links, search.correction, search.density, cpu_moe=layers
        )

    def too_much(one: Candidate) -> bool:
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
