"""Recent answers of ``/v1/responses``, kept by the node that gave them and readable through every node.

Each id carries the id of the node that keeps it, so another node knows whom to ask. Peer method: ``response``
(`ResponseRequest` → `ResponseReply`).
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from typing import Any

import msgspec

from sollold.cluster.net.rpc import PeerError
from sollold.cluster.net.rpc_client import Calls
from sollold.cluster.net.rpc_server import Peers
from sollold.facts import dataclass

_TIMEOUT = 10.0
_LONGEST_CHAIN = 1000
_NODE_DIGITS = 16
_DIGITS = "0123456789abcdef"
_SECRET_BYTES = 16
_PLACE_DIGITS = 4

Item = dict[str, Any]


def input_id(response: str, prefix: str, place: int) -> str:
    """The id of an item of a response's input that came without one: it names the response and the place."""
    return f"{prefix}_{response.partition('_')[2]}{place:0{_PLACE_DIGITS}x}"


def _input_of(id_: str) -> tuple[str, int] | None:
    """The response and the place that an id of `input_id` names; None for another's."""
    digits = id_.partition("_")[2]
    response, place = digits[:-_PLACE_DIGITS], digits[-_PLACE_DIGITS:]
    # Without a cluster the id of a response names no node.
    known = (2 * _SECRET_BYTES, _NODE_DIGITS + 2 * _SECRET_BYTES)
    if len(response) not in known or any(digit not in _DIGITS for digit in digits):
        return None
    return f"resp_{response}", int(place, 16)


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """An answer that can be asked for again.

    Attributes:
        response: as it was given; its ``output`` has the items.
        items: what was asked, without what came before it.
        previous: id of the response that it continued; empty: none.
        client: whose it is, when that was known by a key: nobody else may read it.
    """

    response: dict[str, Any]
    items: list[Item]
    previous: str = ""
    client: str = ""


@dataclass(frozen=True, slots=True)
class ResponseRequest:
    """Asks a node for a response, by its own id or that of an item in it; ``delete``: and to forget it."""

    id: str
    client: str
    delete: bool = False


@dataclass(frozen=True, slots=True)
class ResponseReply:
    """The `StoredResponse` as JSON; empty: there is none."""

    stored: bytes


class ResponseStore:
    """The newest responses, as many as ``most`` and ``most_bytes`` of JSON allow."""

    def __init__(self, most: int = 4096, most_bytes: int = 64 * 1024**2) -> None:
        self._most = most
        self._most_bytes = most_bytes
        self._stored: OrderedDict[str, tuple[bytes, tuple[str, ...]]] = OrderedDict()
        self._home: dict[str, str] = {}
        self._bytes = 0

    def put(self, stored: StoredResponse) -> None:
        """Keep a response; the oldest go. One that is too big by itself is not kept."""
        raw = msgspec.json.encode(stored)
        id_ = str(stored.response["id"])
        items = tuple(str(item["id"]) for item in stored.response.get("output", ()) if "id" in item)
        self.remove(id_)
        if len(raw) > self._most_bytes:
            return
        self._stored[id_] = (raw, items)
        self._home |= dict.fromkeys(items, id_)
        self._bytes += len(raw)
        while len(self._stored) > self._most or self._bytes > self._most_bytes:
            self.remove(next(iter(self._stored)))

    def get(self, id_: str, client: str) -> StoredResponse | None:
        """The response with this id, or with an item of this id, if ``client`` may read it."""
        found = self._stored.get(self._home.get(id_, id_))
        if found is None:
            return None
        stored = msgspec.json.decode(found[0], type=StoredResponse)
        return stored if stored.client in ("", client) else None

    def remove(self, id_: str) -> None:
        """Forget a response and give its room back."""
        raw, items = self._stored.pop(id_, (b"", ()))
        self._bytes -= len(raw)
        for item in items:
            self._home.pop(item, None)

    def __len__(self) -> int:
        return len(self._stored)


class ResponseService:
    """The responses of the whole cluster."""

    def __init__(self, node: str = "", calls: Calls | None = None) -> None:
        """``node``: this one's id, 16 hex digits; without ``calls`` there is no other."""
        self._node = node
        self._calls = calls
        self._store = ResponseStore()

    def register(self, server: Peers) -> None:
        """Answer other nodes; ``server`` must not have started."""
        server.method("response", ResponseRequest, self._answer)

    def new_id(self, prefix: str) -> str:
        """An id for a response or an item of it: nobody can guess it, and it names this node."""
        return f"{prefix}_{self._node}{secrets.token_hex(_SECRET_BYTES)}"

    def put(self, stored: StoredResponse) -> None:
        """Keep a response on this node."""
        self._store.put(stored)

    async def get(self, id_: str, client: str, *, delete: bool = False) -> StoredResponse | None:
        """The response with this id, or with an item of this id; None: there is none, or no longer."""
        home = self._home(id_)
        if home == self._node or self._calls is None:
            return self._take(id_, client, delete=delete)
        try:
            request = ResponseRequest(id_, client, delete)
            reply = await self._calls.call(home, "response", request, ResponseReply, timeout=_TIMEOUT)
            return msgspec.json.decode(reply.stored, type=StoredResponse) if reply.stored else None
        except (PeerError, msgspec.MsgspecError):
            return None

    async def conversation(self, id_: str, client: str) -> list[Item] | None:
        """All items up to the end of a response, those before it included; None: one is gone."""
        parts: list[list[Item]] = []
        while id_:
            stored = await self.get(id_, client)
            if stored is None or len(parts) >= _LONGEST_CHAIN:
                return None
            parts.append([*stored.items, *stored.response.get("output", ())])
            id_ = stored.previous
        return [item for part in reversed(parts) for item in part]

    async def item(self, id_: str, client: str) -> Item | None:
        """An item of a response by its id: of its output, or of its input by `input_id`."""
        if (named := _input_of(id_)) is not None:
            stored = await self.get(named[0], client)
            return stored.items[named[1]] if stored is not None and named[1] < len(stored.items) else None
        stored = await self.get(id_, client)
        output = stored.response.get("output", ()) if stored is not None else ()
        return next((item for item in output if item.get("id") == id_), None)

    def _home(self, id_: str) -> str:
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
