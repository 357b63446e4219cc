"""Asks llama.cpp how much memory a model takes, before it is loaded, where our own footprint is an estimate.

``llama-fit-params -fitp on`` builds a model's graph without its weights and prints in MiB what tensors, state
and compute buffers would take. It is run for the CPU alone, which needs no worker, and the totals are
compared: a plan that reserves less than llama.cpp needs is refused. Results are cached in the state folder.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import re
import subprocess
from pathlib import Path

from sollold.engines.install.find import Llama
from sollold.engines.llamacpp.command_line import run_options
from sollold.facts import dataclass
from sollold.machine.backends import ENVIRONMENT
from sollold.machine.child_guard import guarded
from sollold.machine.program import child_environment, kill_session
from sollold.models.footprint.read_shape import shape_of
from sollold.models.footprint.run_options import Run
from sollold.models.gguf import reader
from sollold.models.gguf.header import GgufError
from sollold.models.model import Model
from sollold.models.stores.patient_read import read_patiently
from sollold.placement.plan import Plan
from sollold.settings.schema import MIB
from sollold.settings.state_file import read_json, save_json
from sollold.units import bytes_text

log = logging.getLogger("sollold.engines")

PROGRAM = "llama-fit-params"
ASK_SECONDS = 30.0
"""Timeout: it reads only the header and the vocabulary; a slow disk gets time, a hang does not."""
_KILL_SECONDS = 2.0
"""Timeout for its end after it was killed, in seconds."""
_MAX_RESULTS = 256
"""Maximum number of cached results; the oldest is dropped."""
_ROW = re.compile(r"^(?:Host|CPU)\s+(\d+)\s+(\d+)\s+(\d+)\s*$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class ReportedMemory:
    """llama.cpp's result for the whole model on the CPU, in bytes (it rounds down to MiB)."""

    weights: int
    state: int
    compute: int


class FitCheck:
    """Runs and caches checks.

    Args:
        path: file of cached results, which may be deleted at any time.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, ReportedMemory] | None = None

    async def check(self, plan: Plan, model: Model, llama: Llama) -> str:
        """Return why ``plan`` can't be carried out, as a sentence; empty if it can, or could not be checked.

        Raises:
            LookupError: the model's file system does not respond.
        """
        if not plan.estimate or not model.files:
            return ""
        known = await self._cached()
        key = _key(plan, llama.build)
        reported = known.get(key)
        if reported is None:
            reported = await _ask(plan.run, model, llama)
            if reported is None:
                return ""
            known[key] = reported
            while len(known) > _MAX_RESULTS:
                del known[next(iter(known))]
            await asyncio.to_thread(save_json, self._path, known.copy())
        vocabulary = await read_patiently(lambda: _vocabulary(model.files[0]), model.files[0])
        return compare(plan, reported, vocabulary)

    async def _cached(self) -> dict[str, ReportedMemory]:
        if self._known is None:
            read = await asyncio.to_thread(read_json, self._path, dict[str, ReportedMemory])
            self._known = self._known if self._known is not None else read or {}
        return self._known


def question(run: Run, model: Model, llama: Llama) -> list[str]:
    """Return the command that measures ``model`` under these options, entirely on the CPU."""
    line = [str(llama.server.with_name(PROGRAM)), "--model", model.files[0], "--device", "none"]
    line += run_options(run)
    if model.adapters:
        line += ["--lora", ",".join(model.adapters)]
    return [*line, "--gpu-layers", "0", "--fit", "off", "--fit-print", "on"]


def answer(output: str) -> ReportedMemory | None:
    """Parse its output; None if it is not usable."""
    match = _ROW.search(output)
    if match is None:
        return None
    weights, state, compute = (int(size) * MIB for size in match.groups())
    return ReportedMemory(weights, state, compute)


def compare(plan: Plan, reported: ReportedMemory, vocabulary: int) -> str:
    """Return why the plan reserves too little; empty if it does not.

    llama.cpp counts logits for every token of a batch (``vocabulary`` values each), which we never use.
    """
    shares = (plan.host, *plan.shares)
    reserved = sum(share.weights + share.state + share.compute for share in shares)
    compute = max(reported.compute - vocabulary * plan.run.ubatch * 4, 0)
    needed = reported.weights + reported.state + compute
    if needed <= reserved:
        return ""
    return (
        f"llama.cpp says that {plan.model} needs {bytes_text(needed)} (tensors "
        f"{bytes_text(reported.weights)}, context {bytes_text(reported.state)}, computing "
        f"{bytes_text(compute)}), but {bytes_text(reserved)} were reserved: its architecture is unknown, and "
        "the estimate was too low. Ask for less context, or install a newer sollold"
    )


async def _ask(run: Run, model: Model, llama: Llama) -> ReportedMemory | None:
    command = question(run, model, llama)
    if not await asyncio.to_thread(Path(command[0]).is_file):
        return None
    try:
        process = await asyncio.create_subprocess_exec(
            *guarded(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**child_environment(), **ENVIRONMENT, "GGML_NO_BACKTRACE": "1"},
            start_new_session=True,
        )
    except OSError as error:
        log.info("%s could not be started: %s", PROGRAM, error)
        return None
    try:
        async with asyncio.timeout(ASK_SECONDS):
            output, _ = await process.communicate()
    except TimeoutError:
        log.info("%s did not answer for %s within %.0f s", PROGRAM, model.name, ASK_SECONDS)
        return None
    finally:
        if process.returncode is None:
            await asyncio.to_thread(kill_session, process.pid)
        with contextlib.suppress(TimeoutError):
            # It does not end while it waits in the kernel for a disk or network share.
            async with asyncio.timeout(_KILL_SECONDS):
                await process.wait()
    reported = answer(output[:65536].decode("utf-8", "replace"))
    if reported is None:
        log.info("%s gave no usable answer for %s (exit %s)", PROGRAM, model.name, process.returncode)
    return reported


def _key(plan: Plan, build: str) -> str:
    """Return a hash of everything that the result depends on."""
    return hashlib.sha256(f"{build} {plan.digest} {plan.run}".encode()).hexdigest()[:32]


def _vocabulary(path: str) -> int:
    try:
        return shape_of(reader.read(path)).n_vocab
    except (OSError, GgufError):
        return 0
