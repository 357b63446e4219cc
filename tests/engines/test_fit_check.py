"""Memory requirements of models with unknown architectures, as reported by llama.cpp."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from sollold.cluster.gossip.record import State
from sollold.engines.install.find import Llama
from sollold.engines.llamacpp import fit_check
from sollold.engines.llamacpp.fit_check import FitCheck, ReportedMemory, answer, compare, question
from sollold.models.footprint.footprint import footprint
from sollold.models.footprint.read_shape import shape_of
from sollold.models.footprint.run_options import Run
from sollold.models.gguf import reader
from sollold.models.model import Model
from sollold.placement.plan import Plan, Share
from sollold.settings.schema import MIB
from tests.agent_cluster import plan, running_agents
from tests.gguf.size import Size
from tests.gguf.writer import write

RUN = Run(context=4096, slots=2, flash="on")
LLAMA = Llama(Path("/l/llama-server"), Path("/l/ggml-rpc-server"), "b1", frozenset())
UNKNOWN = Model("strange:latest", "e" * 64, "folder", ("/m/strange.gguf",), 1, 0.0, layers=8)


def plan_with(model: Model, run: Run, weights: int, state: int, compute: int) -> Plan:
    host = Share("a", "CPU", 0, model.layers + 1, weights, state, compute)
    return Plan(model.name, model.digest, "a", model.layers, run, host, (), estimate=True)


def estimated(model: Model, run: Run) -> Plan:
    guess = footprint(shape_of(reader.read(model.files[0])), run)
    assert guess.estimate
    compute = guess.host_compute(devices=0, offloaded=0) + guess.host_buffers
    return plan_with(model, run, guess.host_weights + sum(guess.weights), sum(guess.state), compute)


def test_the_program_is_run_for_the_whole_model_on_the_cpu() -> None:
    arguments = question(RUN, UNKNOWN, LLAMA)
    assert arguments[:3] == ["/l/llama-fit-params", "--model", "/m/strange.gguf"]
    assert arguments[arguments.index("--device") + 1] == "none"
    assert arguments[arguments.index("--ctx-size") + 1] == "4096"
    assert "--lora" not in arguments
    adapted = question(RUN, replace(UNKNOWN, adapters=("/m/a.gguf", "/m/b.gguf")), LLAMA)
    assert adapted[adapted.index("--lora") + 1] == "/m/a.gguf,/m/b.gguf"


def test_the_programs_output_is_parsed() -> None:
    assert answer("noise\nHost 141 32 64 \n") == ReportedMemory(141 * MIB, 32 * MIB, 64 * MIB)
    assert answer("error: invalid argument\n") is None
    assert answer("Host x 1 2") is None


def test_a_plan_with_too_little_memory_is_refused_with_the_sizes() -> None:
    logits = 1000 * RUN.ubatch * 4
    reported = ReportedMemory(100 * MIB, 20 * MIB, 10 * MIB + logits)
    assert compare(plan_with(UNKNOWN, RUN, 100 * MIB, 20 * MIB, 10 * MIB), reported, 1000) == ""
    reason = compare(plan_with(UNKNOWN, RUN, 100 * MIB, 5 * MIB, 10 * MIB), reported, 1000)
    assert "130 MiB" in reason
    assert "115 MiB" in reason
    assert "strange:latest" in reason


async def test_a_plan_that_is_not_an_estimate_is_not_checked(tmp_path: Path) -> None:
    known = replace(plan_with(UNKNOWN, RUN, 0, 0, 0), estimate=False)
    assert await FitCheck(tmp_path / "oracle.json").check(known, UNKNOWN, LLAMA) == ""


async def test_without_the_program_every_plan_is_accepted(tmp_path: Path) -> None:
    nowhere = replace(LLAMA, server=tmp_path / "llama-server")
    check = FitCheck(tmp_path / "oracle.json")
    assert await check.check(plan_with(UNKNOWN, RUN, 0, 0, 0), UNKNOWN, nowhere) == ""
    assert not (tmp_path / "oracle.json").exists()


@pytest.mark.llama
@pytest.mark.parametrize("architecture", ["kimi-linear", "minimax-01", "deepseek32", "bailingmoe2"])
async def test_the_real_program_accepts_the_estimate(tmp_path: Path, llama: Llama, architecture: str) -> None:
    file = write(tmp_path / "a.gguf", architecture, Size(layers=8, vocab=4096))
    model = replace(UNKNOWN, files=(str(file),))
    check = FitCheck(tmp_path / "oracle.json")
    assert await check.check(estimated(model, RUN), model, llama) == ""
    assert (tmp_path / "oracle.json").is_file()
    host = estimated(model, RUN).host
    short = plan_with(model, RUN, host.weights // 4, host.state // 4, host.compute // 4)
    assert "its architecture is unknown" in await check.check(short, model, llama)


class Stuck:
    """A program that waits in the kernel for a disk: it gives no output and can't be killed."""

    returncode = None
    pid = 2**30
    """Of no process."""

    async def wait(self) -> None:
        await asyncio.Event().wait()

    async def communicate(self) -> None:
        await asyncio.Event().wait()


async def test_a_program_that_can_not_be_killed_does_not_hold_up_the_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def start(*command: str, **options: object) -> Stuck:
        return Stuck()

    monkeypatch.setattr(asyncio, "create_subprocess_exec", start)
    monkeypatch.setattr(fit_check, "ASK_SECONDS", 0.01)
    monkeypatch.setattr(fit_check, "_KILL_SECONDS", 0.01)
    (tmp_path / fit_check.PROGRAM).touch()
    llama = Llama(tmp_path / "llama-server", tmp_path / "ggml-rpc-server", "b1", frozenset())
    check = FitCheck(tmp_path / "oracle.json").check(plan_with(UNKNOWN, RUN, 0, 0, 0), UNKNOWN, llama)
    assert await asyncio.wait_for(check, 5.0) == ""


@pytest.mark.llama
async def test_the_program_runs_once_for_each_file_and_run(
    tmp_path: Path, llama: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "a.gguf", "kimi-linear", Size(layers=4))
    model = replace(UNKNOWN, files=(str(file),), layers=4)
    little = plan_with(model, RUN, 0, 0, 0)
    first = await FitCheck(tmp_path / "oracle.json").check(little, model, llama)
    assert first
    monkeypatch.setattr(fit_check, "PROGRAM", "not-there")
    assert await FitCheck(tmp_path / "oracle.json").check(little, model, llama) == first
    other = replace(little, run=replace(RUN, context=8192))
    assert await FitCheck(tmp_path / "oracle.json").check(other, model, llama) == ""


async def test_a_damaged_file_of_results_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "oracle.json").write_text("[")
    check = FitCheck(tmp_path / "oracle.json")
    nowhere = replace(LLAMA, server=tmp_path / "llama-server")
    assert await check.check(plan_with(UNKNOWN, RUN, 0, 0, 0), UNKNOWN, nowhere) == ""


@pytest.mark.llama
async def test_a_deployment_that_would_not_fit_is_not_started(folder: Path, llama: Llama) -> None:
    file = write(folder / "a.gguf", "kimi-linear", Size(layers=6))
    model = replace(UNKNOWN, files=(str(file),), layers=6)
    async with running_agents(folder, llama, "a", "b") as cluster:
        cluster.models[model.digest] = model
        short = replace(plan(model, "a", ("b", 3), size=MIB), estimate=True)
        assert (await cluster.deploy("d", short)).ok
        failed = await cluster.until("a", "d", State.FAILED)
        assert "its architecture is unknown" in failed.reason
        assert not (folder / "a/state/logs/d/llama-server.log").exists()
