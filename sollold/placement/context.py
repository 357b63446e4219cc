"""How much context: the settings that are tried one after the other, the best first."""

from __future__ import annotations

from sollold.models.run import Run
from sollold.placement.wish import Wish

LEAST = 2048
"""Tokens a slot below which a model is of little use: fewer are not offered unasked."""
STEP = 512


def tokens(wish: Wish, context_train: int) -> int:
    """Tokens a slot that are aimed at: what was named, else the usual; never over the training's."""
    aim = wish.context or wish.usual
    if context_train > 0:
        aim = min(aim, context_train)
    return max(aim, 1)


def run_with(wish: Wish, context: int, slots: int) -> Run:
    """The run with ``context`` tokens for each of ``slots``."""
    # Padded as llama.cpp pads each slot, so that what is promised is what is there.
    each = -(-context // 256) * 256
    ubatch = batch = wish.ubatch
    if wish.embedding:
        # An embedder without causal attention needs a whole prompt in one physical batch.
        ubatch = batch = max(min(each, LEAST), wish.ubatch)
    return Run(
        context=each * slots,
        slots=slots,
        type_k=wish.type_k,
        type_v=wish.type_v,
        batch=max(batch, 2048),
        ubatch=ubatch,
        embedding=wish.embedding,
    )


def rungs(wish: Wish, context_train: int) -> tuple[list[Run], list[Run]]:
    """Runs to try in turn: those with the full context (fewer and fewer slots), then smaller ones.

    The second list is empty when the caller named the context: nobody gets less than they asked for.
    """
    aim = tokens(wish, context_train)
    slots = max(wish.slots, 1)
    full = []
    while True:
        full.append(run_with(wish, aim, slots))
        if slots == 1:
            break
        slots //= 2
    smaller = []
    if not wish.context:
        context = aim // 2
        while context >= LEAST:
            smaller.append(run_with(wish, context, 1))
            context //= 2
        if aim > LEAST and (not smaller or smaller[-1].context > LEAST):
            smaller.append(run_with(wish, LEAST, 1))
    return full, smaller


def between(wish: Wish, fits: Run, fails: Run) -> list[Run]:
    """Runs of one slot between one that fits and one that does not, in steps of `STEP`, ascending."""
    low = fits.context // fits.slots
    high = fails.context // fails.slots
    return [run_with(wish, context, 1) for context in range(low + STEP, high, STEP)]


def given(wish: Wish, run: Run, context_train: int) -> str:
    """A sentence: what context was given and why."""
    each = run.context // run.slots
    slots = f"{run.slots} request{'s' if run.slots != 1 else ''} at a time"
    aim = tokens(wish, context_train)
    wanted = f"{each} tokens of context each for {slots}"
    if wish.context and wish.context > aim:
        return f"{wanted}: {wish.context} were asked for, but the model was trained with {context_train}."
    if each >= aim and run.slots >= wish.slots:
        if wish.context:
            return f"{wanted}, as asked for."
        why = "the model's own" if context_train and aim == context_train else "the usual setting"
        return f"{wanted}: {why}."
    if each >= aim:
        return f"{wanted}: there is no room for {wish.slots} at a time."
    return f"{wanted}: there is no room for {aim} tokens and {wish.slots} at a time."
