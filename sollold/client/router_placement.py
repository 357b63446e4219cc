"""A router's wishes for where its models run. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sollold.client.arguments import check_model
from sollold.client.backends import backend_addresses
from sollold.client.generation import Record
from sollold.client.profiles import plain_name, wanted_by_user
from sollold.client.router_options import RouterOptions

_ANY_SIZE = 1e-6
"""A threshold, in billions of parameters, that every model exceeds."""


class RouterPlacement:
    """Base of `HybridRouter`, which explains the arguments."""

    def __init__(self, options: RouterOptions) -> None:
        """``options``: as returned by `checked_options`."""
        self.enable_distributed = options.get("enable_distributed", True)
        self.model_filter = options["model_filter"]
        self._backends = backend_addresses(options.get("rpc_backends"))
        self._auto_discover = options.get("auto_discover_rpc", True)
        self._workers = options.get("num_rpc_backends")
        self._threshold = options.get("distributed_threshold_params")
        self._policy = options.get("layer_strategy")
        self._path = options["gguf_path"]

    def placement(self, model: str) -> Record:
        """Placement wishes for loads caused by this router's requests; empty: the settings decide."""
        check_model(model)
        wanted: Record = {}
        profile = wanted_by_user(model)
        if not self._may_distribute(model):
            wanted["distributed"] = False
        else:
            if self._workers is not None:
                wanted["workers"] = self._workers
            if profile is not None and self._must_distribute(profile):
                wanted["threshold"] = _ANY_SIZE
            elif self._threshold is not None:
                wanted["threshold"] = self._threshold
            if self._policy is not None:
                wanted["policy"] = self._policy
            if self._backends:
                wanted["external"] = list(self._backends)
            elif not self._auto_discover:
                wanted["external"] = []
        if self._path is not None and self._in_filter(model):
            wanted["file"] = self._path
        return wanted

    def _must_distribute(self, profile: Mapping[str, Any]) -> bool:
        """Whether the model's profile requires it to be spread."""
        billions = float(profile.get("parameter_count") or 0)
        exceeds = self._threshold is not None and 0 < self._threshold <= billions
        return bool(profile.get("requires_distributed")) or exceeds

    def _may_distribute(self, model: str) -> bool:
        """Whether a model may be spread."""
        return self.enable_distributed and self._in_filter(model)

    def _in_filter(self, model: str) -> bool:
        return self.model_filter is None or plain_name(model) in map(plain_name, self.model_filter)
