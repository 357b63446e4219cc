"""Stores recent responses of ``/v1/responses`` on the node that created them, readable through every node.

Each response id contains the id of the node that stores it, so that other nodes know which one to ask. Peer
method: ``response`` (`ResponseRequest` → `ResponseReply`).
"""

from __future__ import annotations

import asyncio
import secrets
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import msgspec

from sollold.cluster.net.rpc import PeerError
from sollold.cluster.net.rpc_client import RpcClient
from sollold.cluster.net.rpc_server import RpcServer
from sollold.facts import dataclass
from sollold.undecodable import UNDECODABLE

_CALL_SECONDS = 10.0
_MAX_CHAIN = 1000
_NODE_DIGITS = 16
_DIGITS = "0123456789abcdef"
_SECRET_BYTES = 16
_PLACE_DIGITS = 4

Item = dict[str, Any]


def input_id(response: str, prefix: str, place: int) -> str:
    """Return an id for an input item without one: the response's id and the item's index."""
    return f"{prefix}_{response.partition('_')[2]}{place:0{_PLACE_DIGITS}x}"


def _input_of(id_: str) -> tuple[str, int] | None:
    """Return the response's id and the place from an id made by `input_id`; None for any other id."""
    digits = id_.partition("_")[2]
    response, place = digits[:-_PLACE_DIGITS], digits[-_PLACE_DIGITS:]
    # Without a cluster, the id of a response contains no node id.
    lengths = (2 * _SECRET_BYTES, _NODE_DIGITS + 2 * _SECRET_BYTES)
    if len(response) not in lengths or any(digit not in _DIGITS for digit in digits):
        return None
    return f"resp_{response}", int(place, 16)


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A stored response.

    Attributes:
        response: the response as sent; its ``output`` has the output items.
        items: the input items, without those of earlier responses.
        previous: id of the response that it continued; empty: none.
        client: the client whose API key created it, the only one that may read it; empty: any client.
    """

    response: dict[str, Any]
    items: list[Item]
    previous: str = ""
    client: str = ""


@dataclass(frozen=True, slots=True)
class ResponseRequest:
    """Asks a node for a response, by its own id or that of an output item; ``delete``: also delete it."""

    id: str
    client: str
    delete: bool = False


@dataclass(frozen=True, slots=True)
class ResponseReply:
    """The `StoredResponse` as JSON; empty when there is none."""

    stored: bytes


class ResponseStore:
    """Stores the newest responses, at most ``most`` and ``most_bytes`` of JSON."""

    def __init__(self, most: int = 4096, most_bytes: int = 64 * 1024**2) -> None:
        self._max_responses = most
        self._max_bytes = most_bytes
        self._stored: OrderedDict[str, tuple[bytes, tuple[str, ...]]] = OrderedDict()
        self._response_of: dict[str, str] = {}
        self._bytes = 0

    def put(self, stored: StoredResponse) -> None:
        """Store a response, dropping the oldest as needed. One that is too big by itself is not stored."""
        raw = msgspec.json.encode(stored)
        id_ = str(stored.response["id"])
        items = tuple(str(item["id"]) for item in stored.response.get("output", ()) if "id" in item)
        self.remove(id_)
        if len(raw) > self._max_bytes:
            return
        self._stored[id_] = (raw, items)
        self._response_of |= dict.fromkeys(items, id_)
        self._bytes += len(raw)
        while len(self._stored) > self._max_responses or self._bytes > self._max_bytes:
            self.remove(next(iter(self._stored)))

    def get(self, id_: str, client: str) -> StoredResponse | None:
        """Return the response with this id, or with an output item of this id, if ``client`` may read it."""
        found = self._stored.get(self._response_of.get(id_, id_))
        if found is None:
            return None
        stored = msgspec.json.decode(found[0], type=StoredResponse)
        return stored if stored.client in ("", client) else None

    def remove(self, id_: str) -> None:
        """Delete a response."""
        raw, items = self._stored.pop(id_, (b"", ()))
        self._bytes -= len(raw)
        for item_id in items:
            self._response_of.pop(item_id, None)

    def __len__(self) -> int:
        return len(self._stored)


class ResponseService:
    """Stores and finds responses in the whole cluster."""

    def __init__(self, node: str = "", calls: RpcClient | None = None) -> None:
        """``node``: this node's id, 16 hex digits; without ``calls``, no other nodes are asked."""
        self._node = node
        self._calls = calls
        self._store = ResponseStore()

    def register(self, server: RpcServer) -> None:
        """Register the peer method ``response``; ``server`` must not have started."""
        server.method("response", ResponseRequest, self._answer)

    def new_id(self, prefix: str) -> str:
        """Return an unguessable id for a response or one of its items; it contains this node's id."""
        return f"{prefix}_{self._node}{secrets.token_hex(_SECRET_BYTES)}"

    def put(self, stored: StoredResponse) -> None:
        """Store a response on this node."""
        self._store.put(stored)

    async def get(self, id_: str, client: str, *, delete: bool = False) -> StoredResponse | None:
        """Return the response with this id, or with an output item of this id; None when there is none."""
        holder = self._holder(id_)
        if holder == self._node or self._calls is None:
            # Reading a large response takes time; a caller may read many.
            await asyncio.sleep(0)
            return self._take(id_, client, delete=delete)
        try:
            request = ResponseRequest(id_, client, delete)
            reply = await self._calls.call(holder, "response", request, ResponseReply, timeout=_CALL_SECONDS)
            return msgspec.json.decode(reply.stored, type=StoredResponse) if reply.stored else None
        except (PeerError, *UNDECODABLE):
            return None

    async def conversation(self, id_: str, client: str) -> list[Item] | None:
        """Return all items of a conversation up to the end of a response; None if a response is missing.

        Chains of more than `_MAX_CHAIN` responses also give None.
        """
        parts: list[list[Item]] = []
        while id_:
            stored = await self.get(id_, client)
            if stored is None or len(parts) >= _MAX_CHAIN:
                return None
            parts.append([*stored.items, *stored.response.get("output", ())])
            id_ = stored.previous
        return [item for part in reversed(parts) for item in part]

    async def items(self, ids: Iterable[str], client: str) -> dict[str, Item]:
        """Return output items by their ids, and input items by their `input_id`; up to the first that is
        missing. Each response is read once, since it may be large.
        """
        found: dict[str, Item] = {}
        read: dict[str, StoredResponse] = {}
        for id_ in ids:
            named = _input_of(id_)
            response = named[0] if named is not None else id_
            if id_ not in found and response not in read:
                stored = await self.get(response, client)
                if stored is None:
                    return found
                read[stored.response["id"]] = stored
                found |= {item["id"]: item for item in stored.response.get("output", ()) if "id" in item}
            if named is not None and named[1] < len(items := read[response].items):
                found[id_] = items[named[1]]
            if id_ not in found:
                return found
        return found

    def _holder(self, id_: str) -> str:
        digits = id_.partition("_")[2][:_NODE_DIGITS]
        named = len(digits) == _NODE_DIGITS and all(digit in _DIGITS for digit in digits)
        return digits if named else self._node

    def _take(self, id_: str, client: str, *, delete: bool) -> StoredResponse | None:
        stored = self._store.get(id_, client)
        if delete and stored is not None and stored.response["id"] == id_:
            self._store.remove(str(stored.response["id"]))
        return stored

    async def _answer(self, caller: str, request: ResponseRequest) -> ResponseReply:
        stored = self._take(request.id, request.client, delete=request.delete)
        return ResponseReply(msgspec.json.encode(stored) if stored is not None else b"")
