"""The arguments of the asynchronous and blocking `HybridRouter`, whose docstring explains them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypedDict

from sollold.client.arguments import check_amount, check_count, check_flag, check_seconds, names_in
from sollold.client.pool import NodeNames

_STRATEGIES = (None, "memory_aware", "even", "fastest", "spread")


class RouterOptions(TypedDict, total=False):
    """Keyword arguments; by default the daemons' settings decide."""

    enable_distributed: bool
    auto_discover_rpc: bool
    auto_setup_rpc: bool
    num_rpc_backends: int | None
    rpc_backends: Mapping[str, Any] | str | Iterable[Mapping[str, Any] | str] | None
    distributed_threshold_params: float | None
    coordinator_timeout: float | None
    gguf_path: str | os.PathLike[str] | None
    model_filter: Iterable[str] | None
    layer_strategy: Literal["memory_aware", "even", "fastest", "spread"] | None
    node: NodeNames | None
    api_key: str | None


def checked_options(options: RouterOptions) -> RouterOptions:
    """Check the options, and normalize ``model_filter`` and ``gguf_path``.

    Raises:
        TypeError, ValueError: an option is unknown or invalid.
    """
    if unknown := options.keys() - RouterOptions.__annotations__.keys():
        raise TypeError(f"unexpected arguments: {', '.join(sorted(unknown))}")
    for name in ("enable_distributed", "auto_discover_rpc", "auto_setup_rpc"):
        check_flag(name, options.get(name, False))
    check_count(
        "num_rpc_backends", options.get("num_rpc_backends"), "enable_distributed=False spreads nothing"
    )
    check_amount("distributed_threshold_params", options.get("distributed_threshold_params"))
    check_seconds("coordinator_timeout", options.get("coordinator_timeout"))
    if (strategy := options.get("layer_strategy")) not in _STRATEGIES:
        raise ValueError(f'layer_strategy is "memory_aware" or "even", not {strategy!r}')
    path = options.get("gguf_path")
    if not isinstance(path, str | os.PathLike | None):
        raise TypeError(f"gguf_path must be a path, not {path!r}")
    return {
        **options,
        "model_filter": names_in("model_filter", options.get("model_filter")),
        "gguf_path": None if path is None else os.fspath(path),
    }
