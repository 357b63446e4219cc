"""Speculative decoding added to an existing placement."""

from __future__ import annotations

from dataclasses import replace

from sollold.models.footprint.footprint import footprint
from sollold.models.footprint.shape import Layer, Predicting, Shape
from sollold.placement.evaluate import Candidate
from sollold.placement.inventory import Fleet, Link
from sollold.placement.planner import choose
from sollold.placement.request import PlacementRequest
from sollold.placement.speculation import Drafter, with_drafts
from sollold.placement.speculation_gain import AcceptanceHistory, DraftStats, Measured, draft_prior, gain
from tests.placement.fleets import GIB, MIB, cpu, fleet, footprint_with, gpu, machine, shape

REQUEST = PlacementRequest(
    "demo:latest", "d1", parameters=400_000_000, slots=2, usual=2048, speculation="ngram"
)
SPREAD = fleet(*(machine(cpu(name, 500 * MIB), holds=name == "a") for name in "abc"))


def placement_of(cluster: Fleet, model: Shape, request: PlacementRequest = REQUEST) -> Candidate:
    placement = choose(request, cluster, footprint_with(model)).candidate
    assert placement is not None
    return placement


def without_spare_memory(cluster: Fleet, taken: Candidate) -> Fleet:
    """The same machines with exactly the memory that a placement needs."""
    shares = (taken.host, *taken.shares)
    needed = {(share.node, share.device): 0 for share in shares}
    for share in shares:
        needed[share.node, share.device] += share.total
    return Fleet(
        tuple(
            replace(
                member,
                devices=tuple(replace(d, room=needed.get((d.node, d.device), 0)) for d in member.devices),
            )
            for member in cluster.machines
        )
    )


def test_drafts_need_memory_for_their_results_and_move_no_layer() -> None:
    model = shape()
    placement = placement_of(SPREAD, model)
    drafting, reason = with_drafts(placement, REQUEST, SPREAD, footprint_with(model))
    length = drafting.run.drafts
    assert length >= 8 and drafting.drafts_by == "ngram" and "repeats" in reason
    layers = [(share.node, share.first, share.last) for share in placement.shares]
    assert [(share.node, share.first, share.last) for share in drafting.shares] == layers
    results = 2 * length * (model.n_vocab + model.n_embd) * 4
    assert 0 <= drafting.host.total - placement.host.total - results < 4096
    assert drafting.seconds == placement.seconds
    plan = drafting.plan(REQUEST, 16, [reason])
    assert (plan.drafts_by, plan.run.drafts) == ("ngram", length)
    assert plan.tokens_per_second == drafting.gain / placement.seconds


def test_no_tokens_are_drafted_without_free_memory() -> None:
    model = shape()
    placement = placement_of(SPREAD, model)
    drafting, reason = with_drafts(
        placement, REQUEST, without_spare_memory(SPREAD, placement), footprint_with(model)
    )
    assert drafting is placement
    assert reason.startswith("No tokens are drafted: that needs ") and "host-a CPU" in reason


# Three machines with one GPU each, none large enough for the model; every hop draft 5 ms.
FAR = tuple((name, Link(0.005, 110e6)) for name in "abc")
GPUS = fleet(
    *(machine(cpu(name, 2 * GIB), gpu(name, 4 * GIB, 900e9), holds=name == "a", links=FAR) for name in "abc")
)
BIG = shape(layers=40, layer_bytes=250 * MIB, output=100 * MIB, n_embd=4096)
AUTO = replace(REQUEST, speculation="auto", parameters=10_000_000_000, context=2048)
SMALL = replace(shape(layers=2, layer_bytes=10 * MIB, output=10 * MIB, n_embd=256), parameters=30_000_000)
SMALLER = Drafter("small:latest", "d2", SMALL, frozenset("a"))


def test_a_draft_model_is_on_the_heads_device_and_no_layer_is_moved() -> None:
    placement = placement_of(GPUS, BIG, AUTO)
    drafting, reason = with_drafts(placement, AUTO, GPUS, footprint_with(BIG), [SMALLER])
    assert (drafting.drafts_by, drafting.draft_digest, drafting.draft_device) == (
        "small:latest",
        "d2",
        "CUDA0",
    )
    assert "by small:latest on host-a CUDA0" in reason and "times as fast is expected" in reason
    assert drafting.gain > 1.3
    layers = [(share.node, share.first, share.last) for share in placement.shares]
    assert [(share.node, share.first, share.last) for share in drafting.shares] == layers
    draft = footprint(SMALL, replace(placement.run, checkpoints=0))
    own = [
        next(share for share in candidate.shares if share.node == "a") for candidate in (placement, drafting)
    ]
    assert own[1].weights - own[0].weights == sum(draft.weights)
    assert own[1].state - own[0].state == sum(draft.state)
    assert drafting.host.weights - placement.host.weights == draft.host_weights


def test_a_draft_model_needs_its_file_and_memory_on_the_head() -> None:
    placement = placement_of(GPUS, BIG, AUTO)
    named = replace(AUTO, speculation="small:latest")
    elsewhere = replace(SMALLER, nodes=frozenset("b"))
    drafting, reason = with_drafts(placement, named, GPUS, footprint_with(BIG), [elsewhere])
    assert drafting is placement and "host-a does not have the file of small:latest" in reason
    full = without_spare_memory(
        GPUS, with_drafts(placement, replace(AUTO, speculation="ngram"), GPUS, footprint_with(BIG))[0]
    )
    drafting, reason = with_drafts(placement, named, full, footprint_with(BIG), [SMALLER])
    assert drafting is placement and reason.startswith("No tokens are drafted")
    _, reason = with_drafts(placement, named, GPUS, footprint_with(BIG), no_drafter="model 'small' not found")
    assert reason == "No tokens are drafted: model 'small' not found."


def test_automatic_drafting_only_if_it_is_faster() -> None:
    placement = placement_of(GPUS, BIG, AUTO)
    measured = {"d2": DraftStats(1.0, 0.05), "ngram": DraftStats(0.0, 0.0)}
    drafting, reason = with_drafts(placement, AUTO, GPUS, footprint_with(BIG), [SMALLER], measured.get)
    assert drafting is placement and "times as fast" in reason, "drafts were accepted too rarely"
    # On a CPU each token of a batch costs compute time, so drafts gain nothing.
    slow = shape()
    drafting, reason = with_drafts(
        placement_of(SPREAD, slow), replace(REQUEST, speculation="auto"), SPREAD, footprint_with(slow)
    )
    assert not drafting.drafts_by
    alone = fleet(machine(cpu("a", 20 * GIB), holds=True))
    assert with_drafts(placement_of(alone, BIG, AUTO), AUTO, alone, footprint_with(BIG), [SMALLER])[1] == ""
    quick = replace(placement, seconds=0.005)
    assert with_drafts(quick, AUTO, GPUS, footprint_with(BIG), [SMALLER]) == (quick, "")


# The same model with an additional layer that predicts the token after the next one.
AHEAD = replace(
    BIG,
    layers=(*BIG.layers[:-1], Layer(0, 0)),
    predicting=Predicting(BIG.layers[-1], embeds=False, norms=False, heads=False, read=350 * MIB),
)


def test_the_models_own_layer_drafts_on_the_device_of_the_last_layers() -> None:
    placement = placement_of(GPUS, AHEAD, AUTO)
    roomy = Fleet(
        tuple(
            replace(member, devices=tuple(replace(d, room=d.room + GIB) for d in member.devices))
            for member in GPUS.machines
        )
    )
    model = footprint_with(AHEAD)
    drafting, reason = with_drafts(placement, replace(AUTO, speculation="mtp"), roomy, model)
    last = drafting.shares[-1]
    assert (drafting.drafts_by, drafting.run.predicts, drafting.draft_digest) == ("mtp", True, "")
    assert 1 <= drafting.run.drafts <= 3
    assert f"own MTP layer, on host-{last.node} {last.device}" in reason
    layers = [(share.node, share.first, share.last) for share in placement.shares]
    assert [(share.node, share.first, share.last) for share in drafting.shares] == layers
    assert last.weights - placement.shares[-1].weights == BIG.layers[-1].weights
    assert last.state > placement.shares[-1].state and last.compute > placement.shares[-1].compute
    assert drafting.host.compute > placement.host.compute
    plan = drafting.plan(AUTO, 40, [reason])
    assert plan.run.predicts and plan.tokens_per_second == drafting.gain / placement.seconds
    # If the last device is full, some of its layers move to other devices of the same machines.
    drafting, reason = with_drafts(placement, AUTO, GPUS, model)
    assert drafting.drafts_by == "mtp" and drafting.gain > 1.3, reason
    assert (
        set(drafting.nodes) == set(placement.nodes) and drafting.shares[-1].first > placement.shares[-1].first
    )
    assert drafting.run == replace(placement.run, drafts=drafting.run.drafts, predicts=True)
    for share in (*drafting.shares, drafting.host):
        device = next(
            d
            for member in GPUS.machines
            for d in member.devices
            if d.node == share.node and d.device == share.device
        )
        assert share.total <= device.room


def test_the_kind_of_drafting_with_the_largest_gain_is_chosen() -> None:
    # Hops are short and reading weights is slow: the model's own layer is faster than a tenth-sized model.
    near = tuple((name, Link(0.0002, 110e6)) for name in "abc")
    quick = fleet(
        *(machine(cpu(n, 2 * GIB), gpu(n, 4 * GIB, 100e9), holds=n == "a", links=near) for n in "abc")
    )
    placement = placement_of(quick, AHEAD, AUTO)
    tenth = replace(
        shape(layers=4, layer_bytes=100 * MIB, output=10 * MIB, n_embd=256), parameters=1_000_000_000
    )
    other = Drafter("tenth:latest", "d3", tenth, frozenset("a"))
    model = footprint_with(AHEAD)
    drafting, reason = with_drafts(placement, AUTO, quick, model, [other])
    assert drafting.drafts_by == "mtp" and drafting.gain > 1.1, reason
    measured = {"mtp": DraftStats(1.0, 0.1), "d3": DraftStats(1.0, 0.7)}
    drafting, reason = with_drafts(placement, AUTO, quick, model, [other], measured.get)
    assert drafting.drafts_by != "mtp", "drafts were accepted too rarely"


def test_the_models_own_layer_needs_free_memory() -> None:
    placement = placement_of(GPUS, AHEAD, AUTO)
    request = replace(AUTO, speculation="mtp")
    drafting, reason = with_drafts(
        placement, request, without_spare_memory(GPUS, placement), footprint_with(AHEAD)
    )
    assert drafting is placement and reason.startswith("No tokens are drafted: that needs ")
    drafting, reason = with_drafts(placement_of(GPUS, BIG, AUTO), request, GPUS, footprint_with(BIG))
    assert not drafting.drafts_by and "no layer for next-token prediction" in reason


def test_the_gain_of_drafts() -> None:
    certain, never = DraftStats(1.0, 1.0), DraftStats(1.0, 0.0)
    assert gain(certain, 3, 0.01, 0.01, 0.0) == 4.0
    assert gain(never, 3, 0.01, 0.02, 0.0) == 0.5
    assert gain(DraftStats(0.0, 1.0), 3, 0.01, 0.02, 1.0) == 1.0
    assert draft_prior(10**9, 10**10).acceptance > draft_prior(10**8, 10**11).acceptance


def test_stats_are_estimated_from_counts() -> None:
    # 100 rounds, half of them with 4 drafted tokens that are accepted with a probability of 0.5 each.
    accepted = round(50 * DraftStats(1.0, 0.5).accepted(4))
    stats = Measured("m", "d", 4, 100 + accepted, 200, accepted, 0.0).stats
    assert abs(stats.share - 0.5) < 0.01 and abs(stats.acceptance - 0.5) < 0.02


def test_measurements_are_accumulated_and_expire() -> None:
    history = AcceptanceHistory()
    measured = Measured("m", "d", 4, 200, 100, 80, at=1000.0)
    history.learn(measured)
    assert history.stats("m", "d", 1001.0) is None, "too few tokens"
    history.learn(measured)
    assert history.facts()[0].tokens == 400
    assert history.stats("m", "d", 1001.0) and not history.stats("m", "other", 1001.0)
    assert history.stats("m", "d", 1000.0 + 8 * 86400) is None
    restored = AcceptanceHistory(history.facts())
    for _ in range(200):
        restored.learn(measured)
    assert restored.facts()[0].tokens <= 20_000
    restored.learn(replace(measured, accepted=101))
    restored.learn(replace(measured, length=0))
    assert restored.facts() == AcceptanceHistory(restored.facts()).facts()


def test_models_with_a_recurrent_state_can_only_draft_with_their_own_layer() -> None:
    model = shape()
    state = replace(model, layers=tuple(replace(layer, recurrent=4096) for layer in model.layers))
    drafting, reason = with_drafts(placement_of(SPREAD, state), REQUEST, SPREAD, footprint_with(state))
    assert not drafting.drafts_by and "recurrent" in reason
    ahead = replace(
        state,
        layers=(*state.layers[:-1], Layer(0, 0)),
        predicting=Predicting(model.layers[-1], embeds=False, norms=False, heads=False, read=MIB),
    )
    request = replace(REQUEST, speculation="mtp")
    placement = placement_of(SPREAD, ahead)
    drafting, _ = with_drafts(placement, request, SPREAD, footprint_with(ahead))
    assert drafting.drafts_by == "mtp"
    copies = 2 * drafting.run.drafts * 4096 * (len(ahead.layers) - 1)
    own_cache = 2048 * 2 * 2 * (256 + 256)
    taken = [
        sum(share.state for share in (candidate.host, *candidate.shares))
        for candidate in (drafting, placement)
    ]
    assert taken[0] - taken[1] == copies + own_cache


def test_no_reason_is_given_if_drafting_was_not_requested() -> None:
    model, alone = shape(), fleet(machine(cpu("a", 4 * GIB), holds=True))
    for request in (replace(REQUEST, speculation="off"), replace(REQUEST, embedding=True)):
        placement = placement_of(alone, model, request)
        assert with_drafts(placement, request, alone, footprint_with(model)) == (placement, "")
