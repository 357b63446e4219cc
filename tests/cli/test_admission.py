"""The commands about cluster membership, against a double of the daemon."""

from __future__ import annotations

import asyncio
import io
import json
import re
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web

from sollold import __version__
from sollold.cli.exit import Exit
from sollold.cli.main import main
from sollold.cli.status import of_admission

ROLLED = {"generation": 1, "done": ["anna", "bert"], "away": ["cleo"], "unsure": []}


def node(name: str) -> dict[str, Any]:
    return {
        "node": name[0] * 16, "name": name, "addresses": ["10.0.0.1"], "open": True, "admitted_by": "",
        "door_until": 0.0, "waiting": [], "seeking": "", "me": name == "anna",
        "inviting": "has an invitation open until 10:00, with 2 tries left" if name == "anna" else "",
    }  # fmt: skip


@dataclass
class Daemon:
    """A double that records requests."""

    url: str = ""
    rolled: dict[str, Any] = field(default_factory=lambda: dict(ROLLED))
    open: bool = True
    door: float = 0.0
    state: dict[str, Any] = field(default_factory=dict)
    """The answer to ``/api/cluster`` if it is not the usual one."""
    asked: list[tuple[str, Any]] = field(default_factory=list)

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        path, body = request.path.removeprefix("/api/cluster"), await request.read()
        if request.method == "POST" and path != "/pass":
            self.asked.append((path, json.loads(body)))
        nodes = [{**node(name), "door_until": self.door} for name in ("anna", "bert")]
        state = self.state or {"nodes": nodes, "open": self.open}
        gone = {"node": "c" * 16, "name": "cleo", "state": "away"}
        answers: dict[str, Any] = {
            "": state,
            "/members": {"members": [{"node": "a" * 16, "name": "anna", "state": "here"}, gone]},
            "/evict": {"node": "b" * 16, "name": "bert", **self.rolled},
            "/invite": {"code": "1234-5678", "seed": "10.0.0.1", "seconds": 600.0},
            "/join": {"name": "anna"},
            "/door": {"nodes": ["anna"]},
        }
        return web.json_response(answers.get(path, self.rolled))

    async def run(self, *words: str) -> int:
        return await asyncio.to_thread(main, [*words, "--node", self.url])


@pytest.fixture
async def daemon() -> AsyncIterator[Daemon]:
    made = Daemon()
    runner = web.ServerRunner(web.Server(made.answer))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    made.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield made
    await runner.cleanup()


@pytest.mark.parametrize("command", [("status",), ("nodes",), ("ps",), ("cluster", "members")])
async def test_an_answer_of_another_release_is_explained(
    daemon: Daemon, capsys: pytest.CaptureFixture[str], command: tuple[str, ...]
) -> None:
    """Its nodes have none of the fields that this release adds, or other ones."""
    daemon.state = {"nodes": [{"node": "a" * 16, "me": True, "release": "0.0.9"}], "open": False}
    assert await daemon.run(*command) == Exit.FAILED
    error = capsys.readouterr().err
    assert "the node runs sollold 0.0.9" in error and "use the same release" in error and "KeyError" in error
    daemon.state = {"nodes": [{"node": "a" * 16, "me": True, "release": __version__}], "open": False}
    with pytest.raises(KeyError):
        await daemon.run(*command)


async def test_evict_and_rotate_report_their_effects(
    daemon: Daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await daemon.run("cluster", "evict", "bert") == Exit.DONE
    output = capsys.readouterr().out
    assert f"bert ({'b' * 16}) was evicted" in output and "new secret on anna, bert" in output
    assert "they receive it when they return: cleo" in output
    daemon.door = time.time() + 600
    assert await daemon.run("cluster", "evict", "bert") == Exit.DONE
    assert "still admits new machines" in capsys.readouterr().err
    daemon.asked.pop()
    assert await daemon.run("cluster", "rotate") == Exit.DONE
    daemon.rolled["unsure"] = ["bert"]
    assert await daemon.run("cluster", "rotate") == Exit.FAILED
    assert "did not confirm: bert. Run `sollold cluster rotate`" in capsys.readouterr().err
    assert daemon.asked == [("/evict", {"machine": "bert"}), ("/rotate", {}), ("/rotate", {})]


@pytest.mark.parametrize(
    ("words", "answer", "expected"),
    [
        ((), "y\n", ["a" * 16, "b" * 16]),
        ((), "\n", None),
        (("--yes",), "", ["a" * 16, "b" * 16]),
        (("--yes", "--without", "bert"), "", ["a" * 16]),
        (("--yes", "--without", "nobody"), "", None),
    ],
)
async def test_secure_closes_an_open_cluster_to_the_shown_nodes(
    daemon: Daemon,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    answer: str,
    expected: list[str] | None,
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(answer))
    status = await daemon.run("cluster", "secure", *words)
    assert status == (Exit.DONE if expected else Exit.FAILED)
    assert daemon.asked == ([("/secure", {"nodes": expected})] if expected else [])


async def test_secure_does_nothing_in_a_secured_cluster(daemon: Daemon) -> None:
    daemon.open = False
    assert await daemon.run("cluster", "secure") == Exit.FAILED and not daemon.asked


@pytest.mark.parametrize(
    "words",
    [
        ("evict",),
        ("rotate", "bert"),
        ("members", "bert"),
        ("open", "soon"),
        ("close", "5m"),
        ("open", "0"),
        ("open", "0s"),
        ("open", "2d"),
        ("open", "nan"),
    ],
)
async def test_invalid_combinations_of_arguments_are_refused(daemon: Daemon, words: tuple[str, ...]) -> None:
    assert await daemon.run("cluster", *words) == Exit.USAGE and not daemon.asked


async def test_the_authority_is_printed_as_json(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    assert await daemon.run("cluster", "ca", "--json") == Exit.DONE
    assert set(json.loads(capsys.readouterr().out)) == {"certificate"}


async def test_offline_members_are_shown(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    assert await daemon.run("cluster", "members") == Exit.DONE
    output = capsys.readouterr().out
    assert (
        re.search(rf"cleo +{'c' * 16}  away", output) and "anna has an invitation open until 10:00" in output
    )


@pytest.mark.parametrize("ahead", [-5 * 3600, 600, 5 * 3600])
async def test_open_admission_is_shown_despite_clock_differences(
    daemon: Daemon, capsys: pytest.CaptureFixture[str], ahead: int
) -> None:
    daemon.door = time.time() + ahead
    assert await daemon.run("cluster", "members") == Exit.DONE
    first, second = capsys.readouterr().out.splitlines()[1:3]
    assert second.endswith("admits new machines") and "admits new machines" in first


def test_the_suggested_admit_command_names_the_compared_code() -> None:
    waiting = {"name": "-rf $(id)", "node": "d" * 16, "code": "ABCD-EFGH", "evicted": False}
    (sentence,) = of_admission({"nodes": [{**node("bert"), "waiting": [waiting]}]})
    assert sentence == "-rf $(id) waits for admission; if it shows ABCD-EFGH: sollold admit ABCD-EFGH"


async def test_a_machine_is_invited_and_joins(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    assert await daemon.run("invite") == Exit.DONE
    assert capsys.readouterr().out == (
        "on the new machine, within 10 min:\n  sollold join 1234-5678 --seed 10.0.0.1\n"
    )
    assert await daemon.run("join", "1234-5678", "--seed", "10.0.0.1") == Exit.DONE
    assert capsys.readouterr().out == "joined the cluster of anna\n"
    assert await daemon.run("cluster", "open", "5m") == Exit.DONE
    assert daemon.asked[1:] == [
        ("/join", {"code": "1234-5678", "seed": "10.0.0.1"}),
        ("/door", {"seconds": 300.0}),
    ]
