"""A transfer between two real daemons that are killed at random times completes correctly."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

from tests.bench.transfer import write_model
from tests.daemons import until
from tests.doubles import free_ports

pytestmark = pytest.mark.cluster
MB = 1 << 20


class Node:
    """A daemon on loopback.

    Args:
        folder: for its configuration, state, models and log.
        ports: of HTTP and of the cluster.
        seed: cluster port of another daemon to join; None: none.
        rate: limit of transfers, in bytes per second.
    """

    def __init__(self, folder: Path, ports: list[int], seed: int | None, rate: int) -> None:
        self.folder = folder
        self.http, self.port = ports
        self.child: subprocess.Popen[bytes] | None = None
        folder.mkdir()
        seeds = [f"127.0.0.1:{seed}"] if seed else []
        (folder / "sollold.toml").write_text(
            f'[node]\nname = "{folder.name}"\nstate_dir = "{folder}/state"\ncache_dir = "{folder}/cache"\n'
            f'[http]\nhost = "127.0.0.1"\nport = {self.http}\n'
            f'[cluster]\nhost = "127.0.0.1"\nport = {self.port}\nmdns = false\n'
            f'door = "open"\nseeds = {json.dumps(seeds)}\n'
            f'[models]\nhuggingface = false\nfolders = ["{folder}/m"]\ntransfer_rate = {rate}\n'
            f'ollama_stores = ["{folder}/none"]\n[llama]\nbuild = false\n[ollama]\nenabled = false\n'
        )

    def start(self) -> None:
        command = [sys.executable, "-m", "sollold", "run", "--config", str(self.folder / "sollold.toml")]
        with (self.folder / "log").open("ab") as log:
            environment = {**os.environ, "HOME": str(self.folder)}
            self.child = subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        if self.child is not None:
            self.child.send_signal(number)
            self.child.wait(timeout=20)
            self.child = None

    def ask(self, path: str, body: object = None) -> bytes:
        data = json.dumps(body).encode() if body is not None else None
        with urlopen(Request(f"http://127.0.0.1:{self.http}{path}", data=data), timeout=60) as answer:
            return bytes(answer.read())

    def sees(self, name: str) -> bool:
        try:
            return name in self.ask("/api/tags").decode()
        except OSError:
            return False

    def pulling(self, name: str) -> subprocess.Popen[bytes]:
        code = (
            "import sys, urllib.request as u; "
            "[None for _ in u.urlopen(u.Request(sys.argv[1], data=sys.argv[2].encode()), timeout=60)]"
        )
        url, body = f"http://127.0.0.1:{self.http}/api/pull", json.dumps({"model": name})
        return subprocess.Popen([sys.executable, "-c", code, url, body], stderr=subprocess.DEVNULL)

    def files(self) -> list[Path]:
        folder = self.folder / "state" / "models"
        return [path for path in folder.rglob("*.gguf") if ".parts" not in path.parts]


def parts_received(node: Node) -> int:
    """The number of received parts in the node's notes on disk."""
    notes = [json.loads(path.read_bytes()) for path in node.folder.rglob("parts.json")]
    return sum(len(done) for note in notes for done in note["done"])


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[tuple[Node, Node]]:
    ports = free_ports(4)
    rate = 40 * MB
    pair = (
        Node(tmp_path / "sender", ports[:2], None, rate),
        Node(tmp_path / "receiver", ports[2:], ports[1], rate),
    )
    yield pair
    for node in pair:
        if node.child is not None:
            node.child.kill()
            node.child.wait()


def test_a_transfer_survives_kills_of_sender_and_receiver(nodes: tuple[Node, Node]) -> None:
    sender, receiver = nodes
    source = sender.folder / "m" / "big.gguf"
    write_model(source, 300 * MB)
    chance = random.Random(7)
    sender.start()
    receiver.start()
    until(lambda: receiver.sees("big:latest"), "the receiver lists the model")
    for victim in (receiver, sender, receiver):
        before = parts_received(receiver)
        client = receiver.pulling("big")
        try:
            deadline = time.monotonic() + 60
            while parts_received(receiver) == before:
                assert time.monotonic() < deadline, "no part was received"
                if client.poll() is not None:
                    # The sender was just killed, and the receiver had not noticed it yet.
                    client = receiver.pulling("big")
                time.sleep(0.05)
            time.sleep(chance.uniform(0.0, 0.3))
            victim.kill()
        finally:
            client.kill()
            client.wait()
        assert receiver.files() == [], "no incomplete file in place"
        victim.start()
        until(lambda: receiver.sees("big:latest"), "the receiver lists the model")
    lines = receiver.ask("/api/pull", {"model": "big"}).splitlines()
    assert json.loads(lines[-1]) == {"status": "success"}
    (file,) = receiver.files()
    assert file.read_bytes() == source.read_bytes()
    first_progress = next(line for line in map(json.loads, lines) if "completed" in line)
    assert first_progress["completed"] > 0, "parts received before the kills are not fetched again"
    for node in nodes:
        node.kill(signal.SIGTERM)
