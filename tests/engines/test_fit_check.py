"""llama.cpp is asked what a model takes whose architecture our table does not know."""

from __future__ import annotations

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
LLAMA = Llama(Path("/l/llama-server"), Path("/l/ggml-rpc-server"), "b1", "c", frozenset())
STRANGE = Model("strange:latest", "e" * 64, "folder", ("/m/strange.gguf",), 1, 0.0, layers=8)


def made(model: Model, run: Run, weights: int, state: int, compute: int) -> Plan:
    host = Share("a", "CPU", 0, model.layers + 1, weights, state, compute)
    return Plan(model.name, model.digest, "a", model.layers, run, host, (), estimate=True)


def estimated(model: Model, run: Run) -> Plan:
    guess = footprint(shape_of(reader.read(model.files[0])), run)
    assert guess.estimate
    compute = guess.host_compute(devices=0, offloaded=0) + guess.host_buffers
    return made(model, run, guess.host_weights + sum(guess.weights), sum(guess.state), compute)


def test_the_question_is_put_for_the_whole_on_the_processor():
    words = question(RUN, STRANGE, LLAMA)
    assert words[:3] == ["/l/llama-fit-params", "--model", "/m/strange.gguf"]
    assert words[words.index("--device") + 1] == "none"
    assert words[words.index("--ctx-size") + 1] == "4096"
    assert "--lora" not in words
    adapted = question(RUN, replace(STRANGE, adapters=("/m/a.gguf", "/m/b.gguf")), LLAMA)
    assert adapted[adapted.index("--lora") + 1] == "/m/a.gguf,/m/b.gguf"


def test_its_answer():
    assert answer("noise\nHost 141 32 64 \n") == ReportedMemory(141 * MIB, 32 * MIB, 64 * MIB)
    assert answer("error: invalid argument\n") is None
    assert answer("Host x 1 2") is None


def test_a_plan_that_sets_too_little_aside_is_refused_with_the_sizes():
    logits = 1000 * RUN.ubatch * 4
    told = ReportedMemory(100 * MIB, 20 * MIB, 10 * MIB + logits)
    assert compare(made(STRANGE, RUN, 100 * MIB, 20 * MIB, 10 * MIB), told, 1000) == ""
    said = compare(made(STRANGE, RUN, 100 * MIB, 5 * MIB, 10 * MIB), told, 1000)
    assert "130 MiB" in said
    assert "115 MiB" in said
    assert "strange:latest" in said


async def test_nothing_is_asked_for_a_model_that_the_table_knows(tmp_path: Path):
    known = replace(made(STRANGE, RUN, 0, 0, 0), estimate=False)
    assert await FitCheck(tmp_path / "oracle.json").check(known, STRANGE, LLAMA) == ""


async def test_without_the_program_nobody_objects(tmp_path: Path):
    nowhere = replace(LLAMA, server=tmp_path / "llama-server")
    asked = FitCheck(tmp_path / "oracle.json")
    assert await asked.check(made(STRANGE, RUN, 0, 0, 0), STRANGE, nowhere) == ""
    assert not (tmp_path / "oracle.json").exists()


@pytest.mark.llama
@pytest.mark.parametrize("architecture", ["kimi-linear", "minimax-01", "deepseek32", "bailingmoe2"])
async def test_the_real_one_has_no_objection_to_an_estimate(tmp_path: Path, llama: Llama, architecture: str):
    file = write(tmp_path / "a.gguf", architecture, Size(layers=8, vocab=4096))
    model = replace(STRANGE, files=(str(file),))
    asked = FitCheck(tmp_path / "oracle.json")
    assert await asked.check(estimated(model, RUN), model, llama) == ""
    assert (tmp_path / "oracle.json").is_file()
    host = estimated(model, RUN).host
    short = made(model, RUN, host.weights // 4, host.state // 4, host.compute // 4)
    assert "its architecture is unknown" in await asked.check(short, model, llama)


@pytest.mark.llama
async def test_it_is_asked_once_for_a_file_and_a_way_to_run(
    tmp_path: Path, llama: Llama, monkeypatch: pytest.MonkeyPatch
):
    file = write(tmp_path / "a.gguf", "kimi-linear", Size(layers=4))
    model = replace(STRANGE, files=(str(file),), layers=4)
    little = made(model, RUN, 0, 0, 0)
    first = await FitCheck(tmp_path / "oracle.json").check(little, model, llama)
    assert first
    monkeypatch.setattr(fit_check, "PROGRAM", "not-there")
    assert await FitCheck(tmp_path / "oracle.json").check(little, model, llama) == first
    other = replace(little, run=replace(RUN, context=8192))
    assert await FitCheck(tmp_path / "oracle.json").check(other, model, llama) == ""


async def test_a_spoilt_file_of_answers_is_begun_anew(tmp_path: Path):
    (tmp_path / "oracle.json").write_text("[")
    asked = FitCheck(tmp_path / "oracle.json")
    nowhere = replace(LLAMA, server=tmp_path / "llama-server")
    assert await asked.check(made(STRANGE, RUN, 0, 0, 0), STRANGE, nowhere) == ""


@pytest.mark.llama
async def test_a_deployment_that_would_not_fit_is_not_begun(folder: Path, llama: Llama):
    file = write(folder / "a.gguf", "kimi-linear", Size(layers=6))
    model = replace(STRANGE, files=(str(file),), layers=6)
    async with running_agents(folder, llama, "a", "b") as cluster:
        cluster.models[model.digest] = model
        short = replace(plan(model, "a", ("b", 3), size=MIB), estimate=True)
        assert (await cluster.deploy("d", short)).ok
        failed = await cluster.until("a", "d", State.FAILED)
        assert "its architecture is unknown" in failed.reason
        assert not (folder / "a/state/logs/d/llama-server.log").exists()
