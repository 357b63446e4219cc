"""Places a mixture of experts on one GPU, with the experts of the first layers on the head's processor.

A token reads only a few experts, but all need memory. In RAM they cost little time, while attention, its
cache and the weights that every token reads stay on the GPU.
"""

from __future__ import annotations

from sollold.placement import cost_model
from sollold.placement.evaluate import Candidate, evaluate
from sollold.placement.inventory import DeviceCapacity, Machine
from sollold.placement.search import SearchContext


def experts_on_host(search: SearchContext, head: Machine, gpu: DeviceCapacity) -> Candidate | None:
    """Return the placement with the fewest layers' experts in the head's RAM; None when it does not fit."""
    footprint = search.footprint
    if head.cpu is None or not any(footprint.experts):
        return None

    def placement(layers: int) -> Candidate:
        links = {head.node: cost_model.LOOPBACK}
        holds = [(gpu, 0, search.total)]
        return evaluate(
            head, footprint, search.run, 0, holds, links, search.correction, search.density, cpu_moe=layers
        )

    def too_much(candidate: Candidate) -> bool:
        """Return whether the GPU still holds too much."""
        return any(short.device == gpu.device for short in candidate.short)

    low, high = 0, footprint.layers
    if too_much(placement(high)):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if too_much(placement(middle)) else (low, middle)
    best = placement(high)
    return None if best.short else best
