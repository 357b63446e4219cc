"""Drafted tokens beside a placement that was found without them."""

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

WISH = PlacementRequest("demo:latest", "d1", parameters=400_000_000, slots=2, usual=2048, speculation="ngram")
SPREAD = fleet(*(machine(cpu(name, 500 * MIB), holds=name == "a") for name in "abc"))


def placed(on: Fleet, model: Shape, wish: PlacementRequest = WISH) -> Candidate:
    found = choose(wish, on, footprint_with(model)).candidate
    assert found is not None
    return found


def tight(on: Fleet, taken: Candidate) -> Fleet:
    """The same machines with just the room that a placement takes."""
    shares = (taken.host, *taken.shares)
    needed = {(share.node, share.device): 0 for share in shares}
    for share in shares:
        needed[share.node, share.device] += share.total
    return Fleet(
        tuple(
            replace(
                one,
                devices=tuple(replace(d, room=needed.get((d.node, d.device), 0)) for d in one.devices),
            )
            for one in on.machines
        )
    )


def test_drafts_take_the_memory_of_their_results_and_move_no_layer() -> None:
    model = shape()
    found = placed(SPREAD, model)
    made, said = with_drafts(found, WISH, SPREAD, footprint_with(model))
    length = made.run.drafts
    assert length >= 8 and made.drafts_by == "ngram" and "repeats" in said
    layers = [(share.node, share.first, share.last) for share in found.shares]
    assert [(share.node, share.first, share.last) for share in made.shares] == layers
    results = 2 * length * (model.n_vocab + model.n_embd) * 4
    assert 0 <= made.host.total - found.host.total - results < 4096
    assert made.seconds == found.seconds
    plan = made.plan(WISH, 16, [said])
    assert (plan.drafts_by, plan.run.drafts) == ("ngram", length)
    assert plan.tokens_per_second == made.gain / found.seconds


def test_where_no_memory_is_left_nothing_is_drafted() -> None:
    model = shape()
    found = placed(SPREAD, model)
    made, said = with_drafts(found, WISH, tight(SPREAD, found), footprint_with(model))
    assert made is found
    assert said.startswith("No tokens are drafted: that needs ") and "host-a CPU" in said


# Three machines with a GPU each, of which none holds the model; every trip takes 5 ms.
FAR = tuple((name, Link(0.005, 110e6)) for name in "abc")
GPUS = fleet(
    *(machine(cpu(name, 2 * GIB), gpu(name, 4 * GIB, 900e9), holds=name == "a", links=FAR) for name in "abc")
)
BIG = shape(layers=40, layer_bytes=250 * MIB, output=100 * MIB, n_embd=4096)
AUTO = replace(WISH, speculation="auto", parameters=10_000_000_000, context=2048)
SMALL = replace(shape(layers=2, layer_bytes=10 * MIB, output=10 * MIB, n_embd=256), parameters=30_000_000)
SMALLER = Drafter("small:latest", "d2", SMALL, frozenset("a"))


def test_a_draft_model_lies_beside_the_heads_share_and_no_layer_is_moved() -> None:
    found = placed(GPUS, BIG, AUTO)
    made, said = with_drafts(found, AUTO, GPUS, footprint_with(BIG), [SMALLER])
    assert (made.drafts_by, made.draft_digest, made.draft_device) == ("small:latest", "d2", "CUDA0")
    assert "by small:latest on host-a CUDA0" in said and "times as fast is expected" in said
    assert made.gain > 1.3
    layers = [(share.node, share.first, share.last) for share in found.shares]
    assert [(share.node, share.first, share.last) for share in made.shares] == layers
    takes = footprint(SMALL, replace(found.run, checkpoints=0))
    own = [next(share for share in one.shares if share.node == "a") for one in (found, made)]
    assert own[1].weights - own[0].weights == sum(takes.weights)
    assert own[1].state - own[0].state == sum(takes.state)
    assert made.host.weights - found.host.weights == takes.host_weights


def test_a_draft_model_that_the_head_lacks_or_has_no_room_for() -> None:
    found = placed(GPUS, BIG, AUTO)
    named = replace(AUTO, speculation="small:latest")
    elsewhere = replace(SMALLER, nodes=frozenset("b"))
    made, said = with_drafts(found, named, GPUS, footprint_with(BIG), [elsewhere])
    assert made is found and "host-a does not have the file of small:latest" in said
    full = tight(GPUS, with_drafts(found, replace(AUTO, speculation="ngram"), GPUS, footprint_with(BIG))[0])
    made, said = with_drafts(found, named, full, footprint_with(BIG), [SMALLER])
    assert made is found and said.startswith("No tokens are drafted")
    _, said = with_drafts(found, named, GPUS, footprint_with(BIG), no_drafter="model 'small' not found")
    assert said == "No tokens are drafted: model 'small' not found."


def test_by_itself_only_where_it_pays() -> None:
    found = placed(GPUS, BIG, AUTO)
    measured = {"d2": DraftStats(1.0, 0.05), "ngram": DraftStats(0.0, 0.0)}
    made, said = with_drafts(found, AUTO, GPUS, footprint_with(BIG), [SMALLER], measured.get)
    assert made is found and "times as fast" in said, "it was accepted too seldom"
    # Where a processor computes for each token of a batch, there is nothing to gain.
    slow = shape()
    made, said = with_drafts(
        placed(SPREAD, slow), replace(WISH, speculation="auto"), SPREAD, footprint_with(slow)
    )
    assert not made.drafts_by
    alone = fleet(machine(cpu("a", 20 * GIB), holds=True))
    assert with_drafts(placed(alone, BIG, AUTO), AUTO, alone, footprint_with(BIG), [SMALLER])[1] == ""
    quick = replace(found, seconds=0.005)
    assert with_drafts(quick, AUTO, GPUS, footprint_with(BIG), [SMALLER]) == (quick, "")


# The same, and its last layer predicts the token after the next one.
AHEAD = replace(
    BIG,
    layers=(*BIG.layers[:-1], Layer(0, 0)),
    predicting=Predicting(BIG.layers[-1], embeds=False, norms=False, heads=False, read=350 * MIB),
)


def test_the_models_own_layer_drafts_where_the_layers_end() -> None:
    found = placed(GPUS, AHEAD, AUTO)
    roomy = Fleet(
        tuple(
            replace(one, devices=tuple(replace(d, room=d.room + GIB) for d in one.devices))
            for one in GPUS.machines
        )
    )
    model = footprint_with(AHEAD)
    made, said = with_drafts(found, replace(AUTO, speculation="mtp"), roomy, model)
    last = made.shares[-1]
    assert (made.drafts_by, made.run.predicts, made.draft_digest) == ("mtp", True, "")
    assert 1 <= made.run.drafts <= 3
    assert f"own MTP layer, on host-{last.node} {last.device}" in said
    layers = [(share.node, share.first, share.last) for share in found.shares]
    assert [(share.node, share.first, share.last) for share in made.shares] == layers
    assert last.weights - found.shares[-1].weights == BIG.layers[-1].weights
    assert last.state > found.shares[-1].state and last.compute > found.shares[-1].compute
    assert made.host.compute > found.host.compute
    plan = made.plan(AUTO, 40, [said])
    assert plan.run.predicts and plan.tokens_per_second == made.gain / found.seconds
    # Where the last device is full, others of the same machines take some of its layers.
    made, said = with_drafts(found, AUTO, GPUS, model)
    assert made.drafts_by == "mtp" and made.gain > 1.3, said
    assert set(made.nodes) == set(found.nodes) and made.shares[-1].first > found.shares[-1].first
    assert made.run == replace(found.run, drafts=made.run.drafts, predicts=True)
    for share in (*made.shares, made.host):
        device = next(
            d
            for one in GPUS.machines
            for d in one.devices
            if d.node == share.node and d.device == share.device
        )
        assert share.total <= device.room


def test_of_several_ways_to_draft_the_one_that_gains_most_is_taken() -> None:
    # Trips are short and reading takes long: the model's own layer is quicker than a model of a tenth of it.
    near = tuple((name, Link(0.0002, 110e6)) for name in "abc")
    quick = fleet(
        *(machine(cpu(n, 2 * GIB), gpu(n, 4 * GIB, 100e9), holds=n == "a", links=near) for n in "abc")
    )
    found = placed(quick, AHEAD, AUTO)
    tenth = replace(
        shape(layers=4, layer_bytes=100 * MIB, output=10 * MIB, n_embd=256), parameters=1_000_000_000
    )
    other = Drafter("tenth:latest", "d3", tenth, frozenset("a"))
    model = footprint_with(AHEAD)
    made, said = with_drafts(found, AUTO, quick, model, [other])
    assert made.drafts_by == "mtp" and made.gain > 1.1, said
    measured = {"mtp": DraftStats(1.0, 0.1), "d3": DraftStats(1.0, 0.7)}
    made, said = with_drafts(found, AUTO, quick, model, [other], measured.get)
    assert made.drafts_by != "mtp", "it was accepted too seldom"


def test_the_models_own_layer_takes_only_what_is_left() -> None:
    found = placed(GPUS, AHEAD, AUTO)
    wish = replace(AUTO, speculation="mtp")
    made, said = with_drafts(found, wish, tight(GPUS, found), footprint_with(AHEAD))
    assert made is found and said.startswith("No tokens are drafted: that needs ")
    made, said = with_drafts(placed(GPUS, BIG, AUTO), wish, GPUS, footprint_with(BIG))
    assert not made.drafts_by and "no layer for next-token prediction" in said


def test_what_drafts_gain() -> None:
    certain, never = DraftStats(1.0, 1.0), DraftStats(1.0, 0.0)
    assert gain(certain, 3, 0.01, 0.01, 0.0) == 4.0
    assert gain(never, 3, 0.01, 0.02, 0.0) == 0.5
    assert gain(DraftStats(0.0, 1.0), 3, 0.01, 0.02, 1.0) == 1.0
    assert draft_prior(10**9, 10**10).acceptance > draft_prior(10**8, 10**11).acceptance


def test_the_stats_are_what_explains_the_counts() -> None:
    # 100 rounds, half of which drafted 4 tokens with a chance of 0.5 each.
    accepted = round(50 * DraftStats(1.0, 0.5).accepted(4))
    stats = Measured("m", "d", 4, 100 + accepted, 200, accepted, 0.0).stats
    assert abs(stats.share - 0.5) < 0.01 and abs(stats.acceptance - 0.5) < 0.02


def test_what_was_measured_is_kept_for_a_while() -> None:
    known = AcceptanceHistory()
    one = Measured("m", "d", 4, 200, 100, 80, at=1000.0)
    known.learn(one)
    assert known.stats("m", "d", 1001.0) is None, "too little"
    known.learn(one)
    assert known.facts()[0].tokens == 400
    assert known.stats("m", "d", 1001.0) and not known.stats("m", "other", 1001.0)
    assert known.stats("m", "d", 1000.0 + 8 * 86400) is None
    again = AcceptanceHistory(known.facts())
    for _ in range(200):
        again.learn(one)
    assert again.facts()[0].tokens <= 20_000
    again.learn(replace(one, accepted=101))
    again.learn(replace(one, length=0))
    assert again.facts() == AcceptanceHistory(again.facts()).facts()


def test_a_recurrent_state_is_copied_only_where_the_models_own_layer_drafts() -> None:
    model = shape()
    state = replace(model, layers=tuple(replace(layer, recurrent=4096) for layer in model.layers))
    made, said = with_drafts(placed(SPREAD, state), WISH, SPREAD, footprint_with(state))
    assert not made.drafts_by and "recurrent" in said
    ahead = replace(
        state,
        layers=(*state.layers[:-1], Layer(0, 0)),
        predicting=Predicting(model.layers[-1], embeds=False, norms=False, heads=False, read=MIB),
    )
    wish = replace(WISH, speculation="mtp")
    found = placed(SPREAD, ahead)
    made, _ = with_drafts(found, wish, SPREAD, footprint_with(ahead))
    assert made.drafts_by == "mtp"
    kept = 2 * made.run.drafts * 4096 * (len(ahead.layers) - 1)
    of_own = 2048 * 2 * 2 * (256 + 256)
    taken = [sum(share.state for share in (one.host, *one.shares)) for one in (made, found)]
    assert taken[0] - taken[1] == kept + of_own


def test_what_was_not_asked_for_is_not_spoken_of() -> None:
    model, alone = shape(), fleet(machine(cpu("a", 4 * GIB), holds=True))
    for wish in (replace(WISH, speculation="off"), replace(WISH, embedding=True)):
        found = placed(alone, model, wish)
        assert with_drafts(found, wish, alone, footprint_with(model)) == (found, "")
