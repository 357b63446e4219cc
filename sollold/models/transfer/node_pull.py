"""Prepares the download of a model from the nodes that have it."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import replace

import aiohttp

from sollold.cluster.net.dialer import Dialer
from sollold.cluster.net.rpc import PeerError
from sollold.cluster.net.rpc_client import RpcClient
from sollold.models.model import Model
from sollold.models.transfer.download import BlockingSource, Source, SourceError
from sollold.models.transfer.fetch_files import Download
from sollold.models.transfer.peer_source import ModelFiles, NodeSource
from sollold.models.transfer.rate_limit import RateLimit
from sollold.models.transfer.socket_source import DirectSource
from sollold.models.transfer.verify import check_items


async def node_download(
    holders: tuple[tuple[str, Model], ...], calls: RpcClient, reach: Dialer | None, pace: RateLimit
) -> Download:
    """Return the download of a model from all of its ``holders`` (node, model) that can be reached.

    ``reach``: bytes come over dedicated sockets; None: over ``calls``, which is slower.

    Raises:
        PeerError, SourceError: none of them can be reached, or what they have can't be stored.
    """
    model = holders[0][1]
    sources: list[Source | BlockingSource] = []
    parcel: ModelFiles | None = None
    verifiers: dict[str, str] = {}
    fault: PeerError | None = None
    for node, _ in holders:
        source = NodeSource(calls, node, model.digest)
        try:
            offered = await source.parcel()
        except PeerError as error:
            fault = error
            continue
        # Another node may store the same content in different files.
        if parcel is None or [(i.name, i.size) for i in offered.items] == [
            (i.name, i.size) for i in parcel.items
        ]:
            parcel = parcel or offered
            if offered.hashes:
                verifiers[node] = f"node {node}" if reach is None else reach.name(node)
            if reach is not None:
                sources.append(DirectSource(reach, node, model.digest, pace.piece(DirectSource.PIECE)))
            else:
                sources.append(_Guarded(source))
    if parcel is None:
        raise fault or SourceError("no node that has it could be reached")
    items = parcel.items
    check_items(items)

    return Download(replace(model, source="own"), items, model.digest, sources, model.digest, verifiers)


class _Guarded:
    """A node as a source whose errors are `SourceError`, as `Downloader` expects."""

    def __init__(self, source: NodeSource) -> None:
        self.name = source.name
        self.patience = source.patience
        self._source = source

    async def read(self, index: int, start: int, end: int) -> AsyncGenerator[bytes]:
        try:
            async for piece in self._source.read(index, start, end):
                yield piece
        except (PeerError, aiohttp.ClientError, TimeoutError) as error:
            raise SourceError(str(error) or "no data was received in time") from None
