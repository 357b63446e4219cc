"""How much context: the settings that are tried one after the other, the best first."""

from __future__ import annotations

from sollold.models.checkpoints import CHECKPOINTS
from sollold.models.run import Run
from sollold.placement.wish import Wish

LEAST = 2048
"""Tokens a slot below which a model is of little use: fewer are not offered unasked."""
STEP = 512
BATCHES = (256, 128)
"""Physical batches tried when the wanted one finds no room: compute buffers shrink with them, and prompts
take a little longer. That costs a user less than a shorter context."""


def tokens(wish: Wish, context_train: int) -> int:
    """Tokens a slot that are aimed at: what was named, else the usual; never over the training's."""
    aim = wish.context or wish.usual
    if context_train > 0:
        aim = min(aim, context_train)
    return max(aim, 1)


def run_with(wish: Wish, context: int, slots: int, batch: int = 0) -> Run:
    """The run with ``context`` tokens for each of ``slots``; ``batch``: less than the wanted physical one.

    Where batches are made smaller to find room, no checkpoints are kept either.
    """
    # Padded as llama.cpp pads each slot, so that what is promised is what is there.
    each = -(-context // 256) * 256
    ubatch = batch or wish.ubatch
    if wish.embedding:
        # An embedder without causal attention needs a whole prompt in one physical batch.
        ubatch = max(min(each, LEAST), wish.ubatch)
    return Run(
        context=each * slots,
        slots=slots,
        type_k=wish.type_k,
        type_v=wish.type_v,
        batch=max(ubatch, 2048),
        ubatch=ubatch,
        # Left to itself llama.cpp turns it off for some splits, and then needs more than was reckoned.
        flash="on",
        embedding=wish.embedding,
        checkpoints=0 if batch or wish.embedding else CHECKPOINTS,
    )


def rungs(wish: Wish, context_train: int) -> tuple[list[Run], list[Run]]:
    """Runs to try in turn: those with the full context (fewer slots, then smaller batches), then less.

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
    batches = [] if wish.embedding else [batch for batch in BATCHES if batch < wish.ubatch]
    full += [run_with(wish, aim, 1, batch) for batch in batches]
    least = batches[-1] if batches else 0
    smaller = []
    if not wish.context:
        context = aim // 2
        while context >= LEAST:
            smaller.append(run_with(wish, context, 1, least))
            context //= 2
        if aim > LEAST and (not smaller or smaller[-1].context > LEAST):
            smaller.append(run_with(wish, LEAST, 1, least))
    return full, smaller


def between(wish: Wish, fits: Run, fails: Run) -> list[Run]:
    """Runs of one slot between one that fits and one that does not, in steps of `STEP`, ascending."""
    low = fits.context // fits.slots
    high = fails.context // fails.slots
    return [run_with(wish, context, 1, fits.ubatch) for context in range(low + STEP, high, STEP)]


def given(wish: Wish, run: Run, context_train: int) -> str:
    """Sentences: what context was given and why."""
    text = _context_given(wish, run, context_train)
    if run.ubatch < wish.ubatch:
        text += f" Prompts are computed {run.ubatch} tokens at a time: larger batches find no room."
    return text


def _context_given(wish: Wish, run: Run, context_train: int) -> str:
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
