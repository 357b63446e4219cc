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
from sollold.models.gguf.writer import NewTensor
from tests.gguf import adapter, projector
from tests.gguf.architectures import ARCHITECTURES
from tests.gguf.size import Size
from tests.gguf.writer import write

MIB = 1024 * 1024


def _shape(tmp_path: Path, architecture: str, size: Size) -> Shape:
    return shape_of(gguf.read(write(tmp_path / "a.gguf", architecture, size)))


def _whole(guess: Footprint, devices: int = 1) -> int:
    layers = guess.layers + 1
    compute = guess.compute(0, layers, devices=devices, offloaded=layers)
    return sum(guess.weights) + sum(guess.state) + compute


def test_llama_by_hand(tmp_path: Path) -> None:
    shape = _shape(tmp_path, "llama", Size(layers=2, embd=256, heads=4, heads_kv=2, ff=512, vocab=512))
    guess = footprint(shape, Run(context=1024, slots=2))
    matrices = (256 * 256 * 2 + 256 * 128 * 2 + 3 * 256 * 512) // 32 * 34
    assert guess.weights[0] == matrices + 2 * 256 * 4
    assert guess.weights[2] == 256 * 512 // 32 * 34 + 256 * 4
    assert guess.host_weights == 256 * 512 // 32 * 34
    # Two slots of 512 cells, K and V rows of 128 elements of two bytes.
    assert guess.state == (2 * 512 * 2 * 128 * 2,) * 2
    assert guess.active == guess.weights
    # Logits and a hidden state for each slot, and what the vocabulary takes.
    assert guess.host_buffers == 2 * (512 + 256) * 4 + 512 * 400
    assert not guess.estimate


def test_context_is_padded_as_llama_cpp_does(tmp_path: Path) -> None:
    shape = _shape(tmp_path, "llama", Size(layers=1))
    row = 2 * 128 * 2
    assert footprint(shape, Run(context=1000, slots=3)).state == (3 * 512 * row,)
    assert footprint(shape, Run(context=1000, slots=3, unified=True)).state == (1024 * row,)


def test_a_window_needs_no_more_than_itself(tmp_path: Path) -> None:
    shape = _shape(tmp_path, "gpt-oss", Size(layers=2, window=128))
    windowed, full = footprint(shape, Run(context=32768, slots=1, ubatch=512)).state
    assert windowed * 32768 == full * 768


def test_checkpoints_are_counted_where_the_state_cannot_be_rolled_back(tmp_path: Path) -> None:
    run = Run(context=8192, slots=2, checkpoints=3)
    without = dataclasses.replace(run, checkpoints=0)
    windowed = _shape(tmp_path, "gemma3", Size(layers=8))
    guess = footprint(windowed, run)
    assert guess.checkpoints == 3
    assert guess.snapshots[5] == 0, "the sixth layer sees everything, and can be rolled back"
    assert guess.host_buffers - footprint(windowed, without).host_buffers == 3 * 2 * sum(guess.snapshots)
    assert guess.checkpoint_bytes == 3 * 2 * sum(guess.snapshots)
    recurrent = footprint(_shape(tmp_path, "mamba2", Size(layers=8)), run)
    assert sum(recurrent.snapshots) * 2 == sum(recurrent.state)
    full = _shape(tmp_path, "llama", Size(layers=8))
    assert footprint(full, run).checkpoints == footprint(full, run).checkpoint_bytes == 0
    assert footprint(windowed, dataclasses.replace(run, embedding=True)).checkpoints == 0


def test_checkpoints_take_no_more_than_they_bring(tmp_path: Path) -> None:
    shape = _shape(tmp_path, "gemma3", Size(layers=12, window=4096, heads_kv=4))
    guess = footprint(shape, Run(context=65536, slots=4, checkpoints=3))
    assert guess.checkpoints == guess.checkpoint_bytes == 0, "they would take more than the model"
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


def test_the_largest_tensor_of_each_layer(tmp_path: Path) -> None:
    shape = _shape(tmp_path, "llama", Size(layers=2, embd=256, ff=512, vocab=4096))
    guess = footprint(shape, Run(context=1024))
    assert guess.largest == (256 * 512 // 32 * 34,) * 2 + (256 * 4096 // 32 * 34,)
    tied = _shape(tmp_path, "llama", Size(layers=2, embd=256, ff=512, vocab=4096, tied=True))
    assert tied.largest_output == guess.largest[2]


def test_what_of_a_layer_are_experts(tmp_path: Path) -> None:
    shape = _shape(tmp_path, "glm4moe", Size(layers=3, experts=8, experts_used=2))
    guess = footprint(shape, Run(context=1024))
    experts = 3 * 8 * 256 * 128 // 32 * 34
    assert guess.experts == (0, experts, experts), "the first layer is dense, and shared experts stay"
    assert guess.active_experts(3) == 2 * experts * 2 // 8
    assert guess.lent_experts(1) == 0
    assert guess.lent_experts(3) == 2 * experts // 3


def test_a_tied_output_is_a_second_copy(tmp_path: Path) -> None:
    own = _shape(tmp_path, "llama", Size(layers=1))
    tied = _shape(tmp_path, "llama", Size(layers=1, tied=True))
    assert tied.output == own.output
    assert tied.host_weights == own.host_weights


def test_layers_for_next_token_prediction_take_nothing(tmp_path: Path) -> None:
    shape = _shape(tmp_path, "glm4moe", Size(layers=4, nextn=1))
    guess = footprint(shape, Run(context=4096))
    assert guess.layers == 4
    assert guess.weights[3] == guess.state[3] == 0
    assert guess.compute(3, 5, devices=2, offloaded=5) > 0


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_travels_whole_and_grows_with_the_run(tmp_path: Path, architecture: str) -> None:
    shape = _shape(tmp_path, architecture, Size(layers=8))
    sent = msgspec.msgpack.decode(msgspec.msgpack.encode(shape), type=Shape)
    assert sent == shape
    assert msgspec.json.decode(msgspec.json.encode(shape), type=Shape) == shape
    small = footprint(shape, Run(context=2048, ubatch=128, embedding=not shape.cached))
    big = footprint(shape, Run(context=8192, slots=4, ubatch=512, embedding=not shape.cached))
    assert len(small.weights) == len(small.active) == small.layers + 1 == 9
    assert len(small.state) == 8
    assert _whole(small) < _whole(big)
    assert not small.estimate
    for first in range(8):
        for last in range(first + 1, 10):
            assert small.compute(first, last, devices=1, offloaded=9) > 0
    assert small.compute(3, 3, devices=2, offloaded=9) == 0
    assert small.host_compute(devices=1, offloaded=9) < small.host_compute(devices=1, offloaded=3)


def test_pipelining_takes_more_than_one_device_and_all_layers(tmp_path: Path) -> None:
    guess = footprint(_shape(tmp_path, "llama", Size(layers=8)), Run(context=4096))
    alone = guess.compute(0, 4, devices=1, offloaded=9)
    assert guess.compute(0, 4, devices=2, offloaded=8) == alone
    assert guess.compute(0, 4, devices=2, offloaded=9) > alone


@pytest.mark.parametrize(
    "architecture", ["qwen3moe", "gemma3", "mimo2", "mamba2", "jamba", "qwen35", "rwkv7"]
)
def test_an_unknown_architecture_is_an_estimate_on_the_safe_side(tmp_path: Path, architecture: str) -> None:
    known = _shape(tmp_path, architecture, Size(layers=8))
    header = gguf.read(tmp_path / "a.gguf")
    metadata = {key.replace(f"{architecture}.", "brandnew."): value for key, value in header.metadata.items()}
    metadata["general.architecture"] = "brandnew"
    unknown = shape_of(dataclasses.replace(header, metadata=metadata))
    run = Run(context=8192, slots=2)
    guess, truth = footprint(unknown, run), footprint(known, run)
    assert guess.estimate
    assert guess.weights == truth.weights
    assert all(more >= enough for more, enough in zip(guess.state, truth.state, strict=True))
    assert _whole(guess) > _whole(truth)


def test_states_of_linear_attention_by_hand(tmp_path: Path) -> None:
    size = Size(layers=4, embd=256, heads=4)
    kimi = _shape(tmp_path, "kimi-linear", size)
    assert [layer.recurrent for layer in kimi.layers] == [4 * (4 * 64 * 64 + 3 * 3 * 4 * 64)] * 3 + [0]
    minimax = _shape(tmp_path, "minimax-01", size)
    assert [layer.recurrent for layer in minimax.layers] == [4 * 4 * 64 * 64] * 3 + [0]


def test_a_layer_that_nobody_knows_may_keep_a_square_a_head(tmp_path: Path) -> None:
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
    strange, attends = shape_of(gguf.read(path)).layers
    assert strange.recurrent >= 4 * 4 * 64 * 64
    assert attends.recurrent == 0


def test_a_header_that_says_nothing_gives_a_shape(tmp_path: Path) -> None:
    path = tmp_path / "odd.gguf"
    writer.write(path, {"general.architecture": "odd"}, [NewTensor("blk.99999999999.x", (8,), 0)])
    shape = shape_of(gguf.read(path))
    guess = footprint(shape, Run(context=0))
    assert guess.estimate
    assert _whole(guess) >= 0


def test_graph_reuses_what_is_done_with() -> None:
    graph = Graph()
    first = graph.add(1024)
    second = graph.add(1024, first)
    third = graph.add(1024, second, inplace=True)
    graph.add(1024, third)
    assert graph.peak() == 2048


def test_graph_keeps_what_is_still_needed() -> None:
    graph = Graph()
    first = graph.add(1024)
    second = graph.add(4096, first)
    third = graph.add(1024, first, second, inplace=True)
    graph.add(1024, third, kept=True)
    assert graph.peak() == 1024 + 4096


def test_graph_prefers_the_smallest_hole() -> None:
    graph = Graph()
    big, gap, small, wall = (graph.add(size) for size in (4096, 128, 1024, 128))
    graph.add(0, big)
    graph.add(0, small)
    late = graph.add(1024)
    graph.add(4096, late, gap, wall)
    assert graph.peak() == 4096 + 128 + 1024 + 128


def test_graph_does_not_join_holes_around_an_empty_result() -> None:
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


def test_graph_tells_the_peaks_of_its_parts() -> None:
    graph = Graph()
    first = graph.add(4096)
    second = graph.add(1024, first)
    begins = len(graph)
    graph.add(1024, second)
    assert graph.peaks([begins, len(graph)]) == [4096 + 1024, 4096 + 1024]
    assert Graph().peaks([0]) == [0]


def test_what_turns_values_back_follows_a_recurrent_layers_state_to_the_next_device(tmp_path: Path) -> None:
    shape = _shape(tmp_path, "nemotron_h", Size(layers=8))
    plain = footprint(shape, Run(context=4096, slots=2))
    turned = footprint(shape, Run(context=4096, slots=2, type_v="q8_0"))
    hidden, pipelined = 256 * 512 * 4, 4
    for first, last in ((0, 4), (4, 9)):
        more = turned.compute(first, last, devices=2, offloaded=9)
        less = plain.compute(first, last, devices=2, offloaded=9)
        # Attention is the last before the border that is asked for, a recurrent layer the first behind it.
        assert more - less >= pipelined * hidden


def test_adapters_lie_beside_what_they_change(tmp_path: Path) -> None:
    size = Size(layers=4)
    plain = _shape(tmp_path, "llama", size)
    adapted = with_adapters(plain, [gguf.read(adapter.write(tmp_path / "lora.gguf", "llama", size, rank=8))])
    pairs = 2 * (2 * 256 + 256 + 128) + 3 * (256 + 512)
    for before, after in zip(plain.layers, adapted.layers, strict=True):
        assert after.weights - before.weights == pairs * 8 * 2
    assert adapted.host_weights == plain.host_weights
    assert with_adapters(plain, []) == plain


def test_a_projector_stays_with_the_head(tmp_path: Path) -> None:
    plain = _shape(tmp_path, "llama", Size(layers=4))
    path = projector.write(tmp_path / "mmproj.gguf", 256)
    seen = with_projector(plain, gguf.read(path))
    assert seen.layers == plain.layers
    weights = sum(tensor.size for tensor in gguf.read(path).tensors)
    # llama-server says 0.05 MiB for its compute buffer.
    assert weights + 50_000 < seen.projector < weights + MIB
    guess, blind = footprint(seen, Run(context=1024)), footprint(plain, Run(context=1024))
    assert guess.host_weights - blind.host_weights == guess.projector == seen.projector


def test_a_projector_takes_what_its_biggest_image_needs_and_no_more(tmp_path: Path) -> None:
    def seen(kind: str, image: int, **more: int) -> int:
        metadata = {
            "general.architecture": "clip",
            "clip.projector_type": kind,
            "clip.vision.image_size": image,
            "clip.vision.patch_size": 14,
            "clip.vision.embedding_length": 1024,
            "clip.vision.feed_forward_length": 4096,
            "clip.vision.attention.head_count": 16,
        } | {f"clip.vision.{key}": value for key, value in more.items()}
        path = tmp_path / f"{kind}.gguf"
        writer.write(path, metadata, [NewTensor("v.class_embd", (64,), 0)])
        return with_projector(_shape(tmp_path, "llama", Size(layers=1)), gguf.read(path)).projector

    # Mistral Small: a thousand tokens at most, however large the images that it was trained with.
    assert 100 * MIB < seen("pixtral", 1540, spatial_merge_size=2) < 400 * MIB
    # The header says it.
    assert 2 * 1024 * MIB < seen("dots_ocr", 728, image_max_pixels=11289600) < 5 * 1024 * MIB
    assert seen("of tomorrow", 728, image_max_pixels=11289600) == seen(
        "dots_ocr", 728, image_max_pixels=11289600
    )
    # Four thousand tokens of four places, and with windows a mask over all of them.
    plain = seen("qwen2vl_merger", 560)
    assert plain > 500 * MIB
    assert seen("qwen2.5vl_merger", 560, n_wa_pattern=8) - plain == 6 * (4096 * 4 + 1) ** 2
    # All of one size.
    assert 300 * MIB < seen("mlp", 672) < 600 * MIB


@pytest.mark.parametrize("architecture", ["glm4moe", "deepseek2", "qwen35", "qwen35moe"])
def test_a_layer_that_can_draft_takes_nothing_until_it_does(tmp_path: Path, architecture: str) -> None:
    shape = _shape(tmp_path, architecture, Size(layers=5, nextn=1))
    assert shape.predicting is not None and shape.predicting.layer.weights > 0
    idle = footprint(shape, Run(context=4096, slots=2, drafts=3))
    assert idle.weights[4] == idle.state[4] == 0 and idle.predicted > 0
    drafts = footprint(shape, Run(context=4096, slots=2, drafts=3, predicts=True))
    assert drafts.weights[4] == shape.predicting.layer.weights and drafts.state[4] > 0
    assert drafts.active == idle.active, "a token that is not drafted does not visit it"
    assert drafts.host_buffers > idle.host_buffers
    for devices in (1, 2):
        apart = [one.compute(0, 4, devices=devices, offloaded=6) for one in (idle, drafts)]
        assert apart[0] <= apart[1]
        ends = [one.compute(4, 6, devices=devices, offloaded=6) for one in (idle, drafts)]
        assert ends[0] < ends[1]
    states = [sum(one.state[:4]) for one in (idle, drafts)]
    assert (states[0] < states[1]) == drafts.recurrent, "a recurrent state is kept for each token of a draft"


def test_which_layers_can_draft(tmp_path: Path) -> None:
    assert _shape(tmp_path, "glm4moe", Size(layers=5)).predicting is None
    assert _shape(tmp_path, "glm4moe", Size(layers=5, nextn=2)).predicting is None, "llama.cpp takes one"
    assert _shape(tmp_path, "qwen3moe", Size(layers=5, nextn=1)).predicting is None
    scaled = Size(layers=5, nextn=1, more={"attention.temperature_scale": 0.1})
    assert _shape(tmp_path, "deepseek2", scaled).predicting is None
    # The header names the layer, and the file has been written without it.
    bare = Size(layers=5, more={"block_count": 6, "nextn_predict_layers": 1})
    assert _shape(tmp_path, "glm4moe", bare).predicting is None
