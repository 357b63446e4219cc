"""The tensors that a worker will need: the large ones of its layers."""

from __future__ import annotations

from dataclasses import replace

from sollold.engines.llamacpp.wanted_tensors import wanted_tensors
from sollold.models.footprint.run_options import Run
from sollold.models.gguf.header import Header, Tensor, Value
from sollold.placement.plan import Plan, Share

BIG, SMALL = 11 << 20, 10 << 20
FILES = ("/m/1.gguf", "/m/2.gguf")


def tensor(name: str, start: int, size: int = BIG, file: int = 0) -> Tensor:
    return Tensor(name, (1024, size // 1024), 8, size, start, file)


TENSORS = (
    tensor("token_embd.weight", 0),
    tensor("blk.0.ffn_up.weight", 100),
    tensor("blk.1.ffn_up.weight", 200),
    tensor("blk.1.attn_k.weight", 300, SMALL),
    tensor("blk.2.ffn_up_exps.weight", 50, file=1),
    tensor("blk.2.ffn_down.weight", 10, file=1),
    tensor("output.weight", 400),
)
HEADER = Header(FILES, 0, 3, {}, TENSORS)


def share(node: str, first: int, last: int, device: str = "CPU") -> Share:
    return Share(node, device, first, last, 0, 0, 0)


PLAN = Plan("m", "d", "a", 3, Run(512, 1), share("a", 0, 1), (share("b", 1, 2), share("c", 2, 4)))


def names(node: str, plan: Plan = PLAN, header: Header = HEADER) -> list[str]:
    return [item.name for item in wanted_tensors(plan, node, header, FILES)]


def test_large_tensors_of_the_layers_are_listed_in_file_order() -> None:
    assert names("b") == ["blk.1.ffn_up.weight"]
    assert names("c") == ["output.weight", "blk.2.ffn_down.weight", "blk.2.ffn_up_exps.weight"]
    assert names("d") == []
    (item,) = wanted_tensors(PLAN, "b", HEADER, FILES)
    assert (item.file, item.start, item.size, item.type, item.shape) == (
        0,
        200,
        BIG,
        8,
        (1024, BIG // 1024, 1, 1),
    )


def test_a_tied_embedding_is_listed_with_the_output() -> None:
    tied = replace(HEADER, tensors=TENSORS[:-1])
    assert names("c", header=tied)[0] == "token_embd.weight"
    assert "token_embd.weight" not in names("b", header=tied)


def test_experts_on_the_head_are_not_listed() -> None:
    assert names("c", replace(PLAN, cpu_moe=3)) == ["output.weight", "blk.2.ffn_down.weight"]


def test_unused_layers_for_next_token_prediction_are_not_listed() -> None:
    metadata: dict[str, Value] = {"general.architecture": "glm4moe", "glm4moe.nextn_predict_layers": 1}
    header = replace(HEADER, metadata=metadata)
    assert names("c", header=header) == ["output.weight"]
    drafts = replace(PLAN, run=replace(PLAN.run, drafts=2, predicts=True))
    assert names("c", drafts, header) == names("c"), "unless they draft"


def test_external_workers_need_no_tensors() -> None:
    plan = replace(PLAN, shares=(share("b", 1, 2, "RPC0@10.0.0.9:50052"), share("c", 2, 4)))
    assert names("b", plan) == []
