"""A decision as a person sees it: what would go where, what stays free, what lost, what is missing."""

from __future__ import annotations

from collections.abc import Iterable

from sollold.leader.decide import Decision, FetchFirst, Place, Refuse, Soon
from sollold.leader.ensure import Free, Missing, Option, PlanPreview, Verdict
from sollold.leader.reuse import Otherwise, Use, Wait
from sollold.leader.world import World
from sollold.placement.rung import Alternative
from sollold.placement.shortfall import Shortfall


def preview_of(decision: Decision, world: World | None, fresh: Decision | None = None) -> PlanPreview:
    """The preview of a decision.

    Args:
        decision: what the leader would say now.
        world: what it, or ``fresh``, was made from; None when the model was not found.
        fresh: what it would say if the model were not loaded, where ``decision`` is not to place it.
    """
    match decision:
        case Place():
            return _placed(decision, world, Verdict.WAIT, " ".join(decision.plan.reasons))
        case Soon(place, message):
            return _placed(place, world, Verdict.PLANNING, message)
        case FetchFirst():
            return _placed(decision.place, world, Verdict.PLANNING, decision.message)
        case Use(endpoint, node, reason):
            message = f"{endpoint} on {_name(world, node)} answers: {reason}."
            return _with_plan(fresh, world, Verdict.USE, message, node, endpoint)
        case Wait(deployment, head):
            message = f"{deployment} is being loaded by {_name(world, head)}."
            return _with_plan(fresh, world, Verdict.WAIT, message, head, deployment)
        case Otherwise(endpoint, node, message):
            return _with_plan(fresh, world, Verdict.REFUSED, message + ".", node, endpoint)
        case Refuse():
            return PlanPreview(
                ok=False,
                verdict=Verdict.REFUSED,
                message=decision.message,
                options=_options(decision.alternatives),
                missing=_missing(decision.shortfall),
            )


def _with_plan(
    fresh: Decision | None, world: World | None, verdict: Verdict, message: str, node: str, endpoint: str
) -> PlanPreview:
    if isinstance(fresh, Place):
        return _placed(fresh, world, verdict, message, node, endpoint)
    return PlanPreview(ok=True, verdict=verdict, message=message, node=node, endpoint=endpoint)


def _placed(
    place: Place, world: World | None, verdict: Verdict, message: str, node: str = "", endpoint: str = ""
) -> PlanPreview:
    plan, choice = place.plan, place.choice
    shares = (plan.host, *plan.shares)
    draft = choice.draft
    prompt = draft.prompt_seconds if draft is not None else 0.0
    return PlanPreview(
        ok=True,
        verdict=verdict,
        message=message,
        node=node or plan.head,
        endpoint=endpoint,
        plan=plan,
        evicts=tuple((deployment, model) for _, deployment, model in place.evictions),
        prompt_tokens_per_second=1 / prompt if prompt > 0 else 0.0,
        context=plan.run.context // plan.run.slots,
        weights=sum(share.weights for share in shares),
        state=sum(share.state for share in shares),
        compute=sum(share.compute for share in shares),
        overhead=sum(share.overhead for share in shares),
        free=tuple(_free(place, world)),
        options=_options(choice.alternatives),
        estimate=choice.footprint.estimate,
    )


def _free(place: Place, world: World | None) -> Iterable[Free]:
    given: dict[tuple[str, str], int] = {}
    if world is not None:
        victims = {deployment for _, deployment, _ in place.evictions}
        for record, endpoint in world.endpoints():
            if endpoint.id in victims:
                for key, size in world.held(record, endpoint).items():
                    given[key] = given.get(key, 0) + size
        for record in world.records:
            for grant in record.grants:
                if grant.deployment in world.gone:
                    key = record.node, grant.device
                    given[key] = given.get(key, 0) + grant.bytes
    records = {record.node: record for record in world.records} if world is not None else {}
    for node, devices in place.plan.bytes_by_owner().items():
        owner = records.get(node)
        if owner is None:
            continue
        for device in owner.devices:
            if device.id in devices:
                before = device.available + given.get((node, device.id), 0)
                after = max(0, before - devices[device.id])
                yield Free(node, owner.name, device.id, device.total, before, after)


def _options(alternatives: Iterable[Alternative]) -> tuple[Option, ...]:
    return tuple(Option(one.what, one.tokens_per_second, one.reason) for one in alternatives)


def _missing(shortfall: Shortfall | None) -> Missing | None:
    if shortfall is None:
        return None
    return Missing(
        needed=shortfall.needed,
        there=shortfall.there,
        missing=shortfall.missing,
        weights=shortfall.weights,
        state=shortfall.state,
        buffers=shortfall.buffers,
        remedies=shortfall.remedies,
    )


def _name(world: World | None, node: str) -> str:
    for record in world.records if world is not None else ():
        if record.node == node:
            return record.name
    return node
