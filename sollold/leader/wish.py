"""How a caller wants a model placed: which settings it overrides, and whether a deployment complies."""

from __future__ import annotations

from dataclasses import replace

from sollold.cluster.gossip.record import Backend, Endpoint
from sollold.facts import dataclass
from sollold.machine.external_worker import external_address
from sollold.placement.request import AUTO, OFF, Policy
from sollold.settings.schema import PlacementSettings


@dataclass(frozen=True, slots=True)
class PlacementWish:
    """Overrides of the placement settings for one request. None or empty: as in the settings.

    It is sent unchanged from the caller's node to the leader.

    Attributes:
        workers: maximum number of machines besides the head.
        distributed: whether it may be spread over machines.
        threshold: billions of weights from which it must be spread; 0: never because of its size.
        policy: how layers are distributed, a `Policy`.
        external: addresses of the external workers that may be used; None: all that nodes list.
        speculation: a value as in the setting ``placement.speculation``.
    """

    workers: int | None = None
    distributed: bool | None = None
    threshold: float | None = None
    policy: str = ""
    external: tuple[str, ...] | None = None
    speculation: str = ""

    def over(self, settings: PlacementSettings) -> PlacementSettings:
        """Return the settings with this request's overrides."""
        if self is NO_WISH:
            return settings
        changes = {
            "max_workers": self.workers,
            "enable_distributed": self.distributed,
            "distributed_threshold": self.threshold,
            "policy": self.policy or None,
            "speculation": self.speculation or None,
        }
        named = {key: value for key, value in changes.items() if value is not None}
        return replace(settings, **named) if named else settings  # type: ignore[arg-type]

    def unmet_by(self, endpoint: Endpoint, *, sharded: bool) -> str:
        """Return the first override that a llama.cpp deployment does not meet, in words; empty when none.

        ``sharded``: whether, with these overrides, a model of this size must be spread.
        """
        if self is NO_WISH or self == NO_WISH:
            return ""
        spread = endpoint.backend is Backend.SHARDED
        external = {external_address(placed.device) for placed in endpoint.placed} - {""}
        machines = {
            placed.node for placed in endpoint.placed if not external_address(placed.device)
        } | external
        if self.workers is not None and len(machines) - 1 > self.workers:
            return f"{self.workers} worker{'s' if self.workers != 1 else ''} at most"
        if self.distributed is False and spread:
            return "one machine alone"
        if self.threshold is not None and sharded and not spread and not endpoint.asked.always:
            return "several machines"
        if self.external is not None and (others := external - set(self.external)):
            return f"leaving out the external worker {min(others)}"
        # The policy does not matter for a model on one machine, unless it is `SPREAD`.
        if self.policy and self.policy != endpoint.asked.policy and (spread or self.policy == Policy.SPREAD):
            return f"the policy {self.policy}"
        if not self._drafts_as_wanted(endpoint):
            return f"speculation set to {self.speculation}"
        return ""

    def _drafts_as_wanted(self, endpoint: Endpoint) -> bool:
        """Return whether reloading it for this request would not change its drafts, as far as known here.

        A deployment started with the same setting that drafts nothing might draft now; the leader decides.
        """
        drafter = endpoint.drafts.by
        if not self.speculation:
            return True
        if self.speculation == OFF:
            return not drafter
        if self.speculation == AUTO:
            return endpoint.asked.speculation == AUTO or not (drafter or endpoint.backend is Backend.SHARDED)
        return bool(drafter) and self.speculation in (drafter, endpoint.asked.speculation)


NO_WISH = PlacementWish()
"""No overrides."""
