"""API keys: creation, revocation, expiry, storage as hashes, replication; passes of members."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from sollold.control.keys import PREFIX, Key, Keys, KeySet, KeysRequest, Scope, digest_of, merged
from sollold.control.member_pass import PASS_SECONDS, MemberPasses
from sollold.errors import Fault, Refusal
from sollold.settings.state_file import write_whole
from tests.doubles import FakeView, World, record, until
from tests.models.fakes import FakeCalls, FakeServer


class Node:
    """The keys and passes of one node, with their clock."""

    def __init__(self, name: str, folder: Path, world: World, servers: dict[str, FakeServer]) -> None:
        self.name = name
        self.now = 1000.0
        self.file = folder / f"{name}.json"
        self.server = servers[name] = FakeServer()
        self.calls = FakeCalls(name, servers)
        self.view = FakeView(record(name), world)
        self.keys = Keys(self.view, self.calls, self.file, lambda: self.now)
        self.keys.register(self.server)
        self.passes = MemberPasses(self.view, self.calls, str, lambda: self.now)
        self.passes.register(self.server)


class Nodes:
    """Nodes that see each other's records immediately."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.world = World()
        self.servers: dict[str, FakeServer] = {}
        self.running: list[Node] = []

    async def start(self, name: str) -> Node:
        node = Node(name, self.folder, self.world, self.servers)
        await node.keys.start()
        self.running.append(node)
        self.world.changed()
        return node


@pytest.fixture
async def nodes(tmp_path: Path) -> AsyncIterator[Nodes]:
    all_ = Nodes(tmp_path)
    yield all_
    for node in all_.running:
        await node.keys.close()


ID = "0123456789abcdef"
OTHER = "fedcba9876543210"


async def test_a_key_is_replicated_without_its_secret(nodes: Nodes) -> None:
    a, b = await nodes.start(ID), await nodes.start(OTHER)
    assert not a.keys.made and not b.keys.made
    key, secret = await a.keys.create("laptop", Scope.MODELS)
    assert secret.startswith(PREFIX) and len(secret) >= len(PREFIX) + 43, "256 bits"
    assert a.keys.find(secret) == key
    await until(lambda: b.keys.find(secret) == key)
    assert b.keys.made and b.keys.find(secret + "x") is None and b.keys.find("") is None
    for node in (a, b):
        await until(node.file.is_file)
        stored = node.file.read_text()
        assert secret not in stored and secret.removeprefix(PREFIX) not in stored
        assert hashlib.sha256(secret.encode()).hexdigest() in stored
        assert node.file.stat().st_mode & 0o077 == 0


async def test_a_revoked_key_is_refused_on_every_node_permanently(nodes: Nodes) -> None:
    a, b = await nodes.start(ID), await nodes.start(OTHER)
    key, secret = await a.keys.create("laptop", Scope.INFER)
    await until(lambda: b.keys.find(secret) is not None)
    await b.keys.revoke("laptop")
    assert b.keys.find(secret) is None
    await until(lambda: a.keys.find(secret) is None)
    # A node that missed the revocation can't undo it.
    assert merged(a.keys.all(), (key,)) == merged((key,), a.keys.all()) == merged(a.keys.all(), ())
    with pytest.raises(Refusal, match="no valid key 'laptop'"):
        await a.keys.revoke("laptop")
    assert a.keys.made, "revoking the last key does not open the API"
    _, again = await a.keys.create("laptop", Scope.INFER)
    assert again != secret


async def test_a_disconnected_node_catches_up(nodes: Nodes) -> None:
    a, b = await nodes.start(ID), await nodes.start(OTHER)
    a.calls.cut.add(OTHER)
    b.calls.cut.add(ID)
    _, first = await a.keys.create("one", Scope.INFER)
    _, second = await b.keys.create("two", Scope.ADMIN)
    assert a.keys.find(second) is None and b.keys.find(first) is None
    a.calls.cut.clear()
    b.calls.cut.clear()
    nodes.world.changed()
    await until(lambda: a.keys.find(second) is not None and b.keys.find(first) is not None)
    assert a.view.me.keys == b.view.me.keys == digest_of(a.keys.all())
    c = await nodes.start("00000000000000ff")
    await until(lambda: c.keys.find(first) is not None and c.keys.find(second) is not None)


async def test_keys_survive_a_restart(nodes: Nodes) -> None:
    a = await nodes.start(ID)
    _, secret = await a.keys.create("laptop", Scope.ADMIN)
    again = Keys(a.view, a.calls, a.file, lambda: a.now)
    await again.start()
    try:
        found = again.find(secret)
        assert found is not None and found.scope is Scope.ADMIN
    finally:
        await again.close()


@pytest.mark.parametrize("damage", [b'{"keys": [{"id"', b'{"keys": [{"id": "\xff"}]}', bytes(64), b""])
async def test_an_unreadable_file_does_not_open_the_api(nodes: Nodes, damage: bytes) -> None:
    (nodes.folder / f"{ID}.json").write_bytes(damage)
    a = await nodes.start(ID)
    assert a.keys.made and a.keys.all() == ()
    await a.keys.create("laptop", Scope.INFER)
    assert a.file.with_name(f"{ID}.json.unread").read_bytes() == damage


async def test_a_file_that_may_not_be_read_is_not_overwritten(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, limit: int) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("sollold.control.keys.read_bounded", refuse)
    (nodes.folder / f"{ID}.json").write_text("{}")
    a = await nodes.start(ID)
    assert a.keys.made
    with pytest.raises(Refusal, match=r"can't be read, so it is not overwritten: Permission denied"):
        await a.keys.create("laptop", Scope.INFER)
    assert a.file.read_text() == "{}"


async def test_keys_of_a_later_release_hide_no_other_keys(nodes: Nodes) -> None:
    """The others are accepted, and their revocation spreads; nothing is fetched again and again."""
    a, b = await nodes.start(ID), await nodes.start(OTHER)
    key, secret = await a.keys.create("laptop", Scope.INFER)
    await until(lambda: b.keys.find(secret) == key)
    odd = {**msgspec.to_builtins(key), "digest": "0" * 64, "scope": "audit"}
    stored = {"keys": [odd, {**msgspec.to_builtins(key), "revoked": 9.0}]}

    async def answer(caller: str, request: KeysRequest) -> object:
        return stored

    a.server.method("keys", KeysRequest, answer)
    a.view.update_me(keys="of a later release")
    await until(lambda: b.keys.find(secret) is None)
    count = len(b.calls.made)
    for number in range(3):
        a.view.update_me(setup=str(number))
        await asyncio.sleep(0.01)
    assert len(b.calls.made) == count
    a.file.write_bytes(msgspec.json.encode(stored))
    again = Keys(a.view, a.calls, a.file, lambda: a.now)
    await again.start()
    await again.close()
    assert [found.id for found in again.all()] == [key.id]
    assert msgspec.json.decode(a.file.with_name(f"{ID}.json.unread").read_bytes()) == stored


async def test_expiry(nodes: Nodes) -> None:
    a = await nodes.start(ID)
    _, secret = await a.keys.create("guest", Scope.INFER, 60.0)
    a.now += 59
    assert a.keys.find(secret) is not None
    a.now += 1
    assert a.keys.find(secret) is None
    await a.keys.create("guest", Scope.INFER)  # the name is free again


@pytest.mark.parametrize("name", ["", " ", "a" * 65, "a\nb", "a\x1b[31m", " a"])
async def test_invalid_names_are_refused(nodes: Nodes, name: str) -> None:
    a = await nodes.start(ID)
    with pytest.raises(Refusal, match="invalid key name") as refused:
        await a.keys.create(name, Scope.INFER)
    assert refused.value.fault is Fault.BAD_REQUEST


async def test_names_are_unique(nodes: Nodes) -> None:
    a = await nodes.start(ID)
    await a.keys.create("laptop", Scope.INFER)
    with pytest.raises(Refusal, match="already exists"):
        await a.keys.create("laptop", Scope.INFER)


async def test_names_are_unique_for_concurrent_callers(nodes: Nodes) -> None:
    a = await nodes.start(ID)
    made = await asyncio.gather(
        *(a.keys.create("laptop", Scope.INFER) for _ in range(4)), return_exceptions=True
    )
    assert sum(isinstance(result, Refusal) for result in made) == 3 and len(a.keys.all()) == 1


async def test_two_keys_with_one_name_are_reported(nodes: Nodes) -> None:
    a, b = await nodes.start(ID), await nodes.start(OTHER)
    a.calls.cut.add(OTHER)
    b.calls.cut.add(ID)
    (first_key, first), (second_key, second) = [
        await node.keys.create("laptop", Scope.INFER) for node in (a, b)
    ]
    a.calls.cut.clear()
    b.calls.cut.clear()
    nodes.world.changed()
    await until(lambda: a.keys.find(second) is not None)
    with pytest.raises(Refusal, match="several keys are named 'laptop'") as refused:
        await a.keys.revoke("laptop")
    assert first_key.id in str(refused.value) and second_key.id in str(refused.value)
    await a.keys.revoke(second_key.id)
    await a.keys.revoke("laptop")
    assert a.keys.find(first) is None and a.keys.find(second) is None


async def test_a_key_named_like_anothers_id_does_not_protect_it(nodes: Nodes) -> None:
    a = await nodes.start(ID)
    key, secret = await a.keys.create("laptop", Scope.ADMIN)
    await a.keys.create(key.id, Scope.INFER)
    await a.keys.revoke(key.id)
    assert a.keys.find(secret) is None


async def test_an_expired_key_is_revoked_for_nodes_with_a_slow_clock(nodes: Nodes) -> None:
    a, b = await nodes.start(ID), await nodes.start(OTHER)
    _, secret = await a.keys.create("guest", Scope.INFER, 60.0)
    await until(lambda: b.keys.find(secret) is not None)
    a.now += 3600
    assert a.keys.find(secret) is None and b.keys.find(secret) is not None
    await a.keys.create("guest", Scope.INFER)
    await a.keys.revoke("guest")
    await a.keys.revoke("guest")
    await until(lambda: b.keys.find(secret) is None)


@pytest.mark.parametrize("name", ["local", "member"])
async def test_key_names_reserved_for_nodes_are_refused(nodes: Nodes, name: str) -> None:
    a = await nodes.start(ID)
    with pytest.raises(Refusal, match="in logs"):
        await a.keys.create(name, Scope.INFER)


async def test_a_full_disk_is_reported(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    a = await nodes.start(ID)

    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sollold.control.keys.write_whole", full)
    with pytest.raises(Refusal, match="No space left") as refused:
        await a.keys.create("laptop", Scope.INFER)
    assert refused.value.fault is Fault.UNAVAILABLE and not a.keys.made


async def test_a_full_disk_does_not_restore_revoked_keys(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sollold.control.keys._RETRY_SECONDS", 0.05)
    a, b = await nodes.start(ID), await nodes.start(OTHER)
    (_, first), (_, second) = [await a.keys.create(name, Scope.ADMIN) for name in ("one", "two")]
    await until(lambda: b.keys.find(first) is not None and b.keys.find(second) is not None)
    full = {a.file, b.file}

    def limited(path: Path, data: bytes) -> None:
        if path in full:
            raise OSError(28, "No space left on device")
        write_whole(path, data)

    monkeypatch.setattr("sollold.control.keys.write_whole", limited)
    with pytest.raises(Refusal, match=r"may forget it at a restart: .*No space left") as refused:
        await a.keys.revoke("one")
    assert refused.value.fault is Fault.UNAVAILABLE and a.keys.find(first) is None
    await until(lambda: b.keys.find(first) is None)
    assert b.keys.find(second) is not None
    full.clear()
    await until(lambda: _revoked(a.file) and _revoked(b.file))


def _revoked(file: Path) -> bool:
    return any(key.revoked for key in msgspec.json.decode(file.read_bytes(), type=KeySet).keys)


def test_scopes_include_the_smaller_ones() -> None:
    assert Scope.ADMIN.includes(Scope.MODELS) and Scope.MODELS.includes(Scope.INFER)
    assert not Scope.INFER.includes(Scope.MODELS) and not Scope.MODELS.includes(Scope.ADMIN)


def test_merging_is_commutative() -> None:
    valid = Key("1", "a", Scope.INFER, "d1", 1.0)
    revoked = Key("1", "a", Scope.INFER, "d1", 1.0, revoked=5.0)
    later = Key("1", "a", Scope.INFER, "d1", 1.0, revoked=9.0)
    odd = Key("1", "b", Scope.ADMIN, "d1", 1.0)
    for left, right in ((valid, revoked), (revoked, later), (valid, odd), (odd, later)):
        assert merged((left,), (right,)) == merged((right,), (left,))
        assert digest_of(merged((left,), (right,)).values()) == digest_of(merged((right,), (left,)).values())
    assert merged((valid,), (revoked,))["d1"].revoked == 5.0
    assert msgspec.json.decode(msgspec.json.encode(valid), type=Key) == valid


async def test_a_pass_is_valid_on_other_members_until_it_expires(nodes: Nodes) -> None:
    a, b = await nodes.start(ID), await nodes.start(OTHER)
    issued = await a.passes.issue("127.0.0.1")
    assert await a.passes.check(issued) and await b.passes.check(issued)
    calls_before = len(b.calls.made)
    assert await b.passes.check(issued) and len(b.calls.made) == calls_before, "the issuer is queried once"
    for false in ("", "member.", f"member.{ID}.{'0' * 64}", issued[:-1], issued + "0", issued.upper()):
        assert not await b.passes.check(false)
    a.now += PASS_SECONDS + 1
    b.now += PASS_SECONDS + 1
    assert not await a.passes.check(issued) and not await b.passes.check(issued)


async def test_a_pass_is_valid_only_on_the_member_it_was_issued_for(nodes: Nodes) -> None:
    third = "00000000000000ff"
    a, b, c = [await nodes.start(node) for node in (ID, OTHER, third)]
    b.view.update_me(addresses=("192.168.1.5", "fe80::5"))
    c.view.update_me(addresses=("192.168.1.6",))
    for host in ("192.168.1.5", "fe80::5%lo", "::ffff:192.168.1.5"):
        issued = await a.passes.issue(host)
        assert await b.passes.check(issued), host
        assert not await c.passes.check(issued), (
            "a member that received the pass can't use it at another member"
        )
        assert not await a.passes.check(issued)
    for host in ("192.168.1.66", "evil.invalid", "", "x" * 300):
        with pytest.raises(Refusal, match="no member of this cluster is at"):
            await a.passes.issue(host)


async def test_a_pass_ends_with_its_issuer(nodes: Nodes) -> None:
    a, b = await nodes.start(ID), await nodes.start(OTHER)
    issued = await a.passes.issue("127.0.0.1")
    assert await b.passes.check(issued)
    nodes.world.dead.add(ID)
    assert not await b.passes.check(issued), "its issuer may have been evicted"


async def test_a_pass_of_a_non_member_is_refused_without_a_query(nodes: Nodes) -> None:
    b = await nodes.start(OTHER)
    calls_before = len(b.calls.made)
    assert not await b.passes.check(f"member.{'0' * 16}.{'a' * 64}")
    nodes.world.records[ID] = record(ID)
    nodes.world.dead.add(ID)
    assert not await b.passes.check(f"member.{ID}.{'a' * 64}")
    assert len(b.calls.made) == calls_before
