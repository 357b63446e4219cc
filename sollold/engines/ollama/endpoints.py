"""Publishes the models of this machine's Ollama as endpoints in the node's record."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import replace

from sollold.cluster.gossip.packet import RECORD_LIMIT, encode
from sollold.cluster.gossip.record import OLLAMA_PREFIX, Backend, Endpoint
from sollold.cluster.net.view import View
from sollold.engines.ollama.api import Loaded, OllamaApi, OllamaError, Tag
from sollold.engines.ollama.convert import endpoint_of, listed_model, most_room
from sollold.engines.ollama.loaded import LoadedModels, placement
from sollold.engines.ollama.runner_memory import RunnerMemory
from sollold.models.listing import template_refusal
from sollold.models.names import canonical, parse
from sollold.models.stores.catalogue import Catalogue

log = logging.getLogger("sollold.engines")

_MARGIN = 1.1
"""Minimum memory of a loaded model, per byte of its file."""
_EXPIRY_SECONDS = 10.0
"""Minimum interval between updates in which only expiry times change, in seconds."""
_SHOW_SECONDS = 1.0
"""Seconds after which no further model is asked about; the rest follow with the next list."""
_MAX_BYTES = RECORD_LIMIT * 3 // 4
"""Maximum encoded size of the models published: other nodes reject a record above its limit."""
_GATHER_SECONDS = 0.25
"""Interval in which changes of request counts are gathered into one record update, in seconds."""


class OllamaEndpoints:
    """The models that Ollama can serve, loaded or not.

    Attributes:
        endpoints: the endpoints as last published.
        loaded: the loaded models, and their use.
    """

    def __init__(self, view: View, catalogue: Catalogue, slots: Callable[[], int]) -> None:
        """``slots``: returns how many requests Ollama serves in parallel."""
        self._view = view
        self._catalogue = catalogue
        self._slots = slots
        self._tags: dict[str, Tag] = {}
        self._shown: dict[str, list[str]] = {}
        """Digest → what the model can do, where only Ollama reads its files."""
        self._reading = asyncio.Lock()
        self.loaded = LoadedModels()
        self.endpoints: tuple[Endpoint, ...] = ()
        self._runner_memory = RunnerMemory()
        self._resident: dict[str, int] = {}
        """File → bytes of RAM that its runner holds."""
        self._timer: asyncio.TimerHandle | None = None
        self._published_at = float("-inf")
        self._left_out = 0

    def has(self, name: str) -> bool:
        """Return whether Ollama has a model of exactly this name (ignoring case), even if too big to run."""
        try:
            key = parse(name).key
        except ValueError:
            return False
        return any(parse(known).key == key for known in self._tags)

    def loaded_bytes(self) -> dict[str, int]:
        """Return device → bytes of the loaded models."""
        sizes: dict[str, int] = {}
        for endpoint in self.endpoints:
            for placed in endpoint.placed:
                sizes[placed.device] = sizes.get(placed.device, 0) + placed.bytes
        return sizes

    async def read_tags(self, api: OllamaApi) -> None:
        """Ask for Ollama's list of models and take it over.

        Raises:
            OllamaError: it can't be asked.
        """
        # One at a time: an older list, held up by questions about its models, must not replace a newer one.
        async with self._reading:
            tags: dict[str, Tag] = {}
            for tag in await api.tags():
                with contextlib.suppress(ValueError):
                    name = canonical(tag.name)
                    if not tag.remote_host and not parse(name).cloud:
                        tags[name] = tag
            with contextlib.suppress(OllamaError):
                await self._show(api, tags)
            for tag in tags.values():
                tag.capabilities = self._shown.get(tag.digest) or tag.capabilities
            self._tags = tags
            self._catalogue.offer(tuple(listed_model(name, tag) for name, tag in tags.items()))

    async def _show(self, api: OllamaApi, tags: dict[str, Tag]) -> None:
        """Ask for the capabilities of models whose files can't be read here.

        The list of an older Ollama does not have them; that of a newer one leaves out those of a file's own
        chat template, such as tools.

        Raises:
            OllamaError: it does not answer now.
        """
        digests = {tag.digest for tag in tags.values()}
        self._shown = {digest: known for digest, known in self._shown.items() if digest in digests}
        loop = asyncio.get_running_loop()
        end = loop.time() + _SHOW_SECONDS
        for name, tag in tags.items():
            if tag.digest not in self._shown and not self._file(name) and loop.time() < end:
                self._shown[tag.digest] = await api.capabilities(tag.name)

    def use_loaded(self, loaded: list[Loaded]) -> None:
        """Take over Ollama's list of loaded models."""
        self.loaded.update(loaded, asyncio.get_running_loop().time())

    async def measure_runners(self) -> None:
        """Measure the runners' memory; a runner in a container or of another user may not be found."""
        files = [file for name in self._tags if self.loaded.get(name) and (file := self._file(name))]
        now = asyncio.get_running_loop().time()
        resident = await asyncio.to_thread(self._runner_memory.resident, files, now) if files else {}
        self._resident = resident

    def _file(self, name: str) -> str:
        """Path of a model's weights; empty if this node can't read it."""
        model = self._catalogue.get(name)
        return model.files[0] if model is not None and model.files else ""

    def clear(self) -> None:
        """Forget all models: Ollama is gone."""
        self._tags = {}
        self.loaded.clear()
        self._catalogue.offer(())
        self.publish()

    def close(self) -> None:
        """Cancel a pending `publish_soon`."""
        if self._timer is not None:
            self._timer.cancel()

    def publish_soon(self) -> None:
        """Publish changed request counts, several at a time."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_GATHER_SECONDS, self.publish)

    def publish(self) -> None:
        """Update this node's record if the endpoints have changed."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        endpoints = self._limited(
            endpoint for name, tag in sorted(self._tags.items()) if (endpoint := self._endpoint(name, tag))
        )
        self.loaded.forget_unused({endpoint.id for endpoint in endpoints})
        # A change of expiry times alone is published only now and then.
        now = asyncio.get_running_loop().time()
        same = [_without_expiry(e) for e in endpoints] == [_without_expiry(e) for e in self.endpoints]
        if endpoints != self.endpoints and not (same and now - self._published_at < _EXPIRY_SECONDS):
            self.endpoints, self._published_at = endpoints, now
            others = (e for e in self._view.me.endpoints if e.backend is not Backend.OLLAMA)
            self._view.update_me(endpoints=(*endpoints, *others))

    def _limited(self, found: Iterable[Endpoint]) -> tuple[Endpoint, ...]:
        """Return as many endpoints as a record carries, in the same order."""
        endpoints = tuple(found)
        kept, size = set(), 0
        # Those in use come first.
        for endpoint in sorted(endpoints, key=lambda e: not (e.loaded or e.active or e.waiting)):
            size += len(encode(endpoint))
            if size > _MAX_BYTES:
                break
            kept.add(endpoint.id)
        left_out = len(endpoints) - len(kept)
        if left_out and left_out != self._left_out:
            log.warning("Ollama has %d models; %d of them are not offered", len(endpoints), left_out)
        self._left_out = left_out
        return tuple(endpoint for endpoint in endpoints if endpoint.id in kept)

    def _endpoint(self, name: str, tag: Tag) -> Endpoint | None:
        """Return None for a model too big for this machine, unless only Ollama can run it."""
        me = self._view.me
        loaded = self.loaded.get(name)
        model = self._catalogue.get(name)
        only_here = model is not None and bool(model.only_ollama or template_refusal(model))
        if loaded is None and not only_here and tag.size * _MARGIN > most_room(me):
            return None
        use = self.loaded.use_of(OLLAMA_PREFIX + name)
        placed = placement(me, loaded, model, self._resident.get(self._file(name))) if loaded else ()
        return endpoint_of(name, tag, model, loaded, use, placed, slots=self._slots(), now=time.time())


def _without_expiry(endpoint: Endpoint) -> Endpoint:
    """Return the endpoint without its expiry, which changes all the time."""
    return replace(endpoint, expires=0.0)
