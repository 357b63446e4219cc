"""Prediction of a model's memory footprint."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import msgspec
import pytest

from sollold.models.footprint.adapters import with_adapters, with_projector
from sollold.models.footprint.footprint import Footprint, footprint
from sollold.models.footprint.graph_allocator import Graph
from sollold.models.footprint.read_shape import shape_of
from sollold.models.footprint.run_options import Run
from sollold.models.footprint.shape import Shape
from sollold.models.gguf import reader as gguf
from sollold.models.gguf import writer
from sollold.models.gguf.writer import MetadataValue, NewTensor
from tests.gguf import adapter, projector
from tests.gguf.architectures import ARCHITECTURES
from tests.gguf.size import Size
from tests.gguf.writer import write

MIB = 1024 * 1024


def _shape(tmp_path: Path, architecture: str, size: Size) -> Shape:
    return shape_of(gguf.read(write(tmp_path / "a.gguf", architecture, size)))


def _total(guess: Footprint, devices: int = 1) -> int:
    layers = guess.layers + 1
    compute = guess.compute(0, layers, devices=devices, offloaded=layers)
    return sum(guess.weights) + sum(guess.state) + compute


def test_a_llama_footprint_equals_the_manual_calculation(tmp_path: Path) -> None:
    shape = _shape(tmp_path, "llama", Size(layers=2, embd=256, heads=4, heads_kv=2, ff=512, vocab=512))
    guess = footprint(shape, Run(context=1024, slots=2))
    matrices = (256 * 256 * 2 + 256 * 128 * 2 + 3 * 256 * 512) // 32 * 34
    assert guess.weights[0] == matrices + 2 * 256 * 4
    assert guess.weights[2] == 256 * 512 // 32 * 34 + 256 * 4
    assert guess.host_weights == 256 * 512 // 32 * 34
    # Two slots of 512 cells, K and V rows of 128 elements of two bytes.
    assert guess.state == (2 * 512 * 2 * 128 * 2,) * 2
    assert guess.active == guess.weights
    # Logits and a hidden state for each slot, and the vocabulary.
    assert guess.host_buffers == 2 * (512 + 256) * 4 + 512 * 400
    assert not guess.estimate


def test_context_is_padded_as_llama_cpp_does(tmp_path: Path) -> None:
    shape = _shape(tmp_path, "llama", Size(layers=1))
    row = 2 * 128 * 2
    assert footprint(shape, Run(context=1000, slots=3)).state == (3 * 512 * row,)
    assert footprint(shape, Run(context=1000, slots=3, unified=True)).state == (1024 * row,)


def test_a_windowed_layer_keeps_only_its_window_and_a_batch(tmp_path: Path) -> None:
    shape = _shape(tmp_path, "gpt-oss", Size(layers=2, window=128))
    windowed, full = footprint(shape, Run(context=32768, slots=1, ubatch=512)).state
    assert windowed * 32768 == full * 768


def test_checkpoints_are_counted_if_the_state_cannot_be_rolled_back(tmp_path: Path) -> None:
    run = Run(context=8192, slots=2, checkpoints=3)
    without = dataclasses.replace(run, checkpoints=0)
    windowed = _shape(tmp_path, "gemma3", Size(layers=8))
    guess = footprint(windowed, run)
    assert guess.checkpoints == 3
    assert guess.snapshots[5] == 0, "the sixth layer has full attention and can be rolled back"
    assert guess.host_buffers - footprint(windowed, without).host_buffers == 3 * 2 * sum(guess.snapshots)
    assert guess.checkpoint_bytes == 3 * 2 * sum(guess.snapshots)
    recurrent = footprint(_shape(tmp_path, "mamba2", Size(layers=8)), run)
    assert sum(recurrent.snapshots) * 2 == sum(recurrent.state)
    full = _shape(tmp_path, "llama", Size(layers=8))
    assert footprint(full, run).checkpoints == footprint(full, run).checkpoint_bytes == 0
    assert footprint(windowed, dataclasses.replace(run, embedding=True)).checkpoints == 0


def test_checkpoints_that_are_too_large_are_omitted(tmp_path: Path) -> None:
    shape = _shape(tmp_path, "gemma3", Size(layers=12, window=4096, heads_kv=4))
    guess = footprint(shape, Run(context=65536, slots=4, checkpoints=3))
    assert guess.checkpoints == guess.checkpoint_bytes == 0, "they would be larger than the model"
    alone = footprint(shape, Run(context=8192, slots=1, checkpoints=3))
    assert 1 <= alone.checkpoints <= 3
    assert alone.checkpoint_bytes <= 64 * MIB


def test_quantized_caches_are_smaller(tmp_path: Path) -> None:
    shape = _shape(tmp_path, "llama", Size(layers=1))
    plain = footprint(shape, Run(context=4096)).state[0]
    packed = footprint(shape, Run(context=4096, type_k="q8_0", type_v="q8_0")).state[0]
    assert packed * 64 == plain * 34


def test_only_the_experts_in_use_are_read(tmp_path: Path) -> None:
    shape = _shape(tmp_path, "qwen3moe", Size(layers=1, experts=8, experts_used=2))
    layer = shape.layers[0]
    experts = 3 * 8 * 256 * 128 // 32 * 34
    assert layer.weights - layer.active == experts * 6 // 8


def test_the_largest_tensor_of_each_layer_is_known(tmp_path: Path) -> None:
    shape = _shape(tmp_path, "llama", Size(layers=2, embd=256, ff=512, vocab=4096))
    guess = footprint(shape, Run(context=1024))
    assert guess.largest == (256 * 512 // 32 * 34,) * 2 + (256 * 4096 // 32 * 34,)
    tied = _shape(tmp_path, "llama", Size(layers=2, embd=256, ff=512, vocab=4096, tied=True))
    assert tied.largest_output == guess.largest[2]


def test_the_experts_of_a_layer_are_counted(tmp_path: Path) -> None:
    shape = _shape(tmp_path, "glm4moe", Size(layers=3, experts=8, experts_used=2))
    guess = footprint(shape, Run(context=1024))
    experts = 3 * 8 * 256 * 128 // 32 * 34
    assert guess.experts == (0, experts, experts), (
        "the first layer is dense, and shared experts are not counted"
    )
    assert guess.active_experts(3) == 2 * experts * 2 // 8
    assert guess.lent_experts(1) == 0
    assert guess.lent_experts(3) == 2 * experts // 3


def test_a_tied_output_is_counted_as_a_second_copy(tmp_path: Path) -> None:
    own = _shape(tmp_path, "llama", Size(layers=1))
    tied = _shape(tmp_path, "llama", Size(layers=1, tied=True))
    assert tied.output == own.output
    assert tied.host_weights == own.host_weights


def test_unused_layers_for_next_token_prediction_need_no_memory(tmp_path: Path) -> None:
    shape = _shape(tmp_path, "glm4moe", Size(layers=4, nextn=1))
    guess = footprint(shape, Run(context=4096))
    assert guess.layers == 4
    assert guess.weights[3] == guess.state[3] == 0
    assert guess.compute(3, 5, devices=2, offloaded=5) > 0


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_a_shape_survives_serialization_and_its_footprint_grows_with_the_run(
    tmp_path: Path, architecture: str
) -> None:
    shape = _shape(tmp_path, architecture, Size(layers=8))
    decoded = msgspec.msgpack.decode(msgspec.msgpack.encode(shape), type=Shape)
    assert decoded == shape
    assert msgspec.json.decode(msgspec.json.encode(shape), type=Shape) == shape
    small = footprint(shape, Run(context=2048, ubatch=128, embedding=not shape.cached))
    big = footprint(shape, Run(context=8192, slots=4, ubatch=512, embedding=not shape.cached))
    assert len(small.weights) == len(small.active) == small.layers + 1 == 9
    assert len(small.state) == 8
    assert _total(small) < _total(big)
    assert not small.estimate
    for first in range(8):
        for last in range(first + 1, 10):
            assert small.compute(first, last, devices=1, offloaded=9) > 0
    assert small.compute(3, 3, devices=2, offloaded=9) == 0
    assert small.host_compute(devices=1, offloaded=9) < small.host_compute(devices=1, offloaded=3)


def test_pipelining_requires_several_devices_and_all_layers_offloaded(tmp_path: Path) -> None:
    guess = footprint(_shape(tmp_path, "llama", Size(layers=8)), Run(context=4096))
    alone = guess.compute(0, 4, devices=1, offloaded=9)
    assert guess.compute(0, 4, devices=2, offloaded=8) == alone
    assert guess.compute(0, 4, devices=2, offloaded=9) > alone


@pytest.mark.parametrize(
    "architecture", ["qwen3moe", "gemma3", "mimo2", "mamba2", "jamba", "qwen35", "rwkv7"]
)
def test_an_unknown_architecture_is_overestimated(tmp_path: Path, architecture: str) -> None:
    known = _shape(tmp_path, architecture, Size(layers=8))
    header = gguf.read(tmp_path / "a.gguf")
    metadata = {key.replace(f"{architecture}.", "brandnew."): value for key, value in header.metadata.items()}
    metadata["general.architecture"] = "brandnew"
    unknown = shape_of(dataclasses.replace(header, metadata=metadata))
    run = Run(context=8192, slots=2)
    guess, exact = footprint(unknown, run), footprint(known, run)
    assert guess.estimate
    assert guess.weights == exact.weights
    assert all(estimated >= needed for estimated, needed in zip(guess.state, exact.state, strict=True))
    assert _total(guess) > _total(exact)


def test_states_of_linear_attention_equal_the_manual_calculation(tmp_path: Path) -> None:
    size = Size(layers=4, embd=256, heads=4)
    kimi = _shape(tmp_path, "kimi-linear", size)
    assert [layer.recurrent for layer in kimi.layers] == [4 * (4 * 64 * 64 + 3 * 3 * 4 * 64)] * 3 + [0]
    minimax = _shape(tmp_path, "minimax-01", size)
    assert [layer.recurrent for layer in minimax.layers] == [4 * 4 * 64 * 64] * 3 + [0]


def test_an_unknown_layer_is_assumed_to_keep_a_square_state_per_head(tmp_path: Path) -> None:
    path = tmp_path / "odd.gguf"
    metadata: dict[str, writer.MetadataValue] = {
        "general.architecture": "odd",
        "odd.block_count": 2,
        "odd.embedding_length": 256,
        "odd.attention.head_count": 4,
    }
    tensors = [
        NewTensor("blk.0.newmix_in.weight", (256, 256), 0),
        *(NewTensor(f"blk.1.attn_{part}.weight", (256, 256), 0) for part in ("q", "k", "v", "output")),
    ]
    writer.write(path, metadata, tensors)
    unknown, attention = shape_of(gguf.read(path)).layers
    assert unknown.recurrent >= 4 * 4 * 64 * 64
    assert attention.recurrent == 0


def test_a_header_without_facts_gives_a_shape(tmp_path: Path) -> None:
    path = tmp_path / "odd.gguf"
    writer.write(path, {"general.architecture": "odd"}, [NewTensor("blk.99999999999.x", (8,), 0)])
    shape = shape_of(gguf.read(path))
    guess = footprint(shape, Run(context=0))
    assert guess.estimate
    assert _total(guess) >= 0


@pytest.mark.parametrize("key", ["attention.head_count_kv", "attention.value_length", "block_count"])
def test_negative_numbers_in_a_header_count_as_missing(tmp_path: Path, key: str) -> None:
    header = gguf.read(write(tmp_path / "m.gguf", "llama", Size(layers=2)))
    shape = shape_of(dataclasses.replace(header, metadata={**header.metadata, f"llama.{key}": -(2**63)}))
    made = footprint(shape, Run(context=512))
    assert min(*made.state, *made.weights, made.compute(0, 1, devices=1, offloaded=2)) >= 0


def test_a_graph_reuses_memory_of_finished_tensors() -> None:
    graph = Graph()
    first = graph.add(1024)
    second = graph.add(1024, first)
    third = graph.add(1024, second, inplace=True)
    graph.add(1024, third)
    assert graph.peak() == 2048


def test_a_graph_keeps_tensors_that_are_still_needed() -> None:
    graph = Graph()
    first = graph.add(1024)
    second = graph.add(4096, first)
    third = graph.add(1024, first, second, inplace=True)
    graph.add(1024, third, kept=True)
    assert graph.peak() == 1024 + 4096


def test_a_graph_allocates_in_the_smallest_sufficient_hole() -> None:
    graph = Graph()
    big, gap, small, wall = (graph.add(size) for size in (4096, 128, 1024, 128))
    graph.add(0, big)
    graph.add(0, small)
    late = graph.add(1024)
    graph.add(4096, late, gap, wall)
    assert graph.peak() == 4096 + 128 + 1024 + 128


def test_a_graph_does_not_merge_holes_around_an_empty_tensor() -> None:
    graph = Graph()
    first = graph.add(1024)
    empty = graph.empty()
    second, third = graph.add(1024), graph.add(1024)
    graph.add(0, first)
    graph.add(0, second)
    graph.add(0, empty)
    graph.add(0, third)
    graph.add(4096)
    assert graph.peak() == 3072 + 4096


def test_a_graph_gives_the_peak_of_each_part() -> None:
    graph = Graph()
    first = graph.add(4096)
    second = graph.add(1024, first)
    begins = len(graph)
    graph.add(1024, second)
    assert graph.peaks([begins, len(graph)]) == [4096 + 1024, 4096 + 1024]
    assert Graph().peaks([0]) == [0]


def test_a_quantized_value_cache_needs_compute_memory_also_behind_a_recurrent_layer(tmp_path: Path) -> None:
    shape = _shape(tmp_path, "nemotron_h", Size(layers=8))
    plain = footprint(shape, Run(context=4096, slots=2))
    quantized = footprint(shape, Run(context=4096, slots=2, type_v="q8_0"))
    hidden, pipelined = 256 * 512 * 4, 4
    for first, last in ((0, 4), (4, 9)):
        more = quantized.compute(first, last, devices=2, offloaded=9)
        less = plain.compute(first, last, devices=2, offloaded=9)
        # The last layer before the split is an attention layer, the first behind it a recurrent one.
        assert more - less >= pipelined * hidden


def test_adapters_add_to_the_weights_of_their_layers(tmp_path: Path) -> None:
    size = Size(layers=4)
    plain = _shape(tmp_path, "llama", size)
    adapted = with_adapters(plain, [gguf.read(adapter.write(tmp_path / "lora.gguf", "llama", size, rank=8))])
    pairs = 2 * (2 * 256 + 256 + 128) + 3 * (256 + 512)
    for before, after in zip(plain.layers, adapted.layers, strict=True):
        assert after.weights - before.weights == pairs * 8 * 2
    assert adapted.host_weights == plain.host_weights
    assert with_adapters(plain, []) == plain


def test_a_projector_is_counted_on_the_head(tmp_path: Path) -> None:
    plain = _shape(tmp_path, "llama", Size(layers=4))
    path = projector.write(tmp_path / "mmproj.gguf", 256)
    projected = with_projector(plain, gguf.read(path))
    assert projected.layers == plain.layers
    weights = sum(tensor.size for tensor in gguf.read(path).tensors)
    # llama-server reports 0.05 MiB for its compute buffer.
    assert weights + 50_000 < projected.projector < weights + MIB
    guess, without = footprint(projected, Run(context=1024)), footprint(plain, Run(context=1024))
    assert guess.host_weights - without.host_weights == guess.projector == projected.projector


def test_a_projectors_memory_follows_from_its_largest_image(tmp_path: Path) -> None:
    def projector_bytes(kind: str, image: int, **more: int) -> int:
        metadata: dict[str, MetadataValue] = {
            "general.architecture": "clip",
            "clip.projector_type": kind,
            "clip.vision.image_size": image,
            "clip.vision.patch_size": 14,
            "clip.vision.embedding_length": 1024,
            "clip.vision.feed_forward_length": 4096,
            "clip.vision.attention.head_count": 16,
            **{f"clip.vision.{key}": value for key, value in more.items()},
        }
        path = tmp_path / f"{kind}.gguf"
        writer.write(path, metadata, [NewTensor("v.class_embd", (64,), 0)])
        return with_projector(_shape(tmp_path, "llama", Size(layers=1)), gguf.read(path)).projector

    # Mistral Small: at most a thousand tokens, whatever the size of the images it was trained with.
    assert 100 * MIB < projector_bytes("pixtral", 1540, spatial_merge_size=2) < 400 * MIB
    # The header states the maximum.
    assert 2 * 1024 * MIB < projector_bytes("dots_ocr", 728, image_max_pixels=11289600) < 5 * 1024 * MIB
    assert projector_bytes("of tomorrow", 728, image_max_pixels=11289600) == projector_bytes(
        "dots_ocr", 728, image_max_pixels=11289600
    )
    # Four thousand tokens of four patches, and with windows a mask over all of them.
    plain = projector_bytes("qwen2vl_merger", 560)
    assert plain > 500 * MIB
    assert projector_bytes("qwen2.5vl_merger", 560, n_wa_pattern=8) - plain == 6 * (4096 * 4 + 1) ** 2
    # All images have the same size.
    assert 300 * MIB < projector_bytes("mlp", 672) < 600 * MIB


@pytest.mark.parametrize("architecture", ["glm4moe", "deepseek2", "qwen35", "qwen35moe"])
def test_a_drafting_layer_needs_memory_only_when_it_drafts(tmp_path: Path, architecture: str) -> None:
    shape = _shape(tmp_path, architecture, Size(layers=5, nextn=1))
    assert shape.predicting is not None and shape.predicting.layer.weights > 0
    idle = footprint(shape, Run(context=4096, slots=2, drafts=3))
    assert idle.weights[4] == idle.state[4] == 0 and idle.predicted > 0
    drafts = footprint(shape, Run(context=4096, slots=2, drafts=3, predicts=True))
    assert drafts.weights[4] == shape.predicting.layer.weights and drafts.state[4] > 0
    assert drafts.active == idle.active, "a token that is not drafted does not use the layer"
    assert drafts.host_buffers > idle.host_buffers
    for devices in (1, 2):
        others = [guess.compute(0, 4, devices=devices, offloaded=6) for guess in (idle, drafts)]
        assert others[0] <= others[1]
        ends = [guess.compute(4, 6, devices=devices, offloaded=6) for guess in (idle, drafts)]
        assert ends[0] < ends[1]
    states = [sum(guess.state[:4]) for guess in (idle, drafts)]
    assert (states[0] < states[1]) == drafts.recurrent, "a recurrent state is stored for each drafted token"


def test_layers_that_cannot_draft_are_recognized(tmp_path: Path) -> None:
    assert _shape(tmp_path, "glm4moe", Size(layers=5)).predicting is None
    assert _shape(tmp_path, "glm4moe", Size(layers=5, nextn=2)).predicting is None, "llama.cpp supports one"
    assert _shape(tmp_path, "qwen3moe", Size(layers=5, nextn=1)).predicting is None
    scaled = Size(layers=5, nextn=1, more={"attention.temperature_scale": 0.1})
    assert _shape(tmp_path, "deepseek2", scaled).predicting is None
    # The header declares the layer, but the file does not contain its tensors.
    bare = Size(layers=5, more={"block_count": 6, "nextn_predict_layers": 1})
    assert _shape(tmp_path, "glm4moe", bare).predicting is None
