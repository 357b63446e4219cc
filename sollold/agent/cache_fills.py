"""The `CacheFill` of each deployment on this node. Peer method ``fill`` (`FillCache` → `Done`)."""

from __future__ import annotations

from collections.abc import Callable

from sollold.agent.cache_fill import CacheFill, Connect
from sollold.cluster.net.rpc_client import RpcClient
from sollold.engines.commands import Done, FillCache
from sollold.engines.llamacpp.hash_frames import FOUND, HashFrames
from sollold.engines.llamacpp.tensor_cache import TensorCache
from sollold.models.model import Model

_MAX_TENSORS = 16_384


class CacheFills:
    """Starts and ends the fills.

    Args:
        find_model: returns the model with this digest on this node, or None.
        connect: opens another node's files of a model.
    """

    def __init__(
        self,
        cache: TensorCache,
        calls: RpcClient,
        find_model: Callable[[str], Model | None],
        connect: Connect,
    ) -> None:
        self._cache = cache
        self._calls = calls
        self._find_model = find_model
        self._connect = connect
        self._fills: dict[str, CacheFill] = {}

    def begin(self, request: FillCache, granted: int) -> Done:
        """Start filling; ``granted``: bytes granted to the deployment here."""
        if request.deployment in self._fills:
            return Done(True)
        sizes = [tensor.size for tensor in request.tensors]
        if len(sizes) > _MAX_TENSORS or min(sizes, default=1) < 1 or sum(sizes) > granted:
            return Done(False, "the tensors do not match the grant")
        local = self._find_model(request.digest)
        if local is not None and (local.unusable or not local.files):
            local = None
        fill = CacheFill(request, self._cache, local, self._calls, self._connect)
        self._fills[request.deployment] = fill
        fill.start()
        return Done(True)

    def gate(self, deployment: str) -> FillGate | None:
        """Return the gate for the tunnel to the deployment's worker; None if no fill is running."""
        fill = self._fills.get(deployment)
        return FillGate(fill) if fill is not None else None

    async def end_deployment(self, deployment: str) -> None:
        """Stop filling, since the model has loaded or is gone."""
        fill = self._fills.pop(deployment, None)
        if fill is not None:
            await fill.close()


class FillGate(HashFrames):
    """Holds back a tensor's hash until the worker can find the file."""

    def __init__(self, fill: CacheFill) -> None:
        super().__init__()
        self._fill = fill

    async def settle(self) -> bytes:
        """Wait until the tensor is available or given up; return the reply `FOUND`, or nothing."""
        return FOUND if self.asked is not None and await self._fill.offer(self.asked) else b""
