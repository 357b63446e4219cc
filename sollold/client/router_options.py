"""The arguments of a `HybridRouter`, asynchronous or blocking; its docstring says what each means."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypedDict

from sollold.client.pool import NodeNames


class RouterOptions(TypedDict, total=False):
    """What may be named; without it a model is placed as the daemons' settings say."""

    enable_distributed: bool
    auto_discover_rpc: bool
    auto_setup_rpc: bool
    num_rpc_backends: int | None
    rpc_backends: Sequence[Mapping[str, Any] | str] | None
    distributed_threshold_params: float | None
    coordinator_timeout: float | None
    gguf_path: str | os.PathLike[str] | None
    model_filter: Iterable[str] | None
    layer_strategy: Literal["memory_aware", "even", "fastest", "spread"] | None
    node: NodeNames | None
    api_key: str | None
