"""Turns a decision that needs no work by the leader into the response to the caller."""

from __future__ import annotations

from sollold.cluster.gossip.record import State
from sollold.errors import Fault
from sollold.leader.decision import Decision, FetchFirst, HoldersAway, Place, PlaceLater, Refuse
from sollold.leader.existing import Mismatch, ReloadWhenIdle, Use, Wait
from sollold.leader.messages import Ensured, Verdict


def may_change(decision: Decision) -> bool:
    """Return whether the decision may differ in a moment, since records are slightly out of date."""
    if isinstance(decision, Place):
        return decision.beside
    return isinstance(decision, PlaceLater | Mismatch | ReloadWhenIdle)


def answer(decision: Decision) -> Ensured:
    """Return the response to any decision except `Place`."""
    match decision:
        case Use(endpoint, node, reason):
            return Ensured(Verdict.USE, endpoint, node, State.READY, reasons=(reason,))
        case Wait(deployment, head):
            return Ensured(Verdict.WAIT, deployment, head, State.LOADING)
        case Mismatch(deployment, node, message):
            message = f"{message}; ask again when it is idle, or unload it first."
            return Ensured(
                Verdict.REFUSED,
                deployment,
                node,
                fault=Fault.UNAVAILABLE.value,
                message=message,
                retry_after=10.0,
            )
        case ReloadWhenIdle():
            return Ensured(Verdict.PLANNING, message=f"{decision.message}; waiting until it is idle")
        case PlaceLater() | HoldersAway() | FetchFirst():
            return Ensured(Verdict.PLANNING, message=decision.message)
        case Refuse(fault, message, retry_after):
            return Ensured(Verdict.REFUSED, fault=fault.value, message=message, retry_after=retry_after)
        case Place():
            raise AssertionError("a placement is carried out, not answered")
