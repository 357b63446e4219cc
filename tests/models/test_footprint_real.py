"""Predicted footprints compared with the buffers that the real llama-server reports on each device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from sollold.models.footprint.adapters import with_projector
from sollold.models.footprint.read_shape import shape_of
from sollold.models.footprint.run_options import Run
from sollold.models.gguf import reader
from tests.gguf import adapter, llama_log, llama_run, projector, weights
from tests.gguf.architectures import ARCHITECTURES, EMBEDDERS, UNKNOWN
from tests.gguf.compare import MIB, Compared, compare, predicted
from tests.gguf.llama_run import Workers
from tests.gguf.size import Size
from tests.gguf.writer import write

pytestmark = [
    pytest.mark.llama,
    pytest.mark.skipif(
        not (llama_run.binary("llama-server") and llama_run.binary("ggml-rpc-server")),
        reason="llama.cpp is not built",
    ),
]

_SPLITS = {1: (9,), 2: (4, 5), 3: (3, 3, 3)}


@pytest.fixture(scope="module")
def rpc_workers() -> Iterator[Workers]:
    with llama_run.workers(3) as running:
        yield running


def _size(architecture: str) -> Size:
    # In Gemma 3n only the first twenty layers have caches, whatever the number of layers.
    return Size(layers=24 if architecture == "gemma3n" else 8)


def _split(architecture: str, devices: int) -> tuple[int, ...]:
    *split, rest = _SPLITS[devices]
    return (*split, rest + 16 if architecture == "gemma3n" else rest)


def _check(compared: list[Compared]) -> None:
    for device in compared:
        assert abs(device.weights[0] - device.weights[1]) <= MIB // 8, device
        assert abs(device.state[0] - device.state[1]) <= MIB // 8, device
        assert device.within, device


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_the_footprint_of_each_architecture_on_two_workers(
    tmp_path: Path, rpc_workers: Workers, architecture: str
) -> None:
    model = write(tmp_path / "a.gguf", architecture, _size(architecture))
    run = Run(context=4096, slots=2, embedding=architecture in EMBEDDERS)
    _check(compare(model, run, rpc_workers, _split(architecture, 2)))


@pytest.mark.parametrize("devices", _SPLITS)
@pytest.mark.parametrize("architecture", sorted(UNKNOWN))
def test_an_unknown_architecture_never_needs_more_than_estimated(
    tmp_path: Path, rpc_workers: Workers, architecture: str, devices: int
) -> None:
    model = write(tmp_path / "a.gguf", architecture, _size(architecture))
    run = Run(context=8192, slots=2, flash="on")
    assert predicted(model, run).estimate
    for device in compare(model, run, rpc_workers, _split(architecture, devices)):
        assert abs(device.weights[0] - device.weights[1]) <= MIB // 8, device
        assert device.state[0] >= device.state[1] - MIB // 8, device
        assert device.compute[0] >= device.compute[1] - MIB // 8, device


@pytest.mark.parametrize(
    ("architecture", "split", "run"),
    [
        ("nemotron_h", (4, 5), Run(context=4096, slots=2, type_k="q8_0", type_v="q8_0", flash="on")),
        ("nemotron_h", (2, 3), Run(context=4096, slots=2, flash="on")),
        ("nemotron_h_moe", (9,), Run(context=8192, slots=1, flash="on")),
        ("mamba2", (2, 3), Run(context=4096, slots=2, flash="on")),
        ("lfm2", (4, 5), Run(context=8192, slots=1, ubatch=1024, flash="on")),
        ("qwen3next", (1, 3, 3), Run(context=4096, slots=2, flash="on")),
        ("gemma4", (4, 5), Run(context=8192, slots=1, ubatch=1024, flash="on")),
        ("gemma4", (4, 5), Run(context=2048, slots=2, flash="off")),
        ("gemma4-moe", (3, 3, 3), Run(context=16384, slots=4, flash="on")),
        ("gemma3n", (25,), Run(context=8192, slots=1, flash="on")),
        ("gemma3n", (2, 19), Run(context=4096, slots=2, flash="on")),
        ("gemma3n", (4, 21), Run(context=2048, slots=2, flash="off")),
        ("rwkv6", (4, 5), Run(context=8192, slots=1, ubatch=1024, flash="on")),
        ("modern-bert", (2, 3), Run(context=4096, slots=2, embedding=True, flash="on")),
    ],
)
def test_wide_layers_of_different_kinds(
    tmp_path: Path, rpc_workers: Workers, architecture: str, split: tuple[int, ...], run: Run
) -> None:
    size = Size(
        layers=24 if architecture == "gemma3n" else 8,
        embd=1024,
        heads=16,
        heads_kv=4,
        ff=3072,
        ff_expert=512,
        experts=8,
        window=1024,
    )
    model = write(tmp_path / "a.gguf", architecture, size)
    _check(compare(model, run, rpc_workers, split))


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_memory_for_the_results_of_drafts(tmp_path: Path, rpc_workers: Workers, architecture: str) -> None:
    model = write(tmp_path / "a.gguf", architecture, Size(layers=8, vocab=32000))
    run = Run(context=4096, slots=4, flash="on", drafts=16)
    options: tuple[str, ...] = ("--spec-type", "ngram-simple", "--spec-ngram-simple-size-n", "8")
    *workers, host = compare(
        model, run, rpc_workers, (4, 5), more=(*options, "--spec-ngram-simple-size-m", "16")
    )
    _check(workers)
    # llama-server allocates the results of all drafts only when it has the first ones.
    assert host.predicted - host.actual <= 4 * 16 * (32000 + 512) * 4 + MIB


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gemma4", "qwen3moe"])
def test_a_draft_model_on_the_heads_cpu(tmp_path: Path, rpc_workers: Workers, architecture: str) -> None:
    model = write(tmp_path / "a.gguf", architecture, Size(layers=8, vocab=32000))
    small = write(tmp_path / "b.gguf", architecture, Size(layers=4, embd=128, vocab=32000), seed=2)
    run = Run(context=4096, slots=2, flash="on", drafts=4)
    options = ["--spec-type", "draft-simple", "--spec-draft-model", str(small), "--spec-draft-n-max", "4"]
    options += ("--spec-draft-device", "none", "--spec-draft-ngl", "0", "--no-spec-draft-backend-sampling")
    log = llama_run.loaded(model, run, rpc_workers, (4, 5), *options, prompt=[5, 6, 7])
    actual = llama_log.buffers(log.partition("loading draft model")[2], list(rpc_workers.endpoints))["CPU"]
    guess = predicted(small, replace(run, drafts=0))
    size = guess.host_tensors(5) + sum(guess.state) + guess.host_compute(devices=1, offloaded=0)
    assert -MIB // 16 <= size + guess.results - actual.total - actual.output <= 4 * MIB


def test_the_footprint_of_mxfp4_weights(tmp_path: Path, rpc_workers: Workers) -> None:
    model = write(tmp_path / "a.gguf", "gpt-oss", Size(layers=8, ff_expert=256, experts=8), kind="mxfp4")
    assert any(tensor.type == weights.MXFP4 for tensor in reader.read(model).tensors)
    _check(compare(model, Run(context=4096, slots=2), rpc_workers, (4, 5)))


@pytest.mark.parametrize("architecture", ["llama", "qwen3moe", "gemma3"])
def test_the_footprint_with_an_adapter(tmp_path: Path, rpc_workers: Workers, architecture: str) -> None:
    size = _size(architecture)
    model = write(tmp_path / "a.gguf", architecture, size)
    adapters = [adapter.write(tmp_path / "lora.gguf", architecture, size, rank=64)]
    _check(compare(model, Run(context=4096, slots=2), rpc_workers, (4, 5), adapters))


def test_the_projector_runs_on_the_head(tmp_path: Path, rpc_workers: Workers) -> None:
    model = write(tmp_path / "a.gguf", "llama", Size(layers=8))
    mmproj = projector.write(tmp_path / "mmproj.gguf", 256)
    options = ("--mmproj", str(mmproj), "--no-mmproj-offload")
    log = llama_run.loaded(model, Run(context=4096), rpc_workers, (9,), *options, prompt=[5, 6, 7])
    device, size = llama_log.projector(log)
    assert device == "CPU", "without the option llama-server uses the first device, a worker"
    guess = with_projector(shape_of(reader.read(model)), reader.read(mmproj)).projector
    assert size <= guess <= size + MIB


@pytest.mark.parametrize("windowed", [False, True])
def test_the_prediction_covers_a_projector_for_images_of_any_size(
    tmp_path: Path, rpc_workers: Workers, windowed: bool
) -> None:
    model = write(tmp_path / "a.gguf", "llama", Size(layers=8))
    mmproj = projector.write_merging(tmp_path / "mmproj.gguf", 256, windowed=windowed)
    options = ("--mmproj", str(mmproj), "--no-mmproj-offload", "--warmup")
    run = Run(context=4096, flash="on")
    log = llama_run.loaded(model, run, rpc_workers, (9,), *options, prompt=[5, 6, 7])
    used = llama_log.projector(log)[1] + llama_log.projector_compute(log)
    assert llama_log.projector_compute(log) > 20 * MIB
    guess = with_projector(shape_of(reader.read(model)), reader.read(mmproj)).projector
    # The largest image has nearly twice as many patches as the one used for the warmup.
    assert used <= guess <= 5 * used


_RUNS = {
    "one slot, small batches, one worker": (1, Run(context=8192, slots=1, ubatch=128)),
    "three workers": (3, Run(context=16384, slots=4)),
    "unified cache": (2, Run(context=4096, slots=4, unified=True)),
    "quantized caches": (2, Run(context=4096, slots=2, type_k="q8_0", type_v="q8_0")),
    "without flash attention": (3, Run(context=2048, slots=2, flash="off")),
}


_VARIED = [
    *("llama", "qwen3moe", "gemma3", "gemma4", "gpt-oss", "deepseek2"),
    *("jamba", "mamba2", "qwen35", "rwkv7"),
]


@pytest.mark.parametrize("case", _RUNS)
@pytest.mark.parametrize("architecture", _VARIED)
def test_the_footprint_with_each_kind_of_run(
    tmp_path: Path, rpc_workers: Workers, architecture: str, case: str
) -> None:
    devices, run = _RUNS[case]
    model = write(tmp_path / "a.gguf", architecture, _size(architecture))
    _check(compare(model, run, rpc_workers, _split(architecture, devices)))


@pytest.mark.parametrize("architecture", ["llama", "gemma3n", "nemotron_h"])
def test_some_layers_on_the_head(tmp_path: Path, rpc_workers: Workers, architecture: str) -> None:
    model = write(tmp_path / "a.gguf", architecture, _size(architecture))
    _check(compare(model, Run(context=4096, slots=2, flash="on"), rpc_workers, (2, 3)))


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gemma3n", "gemma4", "jamba", "bert"])
def test_all_layers_on_the_head(tmp_path: Path, rpc_workers: Workers, architecture: str) -> None:
    size = Size(layers=24 if architecture == "gemma3n" else 8, vocab=32000)
    model = write(tmp_path / "a.gguf", architecture, size)
    run = Run(context=4096, slots=2, embedding=architecture in EMBEDDERS)
    _check(compare(model, run, rpc_workers, ()))


@pytest.mark.parametrize("architecture", ["gemma3", "gpt-oss", "jamba", "qwen35", "rwkv7", "llama"])
def test_the_size_of_a_slots_checkpoints(tmp_path: Path, rpc_workers: Workers, architecture: str) -> None:
    model = write(tmp_path / "a.gguf", architecture, _size(architecture))
    run = Run(context=8192, slots=2, checkpoints=3)
    guess = predicted(model, run)
    tokens = [5 + place % 400 for place in range(1500)]
    sizes = llama_log.checkpoints(llama_run.loaded(model, run, rpc_workers, (9,), prompt=tokens))
    assert bool(sizes) == bool(guess.checkpoints) == (architecture != "llama")
    for size in sizes:
        assert -1024 <= sum(guess.snapshots) - size <= max(size // 10, 4096), (size, guess.snapshots)


@pytest.mark.parametrize("architecture", ["qwen3moe", "gpt-oss", "glm4moe", "gemma4-moe"])
def test_experts_on_the_head(tmp_path: Path, rpc_workers: Workers, architecture: str) -> None:
    size = Size(layers=8, embd=512, ff_expert=512, experts=16)
    model = write(tmp_path / "a.gguf", architecture, size)
    run = Run(context=4096, slots=2)
    guess = predicted(model, run)
    log = llama_run.loaded(model, run, rpc_workers, (9,), "--n-cpu-moe", "5")
    actual = llama_log.buffers(log, list(rpc_workers.endpoints))
    on_head = sum(guess.experts[:5])
    assert on_head > 0
    assert abs(sum(guess.weights) - on_head - actual["RPC0"].model) <= MIB // 8
    assert abs(guess.host_weights + on_head - actual["CPU"].model) <= MIB // 8
    assert abs(sum(guess.state) - actual["RPC0"].state) <= MIB // 8
    # Experts on the head are not copied to a worker: its compute buffer is at most that of the whole model.
    assert actual["RPC0"].compute <= guess.compute(0, 9, devices=1, offloaded=9) + MIB
    host = guess.host_compute(devices=1, offloaded=9) + guess.host_experts(5)
    assert -MIB // 8 <= host - actual["CPU"].compute <= 16 * MIB


def test_an_unused_layer_for_next_token_prediction(tmp_path: Path, rpc_workers: Workers) -> None:
    model = write(tmp_path / "a.gguf", "glm4moe", Size(layers=8, nextn=1))
    _check(compare(model, Run(context=4096, slots=2), rpc_workers, (4, 5)))


def test_a_wide_model(tmp_path: Path, rpc_workers: Workers) -> None:
    size = Size(layers=6, embd=2048, heads=16, heads_kv=4, ff=6144, vocab=32000)
    model = write(tmp_path / "a.gguf", "llama", size, kind="q4_0")
    _check(compare(model, Run(context=32768, slots=4), rpc_workers, (3, 4)))


@pytest.mark.parametrize(
    ("architecture", "split", "run"),
    [
        ("glm4moe", (5, 5), Run(context=4096, slots=2, flash="on")),
        ("glm4moe", (9, 1), Run(context=4096, slots=2, flash="on")),
        ("deepseek2", (2, 3), Run(context=4096, slots=2, flash="on")),
        ("deepseek2", (5, 5), Run(context=4096, slots=2, flash="on", type_k="q8_0", type_v="q8_0")),
        ("qwen35", (3, 3, 4), Run(context=8192, slots=4, flash="on")),
        ("qwen35", (5, 5), Run(context=8192, slots=1, ubatch=1024, flash="on")),
        ("qwen35moe", (10,), Run(context=4096, slots=2, flash="on")),
    ],
)
def test_a_drafting_layer_for_next_token_prediction(
    tmp_path: Path, rpc_workers: Workers, architecture: str, split: tuple[int, ...], run: Run
) -> None:
    model = write(tmp_path / "a.gguf", architecture, Size(layers=9, nextn=1, vocab=8000))
    _check(compare(model, replace(run, drafts=3, predicts=True), rpc_workers, split))
