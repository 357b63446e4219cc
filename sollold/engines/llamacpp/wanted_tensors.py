"""Computes which tensors of a model's files a worker will be asked for by their hash. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from sollold.engines.commands import WantedTensor
from sollold.engines.llamacpp.hash_frames import HASHED_OVER
from sollold.machine.external_worker import external_address
from sollold.models.footprint.read_shape import block_of
from sollold.models.gguf.header import Header, Tensor
from sollold.placement.plan import Plan

_OUTPUT, _EMBEDDING = "output.weight", "token_embd.weight"


def wanted_tensors(plan: Plan, node: str, header: Header, files: Sequence[str]) -> tuple[WantedTensor, ...]:
    """Return the tensors that the layers of ``node`` need, in file order.

    ``files``: the model's files; a tensor refers to its file by index.
    """
    spans = [
        (share.first, share.last)
        for share in plan.shares
        if share.node == node and not external_address(share.device)
    ]
    # Layers for multi-token prediction come last, and are loaded only if they draft.
    predicting = max(header.integer(f"{header.architecture}.nextn_predict_layers"), 0)
    predicting *= not plan.run.predicts
    unread = range(plan.layers - predicting, plan.layers)
    tied = not any(tensor.name == _OUTPUT for tensor in header.tensors)
    found = []
    for tensor in header.tensors:
        layer = _layer(tensor, plan.layers, tied)
        path = header.files[tensor.file]
        if tensor.size <= HASHED_OVER or layer is None or path not in files:
            continue
        if layer in unread or (layer < plan.cpu_moe and "_exps." in tensor.name):
            continue
        if any(first <= layer < last for first, last in spans):
            shape = (*tensor.shape, 1, 1, 1)[:4]
            found.append(
                WantedTensor(tensor.name, files.index(path), tensor.offset, tensor.size, tensor.type, shape)
            )
    return tuple(sorted(found, key=lambda wanted: (wanted.file, wanted.start)))


def _layer(tensor: Tensor, layers: int, tied: bool) -> int | None:
    """Return the layer that needs a tensor, the output being the last; None if it stays with the head."""
    block = block_of(tensor)
    if block is not None:
        return block
    # A model without an output matrix uses its embedding a second time.
    return layers if tensor.name == (_EMBEDDING if tied else _OUTPUT) else None
