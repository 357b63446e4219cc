"""How a caller wants a model placed: what it overrides of the settings, and what meets it."""

from __future__ import annotations

from dataclasses import replace

from sollold.cluster.gossip.record import Backend, Endpoint
from sollold.facts import dataclass
from sollold.machine.external_worker import external_address
from sollold.placement.request import AUTO, OFF, Policy
from sollold.settings.schema import PlacementSettings


@dataclass(frozen=True, slots=True)
class PlacementWish:
    """Overrides the placement's settings for one request. None, or empty: as the settings say.

    It travels as it is from the caller's node to the leader.

    Attributes:
        workers: machines besides the head at most.
        distributed: whether it may be spread over machines.
        threshold: billions of weights from which it must be spread; 0: never for its size.
        policy: how layers are shared out, a `Policy`.
        external: addresses of the external workers that may be used; None: all that nodes name.
        speculation: as ``placement.speculation`` in the settings.
    """

    workers: int | None = None
    distributed: bool | None = None
    threshold: float | None = None
    policy: str = ""
    external: tuple[str, ...] | None = None
    speculation: str = ""

    def over(self, settings: PlacementSettings) -> PlacementSettings:
        """The settings for this request."""
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
        """What of the wish a deployment of llama.cpp does not meet, in a few words; empty: nothing.

        ``sharded``: by the wish a model of this size must be spread.
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
        # How layers are shared out says nothing of a model that one machine holds.
        if self.policy and self.policy != endpoint.asked.policy and (spread or self.policy == Policy.SPREAD):
            return f"the policy {self.policy}"
        if not self._drafts_as_wanted(endpoint):
            return f"speculation set to {self.speculation}"
        return ""

    def _drafts_as_wanted(self, endpoint: Endpoint) -> bool:
        """Whether it would draft no otherwise if it were loaded for this wish, as far as can be told here.

        One that was asked for the same and drafts nothing may do so by now: the leader works that out.
        """
        by = endpoint.drafts.by
        if not self.speculation:
            return True
        if self.speculation == OFF:
            return not by
        if self.speculation == AUTO:
            return endpoint.asked.speculation == AUTO or not (by or endpoint.backend is Backend.SHARDED)
        return bool(by) and self.speculation in (by, endpoint.asked.speculation)


NO_WISH = PlacementWish()
"""All as the settings say."""
