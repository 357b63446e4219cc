"""The fillings of this node's workers' caches, by deployment. Peer method ``fill`` (`FillCache` → `Done`)."""

from __future__ import annotations

from collections.abc import Callable

from sollold.agent.cache_fill import CacheFill, Connect
from sollold.cluster.net.rpc_client import Calls
from sollold.engines.commands import Done, FillCache
from sollold.engines.llamacpp.hash_frames import FOUND, HashFrames
from sollold.engines.llamacpp.tensor_cache import TensorCache
from sollold.models.model import Model

_MOST_TENSORS = 16_384


class CacheFills:
    """Begins and ends them.

    Args:
        find_model: the model with this digest on this node, or None.
        connect: another node's files of a model.
    """

    def __init__(
        self,
        cache: TensorCache,
        calls: Calls,
        find_model: Callable[[str], Model | None],
        connect: Connect,
    ) -> None:
        self._cache = cache
        self._calls = calls
        self._find_model = find_model
        self._connect = connect
        self._fills: dict[str, CacheFill] = {}

    def begin(self, request: FillCache, granted: int) -> Done:
        """Begin one; ``granted``: bytes that the deployment has here."""
        if request.deployment in self._fills:
            return Done(True)
        sizes = [one.size for one in request.tensors]
        if len(sizes) > _MOST_TENSORS or min(sizes, default=1) < 1 or sum(sizes) > granted:
            return Done(False, "these are not the tensors of what is granted")
        local = self._find_model(request.digest)
        if local is not None and (local.unusable or not local.files):
            local = None
        fill = CacheFill(request, self._cache, local, self._calls, self._connect)
        self._fills[request.deployment] = fill
        fill.start()
        return Done(True)

    def gate(self, deployment: str) -> FillGate | None:
        """For the tunnel to the deployment's worker; None: nothing is made ready for it."""
        fill = self._fills.get(deployment)
        return FillGate(fill) if fill is not None else None

    async def end_deployment(self, deployment: str) -> None:
        """The model is loaded, or gone: end it."""
        fill = self._fills.pop(deployment, None)
        if fill is not None:
            await fill.close()


class FillGate(HashFrames):
    """Holds the hash of a tensor back until the worker can find it."""

    def __init__(self, fill: CacheFill) -> None:
        super().__init__()
        self._fill = fill

    async def settle(self) -> bytes:
        """Wait until what is asked for can be found, or will not be."""
        return FOUND if self.asked is not None and await self._fill.offer(self.asked) else b""
