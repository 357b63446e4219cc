"""Lists the context sizes, slot counts and batch sizes to try for a model, best first."""

from __future__ import annotations

from sollold.models.footprint.checkpoints import CHECKPOINTS
from sollold.models.footprint.run_options import Run
from sollold.placement.request import PlacementRequest

LEAST = 2048
"""Minimum context per slot, in tokens, unless the caller asks for less. A model is of little use below it."""
STEP = 512
BATCHES = (256, 128)
"""Physical batch sizes, in tokens, to try when the requested one does not fit. Smaller batches need smaller
compute buffers and make prompts a little slower, which costs a user less than a shorter context."""


def tokens(request: PlacementRequest, context_train: int) -> int:
    """Return the target context per slot: the requested or usual one, capped by the trained."""
    aim = request.context or request.usual
    if context_train > 0:
        aim = min(aim, context_train)
    return max(aim, 1)


def run_with(request: PlacementRequest, context: int, slots: int, batch: int = 0) -> Run:
    """Return the run with ``context`` tokens for each of ``slots``.

    A ``batch`` other than 0 replaces the requested physical batch to save memory; then no checkpoints are
    kept either.
    """
    # Padded as llama.cpp pads each slot, so that the promised context is the real one.
    per_slot = -(-context // 256) * 256
    ubatch = batch or request.ubatch
    if request.embedding:
        # An embedder without causal attention needs a whole prompt in one physical batch.
        ubatch = max(min(per_slot, LEAST), request.ubatch)
    return Run(
        context=per_slot * slots,
        slots=slots,
        type_k=request.type_k,
        type_v=request.type_v,
        batch=max(ubatch, 2048),
        ubatch=ubatch,
        # On "auto" llama.cpp turns it off for some splits, and then needs more memory than was calculated.
        flash="on",
        embedding=request.embedding,
        checkpoints=0 if batch or request.embedding else CHECKPOINTS,
    )


def runs_to_try(request: PlacementRequest, context_train: int) -> tuple[list[Run], list[Run]]:
    """Return the runs to try in turn: those with the full context, then those with less.

    With the full context, fewer slots are tried first, then smaller batches. The second list is empty when
    the caller named a context: a request never gets less than it named.
    """
    aim = tokens(request, context_train)
    slots = max(request.slots, 1)
    full = []
    while True:
        full.append(run_with(request, aim, slots))
        if slots == 1:
            break
        slots //= 2
    batches = [] if request.embedding else [batch for batch in BATCHES if batch < request.ubatch]
    full += [run_with(request, aim, 1, batch) for batch in batches]
    smallest = batches[-1] if batches else 0
    smaller = []
    if not request.context:
        context = aim // 2
        while context >= LEAST:
            smaller.append(run_with(request, context, 1, smallest))
            context //= 2
        if aim > LEAST and (not smaller or smaller[-1].context > LEAST):
            smaller.append(run_with(request, LEAST, 1, smallest))
    return full, smaller


def between(request: PlacementRequest, fits: Run, fails: Run) -> list[Run]:
    """Return one-slot runs between one that fits and one that does not, ascending in steps of `STEP`."""
    low = fits.request_context
    high = fails.request_context
    return [run_with(request, context, 1, fits.ubatch) for context in range(low + STEP, high, STEP)]


def given(request: PlacementRequest, run: Run, context_train: int) -> str:
    """Describe, in sentences, the context that was given and why."""
    text = _context_given(request, run, context_train)
    if run.ubatch < request.ubatch:
        text += f" Prompts are computed {run.ubatch} tokens at a time: larger batches do not fit."
    return text


def _context_given(request: PlacementRequest, run: Run, context_train: int) -> str:
    per_slot = run.request_context
    slots = f"{run.slots} request{'s' if run.slots != 1 else ''} at a time"
    aim = tokens(request, context_train)
    summary = f"{per_slot} tokens of context each for {slots}"
    if request.context and request.context > aim:
        return f"{summary}: {request.context} were asked for, but the model was trained with {context_train}."
    if per_slot >= aim and run.slots >= request.slots:
        if request.context:
            return f"{summary}, as asked for."
        reason = "the model's own" if context_train and aim == context_train else "the usual setting"
        return f"{summary}: {reason}."
    if per_slot >= aim:
        return f"{summary}: there is no room for {request.slots} at a time."
    return f"{summary}: there is no room for {aim} tokens and {request.slots} at a time."
