"""Manages API keys: created on any node, known to all within seconds, stored only as hashes.

A key never changes except by being revoked, so the sets of two nodes are merged by union, in any order. Each
node's record has a digest of its set, so that gossip reveals a change; the set is then fetched with the peer
method ``keys``.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import re
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import msgspec

from sollold.cluster.net.rpc import PeerError
from sollold.cluster.net.rpc_client import RpcClient
from sollold.cluster.net.rpc_server import RpcServer
from sollold.cluster.net.view import View, name_of
from sollold.errors import Fault, Refusal, bad_request, system_reason
from sollold.facts import dataclass
from sollold.retry import LogAndRetry
from sollold.settings.state_file import keep_copy, read_bounded, write_whole
from sollold.tasks import cancel_and_wait
from sollold.turns import sleep_until_set
from sollold.undecodable import UNDECODABLE

log = logging.getLogger("sollold.keys")

PREFIX = "sk-sollold-"
MOST = 1000
"""Maximum number of keys that can be created, including revoked ones; merged sets may hold twice as many."""
_MAX_BYTES = 8 << 20
"""Maximum size of the file, in bytes."""
_CALL_SECONDS = 5.0
_RETRY_SECONDS = 5.0
OWN_NAMES = ("local", "member")
"""Names in logs and metrics for callers that need no key: programs of this machine, and of other members."""
_NAME = re.compile(r"[\w.@ \-]{1,64}")


class Scope(StrEnum):
    """What a key may do; each scope includes the ones before it."""

    INFER = "infer"
    """Use models, and read the cluster's state."""
    MODELS = "models"
    """Load, unload, download, create, copy and delete models."""
    ADMIN = "admin"
    """Everything: drain nodes, manage keys."""

    def includes(self, needed: Scope) -> bool:
        """Return whether a key of this scope may do what requires ``needed``."""
        return _ORDER[self] >= _ORDER[needed]


_ORDER = {scope: place for place, scope in enumerate(Scope)}


@dataclass(frozen=True, slots=True)
class Key:
    """A key as nodes store it, without its secret.

    Attributes:
        id: 8 hex digits, for people and logs.
        digest: SHA-256 of the secret, in hex. Secrets are random, so no slower hash is needed.
        created, expires, revoked: seconds since the epoch; 0: never expires, not revoked.
    """

    id: str
    name: str
    scope: Scope
    digest: str
    created: float
    expires: float = 0.0
    revoked: float = 0.0

    def valid(self, now: float) -> bool:
        """Return whether it is accepted at ``now``, in seconds since the epoch."""
        return not self.revoked and (not self.expires or now < self.expires)


@dataclass(frozen=True, slots=True)
class KeysRequest:
    """Peer method ``keys``: return all keys that a node knows."""


@dataclass(frozen=True, slots=True)
class KeySet:
    """All keys that a node knows, as sent to peers and stored on disk."""

    keys: tuple[Key, ...] = ()


@dataclass(frozen=True, slots=True)
class _EncodedKeySet:
    """A `KeySet`, perhaps of a later release."""

    keys: tuple[msgspec.Raw, ...] = ()


def _understood(found: _EncodedKeySet, decode: Callable[..., Any]) -> list[Key]:
    """Return the keys of a set, leaving out those that this release does not understand.

    ``decode``: decodes a value of its format, as `msgspec.json.decode`.
    """
    keys = []
    for encoded in found.keys:
        with contextlib.suppress(*UNDECODABLE):
            keys.append(decode(encoded, type=Key))
    return keys


def merged(keys: Iterable[Key], others: Iterable[Key]) -> dict[str, Key]:
    """Return the keys of both sets by digest; the order of the sets does not matter."""
    found = {key.digest: key for key in keys}
    for key in others:
        existing = found.get(key.digest)
        if existing is None:
            found[key.digest] = key
        elif existing != key:
            # Between honest nodes only `revoked` can differ: keep the earlier time.
            times = [time for time in (existing.revoked, key.revoked) if time]
            first = min(existing, key, key=msgspec.json.encode)
            found[key.digest] = replace(first, revoked=min(times, default=0.0))
    return dict(sorted(found.items()))


def digest_of(keys: Iterable[Key]) -> str:
    """Return 16 hex digits that identify the set; empty for the empty set."""
    listed = sorted(keys, key=lambda key: key.digest)
    return hashlib.sha256(msgspec.json.encode(listed)).hexdigest()[:16] if listed else ""


class Keys:
    """The keys of the cluster, as known to this node.

    Args:
        file: the file that stores them.
        clock: seconds since the epoch.
    """

    def __init__(
        self, view: View, calls: RpcClient, file: Path, clock: Callable[[], float] = time.time
    ) -> None:
        self._view = view
        self._calls = calls
        self._file = file
        self._clock = clock
        self._keys: dict[str, Key] = {}
        self._unreadable = ""
        """Why the file, or a key in it, could not be read; empty if all could."""
        self._protected = False
        """Whether the file must not be overwritten: it could not be read, so there is no copy."""
        self._fetched: dict[str, str] = {}
        """By node: the digest of the set that was last fetched from it. Ours may differ: a later release has
        keys that are not understood here."""
        self._unwritten = False
        self._writing = asyncio.Lock()
        self._changed = asyncio.Event()
        self._unsubscribe: Callable[[], None] = lambda: None
        self._task: asyncio.Task[None] | None = None

    def register(self, server: RpcServer) -> None:
        """Register the peer method ``keys``."""
        server.method("keys", KeysRequest, self._answer)

    async def start(self) -> None:
        """Read the file and start following the other nodes' keys."""
        await asyncio.to_thread(self._read)
        self._publish()
        self._unsubscribe = self._view.subscribe(self._changed.set)
        self._changed.set()
        self._task = asyncio.create_task(self._follow(), name="keys")

    async def close(self) -> None:
        """Stop following the other nodes' keys."""
        self._unsubscribe()
        await cancel_and_wait(self._task)

    @property
    def made(self) -> bool:
        """Whether a key was ever created; also true if the file can't be read, since it may have held one."""
        return bool(self._keys or self._unreadable)

    def all(self) -> tuple[Key, ...]:
        """Return all keys, the oldest first."""
        return tuple(sorted(self._keys.values(), key=lambda key: (key.created, key.id)))

    def find(self, secret: str) -> Key | None:
        """Return the valid key with this secret, if any."""
        key = self._keys.get(_hash(secret))
        return key if key is not None and key.valid(self._clock()) else None

    def valid(self, key: Key) -> bool:
        """Return whether ``key`` has neither been revoked nor expired since it was found."""
        current = self._keys.get(key.digest)
        return current is not None and current.valid(self._clock())

    async def create(self, name: str, scope: Scope, expires: float = 0.0) -> tuple[Key, str]:
        """Create a key and write it to disk. ``expires``: seconds from now; 0: never.

        Returns:
            The key as listed, and its secret, which is shown only this once.

        Raises:
            Refusal: BAD_REQUEST for a name that is invalid or taken, or when there are too many keys;
                UNAVAILABLE when the key can't be written to disk.
        """
        now = self._clock()
        if not _NAME.fullmatch(name) or name != name.strip():
            raise bad_request("invalid key name: 1 to 64 letters, digits, spaces or . _ - @")
        if name in OWN_NAMES:
            raise bad_request(f"{name!r} is reserved: in logs it names our own programs")
        secret = PREFIX + secrets.token_urlsafe(32)
        key = Key(secrets.token_hex(4), name, scope, _hash(secret), now, now + expires if expires else 0.0)
        async with self._writing:  # as a whole: two callers may want one name at the same moment
            if any(k.name == name and k.valid(now) for k in self._keys.values()):
                raise bad_request(f"a key named {name!r} already exists")
            if len(self._keys) >= MOST:
                raise bad_request(f"there are {MOST} keys already, including revoked ones")
            updated = self._union((key,))
            await self._write(updated)
            self._keys = updated
        self._publish()
        log.info("key %s (%s) created with scope %s", key.name, key.id, key.scope)
        return key, secret

    async def revoke(self, name: str) -> Key:
        """Revoke a key by name or id; on this node this takes effect at once.

        An expired key can be revoked too, since a machine whose clock is behind still accepts it.

        Raises:
            Refusal: NOT_FOUND when no key has this name, or several have, as when both sides of a partition
                created one; UNAVAILABLE when the change can't be written to disk.
        """
        now = self._clock()
        active = [key for key in self.all() if not key.revoked]
        found = [key for key in active if key.id == name] or [key for key in active if key.name == name]
        # The name of an expired key may have been reused since.
        found = [key for key in found if key.valid(now)] or found
        if not found:
            raise Refusal(Fault.NOT_FOUND, f"there is no valid key {name[:64]!r}")
        if len(found) > 1:
            ids = ", ".join(f"{key.id} ({key.scope})" for key in found)
            raise Refusal(Fault.NOT_FOUND, f"several keys are named {name[:64]!r}; name one by its id: {ids}")
        revoked = replace(found[0], revoked=now)
        log.info("key %s (%s) revoked", revoked.name, revoked.id)
        try:
            await self._merge((revoked,))
        except Refusal as refusal:
            text = f"{revoked.name} is revoked, but this node may forget it at a restart: {refusal.message}"
            raise Refusal(refusal.fault, text) from None
        return revoked

    async def _merge(self, keys: Iterable[Key]) -> None:
        """Merge ``keys``, some perhaps revoked: apply them, publish the change, write them to disk.

        The order matters: a full disk must not keep a revoked key valid.

        Raises:
            Refusal: UNAVAILABLE when there are too many, or they are applied but can't be written to disk.
        """
        async with self._writing:
            updated = self._union(keys)
            if updated != self._keys:
                self._keys, self._unwritten = updated, True
                self._publish()
            if self._unwritten:
                await self._write(updated)
                self._unwritten = False

    def _union(self, keys: Iterable[Key]) -> dict[str, Key]:
        updated = merged(self._keys.values(), keys)
        if len(updated) > 2 * MOST:  # each side of a partition may have created the maximum
            raise Refusal(Fault.UNAVAILABLE, "too many keys")
        return updated

    def _publish(self) -> None:
        self._view.update_me(keys=digest_of(self._keys.values()))

    async def _write(self, keys: dict[str, Key]) -> None:
        if self._protected:
            message = f"{self._file} can't be read, so it is not overwritten: {self._unreadable}"
            raise Refusal(Fault.UNAVAILABLE, message)
        data = msgspec.json.encode(KeySet(tuple(keys.values())))
        try:
            await asyncio.to_thread(write_whole, self._file, data)
        except OSError as error:
            message = f"can't write {self._file}: {system_reason(error)}"
            raise Refusal(Fault.UNAVAILABLE, message) from error

    def _read(self) -> None:
        try:
            data = read_bounded(self._file, _MAX_BYTES)
            self._decode(data)
            if self._unreadable:
                self._unreadable += f"; a copy is in {keep_copy(self._file, data)}"
        except FileNotFoundError:
            return
        except OSError as error:
            self._unreadable, self._protected = system_reason(error), True
        if self._unreadable:
            text = "keys in %s can't be read, so other machines need a key: %s"
            log.error(text, self._file, self._unreadable)

    def _decode(self, data: bytes) -> None:
        try:
            found = msgspec.json.decode(data, type=_EncodedKeySet)
        except UNDECODABLE as error:
            self._unreadable = str(error)
            return
        understood = _understood(found, msgspec.json.decode)
        self._keys = merged(understood, ())
        if len(understood) < len(found.keys):
            count = len(found.keys) - len(understood)
            self._unreadable = f"{count} of them were written by another release, or are damaged"

    async def _answer(self, caller: str, request: KeysRequest) -> KeySet:
        return KeySet(tuple(self._keys.values()))

    async def _follow(self) -> None:
        """Fetch and write the keys of each node with a different set in its record; retry until done."""
        retrying = LogAndRetry("fetching keys", log)
        while True:
            await self._changed.wait()
            self._changed.clear()
            failed = False
            for node in self._differing():
                with retrying:
                    failed = not await self._fetch(node) or failed
            with retrying:
                failed = not await self._write_again() or failed
            if failed:
                await sleep_until_set(self._changed, _RETRY_SECONDS)
                self._changed.set()

    def _differing(self) -> list[str]:
        me, own, live = self._view.me, digest_of(self._keys.values()), self._view.live()
        self._fetched = {r.node: self._fetched[r.node] for r in live if r.node in self._fetched}
        return [
            record.node
            for record in live
            if record.node != me.node and record.keys not in ("", own, self._fetched.get(record.node))
        ]

    async def _fetch(self, node: str) -> bool:
        """Merge the keys that ``node`` knows; False if it can't be reached or they can't be written."""
        record = self._view.record(node)
        try:
            answer = await self._calls.call(
                node, "keys", KeysRequest(), _EncodedKeySet, timeout=_CALL_SECONDS
            )
            found = _understood(answer, msgspec.msgpack.decode)
            for key in found:
                if key.digest not in self._keys:
                    log.info(
                        "key %s (%s, %s) came from %s", key.name, key.id, key.scope, name_of(self._view, node)
                    )
            await self._merge(found)
            self._fetched[node] = record.keys if record is not None else ""
        except PeerError as error:
            log.debug("no keys from %s: %s", name_of(self._view, node), error)
            return False
        except Refusal as refusal:
            log.warning("keys from %s: %s", name_of(self._view, node), refusal.message)
            return False
        return True

    async def _write_again(self) -> bool:
        """Write keys that could not be written before; False if they still can't."""
        try:
            await self._merge(())
        except Refusal:
            return False
        return True


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()
