"""The examples of docs/python.md run, on a real cluster, and print what the page says."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sollold.engines.install.find import Llama
from sollold.models.gguf.demo_model import Recital, pieces, write
from tests import netns
from tests.client import page
from tests.daemons import Cluster, until

NODES = ("anna", "bert", "cleo")
TEXT = (
    "A qubit holds a superposition of both values until it is measured. Gates turn these states, and "
    "entangled ones answer together. What can't be tried one by one is thus searched at once."
)
ALIASES = "llama3.1:70b=big,llama3.1:405b=huge,deepseek-r1:671b=giant"


def test_every_example_shows_its_output() -> None:
    found = page.examples()
    assert len(found) >= 15 and all(example.printed for example in found)


def test_the_examples_are_typed() -> None:
    pytest.importorskip("mypy")
    code = page.program(page.examples())
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", os.devnull, "--strict", "-c", code],
        capture_output=True,
        text=True,
        timeout=280,
        cwd=page.PAGE.parents[1],
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_examples_do_not_read_loop_variables_after_the_loop() -> None:
    """Pyright reports these as possibly unbound; mypy does not."""
    for example in page.examples():
        statements = ast.parse(example.code).body
        for number, loop in enumerate(statements):
            if isinstance(loop, ast.For):
                bound = {name.id for name in ast.walk(loop.target) if isinstance(name, ast.Name)}
                assert not bound & _read_first(statements[number + 1 :]), example.code


def _read_first(statements: list[ast.stmt]) -> set[str]:
    """Return the names that ``statements`` read before binding them."""
    read, bound = set[str](), set[str]()
    for statement in statements:
        names = [name for name in ast.walk(statement) if isinstance(name, ast.Name)]
        stored = {name.id for name in names if isinstance(name.ctx, ast.Store)}
        loop = isinstance(statement, ast.For)
        read |= (
            {name.id for name in names if isinstance(name.ctx, ast.Load)}
            - bound
            - (stored if loop else set())
        )
        bound |= stored
    return read


@pytest.fixture
def cluster(tmp_path: Path, llama: Llama) -> Iterator[Cluster]:
    """Three machines with two models that need two machines each, and an Ollama on the first machine."""
    if why := netns.available():
        pytest.skip(why)
    shared = {
        "placement.context": 512,
        "placement.slots": 1,
        "placement.ubatch": 32,
        "models.aliases": ALIASES,
    }
    each: list[dict[str, object]] = [{"node.name": name} for name in NODES]
    each[0] |= {"ollama.enabled": "on", "ollama.url": "http://127.0.0.1:11434"}
    tokens = pieces(TEXT)
    files = {
        "big": Recital(tokens, name="big", layers=6, hidden=20_480, heavy=True),
        "huge": Recital(tokens[1:], name="huge", layers=6, hidden=20_480, heavy=True),
        "giant": Recital(tokens[2:], name="giant", layers=30, hidden=20_480),
    }
    with Cluster(3, tmp_path, llama, memory="125 MiB", settings=shared, each=each, start=False) as cluster:
        for name, recital in files.items():
            write(tmp_path / f"{name}.gguf", recital)
            for node in cluster:
                (node.models / f"{name}.gguf").symlink_to(tmp_path / f"{name}.gguf")
        assert cluster[0].machine is not None
        words = [sys.executable, "-m", "tests.ollama_standin", "--model", "llama3.2:latest"]
        words += ["--text", "Hello! How can I help you today?"]
        cluster[0].machine.popen(words, cwd=page.PAGE.parents[1], stdout=subprocess.DEVNULL)
        for node in cluster:
            node.start()
        cluster.together()
        until(lambda: b"llama3.2" in cluster[0].ask("GET", "/api/tags").body, "the Ollama is seen")
        yield cluster


@pytest.mark.cluster
@pytest.mark.llama
def test_the_examples_print_the_documented_output(cluster: Cluster) -> None:
    found = page.examples()
    machine = cluster[0].machine
    assert machine is not None
    environment = {key: value for key, value in os.environ.items() if key != "SOLLOLD_NODE_URL"}
    done = machine.run([sys.executable, "-c", page.program(found)], timeout=240, check=False, env=environment)
    print(done.stdout, done.stderr)
    assert done.returncode == 0
    printed = page.outputs(done.stdout, len(found))
    for example, text in zip(found, printed, strict=True):
        assert example.printed is not None
        assert page.plain(text) == page.plain(example.printed), example.code
    assert done.stderr == ""
