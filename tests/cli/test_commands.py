"""The commands against a double of the daemon: exit statuses, tables, JSON."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import io
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
from aiohttp import web
from rich.console import Console

from sollold.cli import answer as cli_answer
from sollold.cli import chat, doctor, key, nodes, progress, support
from sollold.cli.asking import client, console
from sollold.cli.exit import Exit
from sollold.cli.logs import added
from sollold.cli.main import ROOMS, main
from sollold.cli.parser import ALIASES, parser, read, subcommands
from sollold.cli.status import deployment_table, node_table
from sollold.cli.top import clock, frame, speed_line
from sollold.client.blocking import BlockingClient
from sollold.client.errors import ClientError

GIB = 1024**3

STATE: dict[str, Any] = {
    "leader": "aa",
    "leader_name": "anna",
    "term": 3,
    "open": True,
    "nodes": [
        {
            "node": "aa", "name": "anna", "addresses": ["10.0.0.1"], "http_port": 11435, "build": "b1",
            "setup": "ready", "draining": False,
            "devices": [{"id": "CPU", "name": "x", "total": 8 * GIB, "limit": 8 * GIB, "granted": 4 * GIB,
                         "available": 4 * GIB},
                        {"id": "pc:50052", "kind": "plain", "name": "", "total": GIB, "limit": GIB,
                         "granted": 0, "available": GIB}],
            "plain_workers": [{"address": "pc:50052", "state": "usable", "reason": ""},
                              {"address": "pc:50053", "state": "dead", "reason": "nothing listens"}],
        },
        {
            "node": "bb", "name": "bert", "addresses": ["10.0.0.2"], "http_port": 11435, "build": "",
            "setup": "building, 40 %", "draining": True, "empty": True, "devices": [],
        },
    ],
    "deployments": [
        {
            "id": "d1", "model": "big:latest", "node": "aa", "node_name": "anna", "state": "loading",
            "progress": 0.5, "context": 4096, "active": 1, "waiting": 2, "speed": 12.5, "bytes": 4 * GIB,
            "layers": 16, "pinned": False, "expires": 0.0, "reason": "",
            "placed": [{"node": "aa", "node_name": "anna", "device": "CPU", "first": 0, "last": 9,
                        "bytes": GIB},
                       {"node": "bb", "node_name": "bert", "device": "CPU", "first": 9, "last": 17,
                        "bytes": 3 * GIB}],
        }
    ],
}  # fmt: skip

PLAN: dict[str, Any] = {
    "ok": True, "reason": "big:latest fits two nodes", "context": 4096,
    "evicts": [["d0", "old"], ["d1", "idle"], ["d2", "rest"]],
    "prompt_tokens_per_second": 184.4,
    "plan": {
        "layers": 16, "tokens_per_second": 9.5, "load_seconds": 12.0,
        "reasons": ["anna has the file", "idle is idle and makes room.", "rest, idle, makes room."],
        "run": {"context": 4096},
        "host": {"node": "aa", "device": "CPU", "first": 0, "last": 9, "weights": GIB, "state": 1000,
                 "compute": 500, "overhead": 0},
        "shares": [{"node": "bb", "device": "CPU", "first": 9, "last": 17, "weights": GIB, "state": 1000,
                    "compute": 500, "overhead": 0}],
    },
    "free": [{"node": "aa", "device": "CPU", "after": GIB}],
    "options": [{"what": "anna alone", "tokens_per_second": 0.0, "reason": "2 GiB short"}],
    "missing": None, "estimate": False,
}  # fmt: skip

MISSING: dict[str, Any] = {
    "ok": False, "reason": "it does not fit", "plan": None,
    "missing": {"needed": 8 * GIB, "there": 5 * GIB, "missing": 3 * GIB, "remedies": ["a smaller context"]},
}  # fmt: skip


GROWING: list[str] = []
"""Log lines of an engine: one more for each request of the log."""
BOTH: dict[str, Any] = {"name": "both:latest", "size": GIB, "nodes": ["anna", "bert"]}


async def answer(request: web.BaseRequest) -> web.StreamResponse:
    path, body = request.path, await request.read()
    asked = json.loads(body) if body else {}
    if path == "/api/cluster":
        return web.json_response(STATE)
    if path == "/api/cluster/plan":
        if asked["model"] == "nope":
            return web.json_response({"error": "model 'nope' not found"}, status=404)
        short = asked.get("context") or asked["model"] in ("huge", "answers")
        return web.json_response(MISSING if short else PLAN)
    if path == "/api/cluster/route":
        by = {"score": 1.0, "endpoint": "ollama", "node": "anna", "why": "it runs there"}
        found = [by] if asked["model"] == "answers" else []
        return web.json_response({"model": asked["model"], "nodes": ["anna"], "endpoints": found})
    if path == "/api/cluster/drain":
        return web.json_response({"node": asked["node"], "draining": asked["on"]})
    if path == "/api/cluster/scan":
        facts = {"devices": 1, "total": GIB, "version": "7.0.0", "reason": "", "named": False}
        free = {**facts, "address": "pc:50052", "state": "usable"}
        busy = {**facts, "address": "tv:50052", "state": "busy", "reason": "it serves another client"}
        return web.json_response({"workers": [free, busy]})
    if path == "/api/cluster/unload":
        lost = {"unloaded": 0, "forgotten": True}
        if asked["model"] == "pending":
            return web.json_response({"unloaded": 0, "cancelled": True})
        return web.json_response(lost if asked["model"] == "lost" else {"unloaded": 2})
    if path == "/api/copy" and asked == {"source": "big", "destination": "mine", "nodes": ["anna", "bert"]}:
        return web.Response()
    if path == "/api/delete" and request.method == "DELETE" and asked == {"model": "mine", "nodes": []}:
        return web.Response()
    if path == "/api/delete" and asked["model"] == "both":
        BOTH["nodes"] = ["anna"]
        return web.Response()
    if path == "/api/doctor":
        return web.json_response({"findings": [{"grade": "problem", "what": "bad", "fix": "fix it"}]})
    if path == "/api/show" and asked["model"] == "absent":
        return web.json_response({"error": "model 'absent' not found"}, status=404)
    if path == "/api/pull" and asked["model"] == "absent":
        steps = ("pulling manifest", "pulling 1234", "pulling 1234", "success")
        return web.Response(body=b"".join(json.dumps({"status": step}).encode() + b"\n" for step in steps))
    if path == "/api/pull":
        lines = {"status": "pulling manifest"}, {"error": "file does not exist", "code": 404}
        return web.Response(body=b"".join(json.dumps(line).encode() + b"\n" for line in lines))
    if path in ("/api/chat", "/api/generate", "/api/show", "/api/cluster/load") and asked["model"] == "nope":
        return web.json_response({"error": "model 'nope' not found"}, status=404)
    if path == "/api/cluster/events":
        return web.Response(content_type="text/event-stream")
    if path == "/api/cluster/logs/growing":
        GROWING.append(f"line {len(GROWING)}")
        log = {"deployment": "d1", "node": "anna", "process": "llama-server", "reason": ""}
        return web.json_response({"logs": [{**log, "text": "\n".join(GROWING)}]})
    if path == "/api/tags":
        big = {"name": "big:latest", "size": GIB, "nodes": ["anna"]}
        return web.json_response({"models": [big, BOTH]})
    if path == "/api/chat" and asked["stream"]:
        response = web.StreamResponse()
        await response.prepare(request)
        for text in ("Hel", "lo"):
            await response.write(json.dumps({"message": {"content": text}, "done": False}).encode() + b"\n")
        await response.write(b'{"message":{"content":""},"done":true}\n')
        return response
    return web.json_response({"error": f"no {path}"}, status=500)


@pytest.fixture
async def url() -> AsyncIterator[str]:
    runner = web.ServerRunner(web.Server(answer))
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


async def sollold(url: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sollold", words[0], "--node", url, *words[1:]]
    return await asyncio.to_thread(
        subprocess.run, command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL
    )


async def test_status_shows_nodes_and_layers(url: str) -> None:
    done = await sollold(url, "status")
    assert done.returncode == Exit.DONE, done.stderr
    assert "2 nodes, leader anna (term 3)" in done.stdout
    assert "bert (drained)" in done.stdout and "building, 40 %" in done.stdout
    assert "0-8" in done.stdout and "9-15 + output" in done.stdout and "loading 50%" in done.stdout
    assert "Open cluster" in done.stdout
    assert "pc:50052 (external)" in done.stdout and "neither authenticated nor encrypted" in done.stdout
    assert "anna does not use the worker pc:50053: nothing listens" in done.stdout
    assert json.loads((await sollold(url, "status", "--json")).stdout) == STATE


@pytest.mark.parametrize(("more", "words"), [((), "2 nodes, leader anna"), (("--json",), '"leader_name"')])
async def test_watch_continues_when_the_output_is_a_pipe(url: str, more: tuple[str, ...], words: str) -> None:
    watching = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "sollold", "status", "--watch", "--node", url, *more, stdout=subprocess.PIPE
    )
    assert watching.stdout is not None
    try:
        async with asyncio.timeout(60):
            count = 0
            while count < 2:
                line = await watching.stdout.readline()
                assert line, "the command ended"
                count += words.encode() in line
    finally:
        watching.kill()
        await watching.wait()


@pytest.mark.parametrize("width", [70, 80, 100, 160])
def test_bars_keep_their_proportion_on_a_narrow_terminal(width: int) -> None:
    nodes = [STATE["nodes"][0] | {"addresses": ["192.168.1.11"]}]
    file = io.StringIO()
    out = Console(width=width, file=file, color_system=None)
    out.print(node_table(STATE | {"nodes": nodes}))
    text = file.getvalue()
    line = next(line for line in text.splitlines() if "anna" in line)
    assert line.count("█") == pytest.approx(line.count("·"), abs=1) and "█" in line
    assert "192.168.1.11:11435" in line and line.count("4.00 GiB") == 1 and "…" not in text


def test_the_speed_of_the_last_minute_is_a_sparkline() -> None:
    assert speed_line([0.0, 0.0, 2.0, 2.0, 4.0, 4.0]) == "2.4 tokens/s  ▁▅█"
    assert speed_line([]) == "0.0 tokens/s  "


def test_events_of_other_days_have_their_date_in_top() -> None:
    assert len(clock(time.time())) == len("12:00:00")
    assert len(clock(time.time() - 2 * 86400)) == len("2026-11-30 12:00:00")


@pytest.mark.parametrize("width", [40, 60, 80])
def test_a_narrow_terminal_breaks_no_words_or_numbers(width: int) -> None:
    nodes = [node | {"addresses": ["192.168.1.11"]} for node in STATE["nodes"]]
    state = STATE | {"nodes": nodes, "requests": [], "speeds": [0.0, 4.5, None] * 20, "events": []}
    file = io.StringIO()
    out = Console(width=width, file=file, color_system=None)
    out.print(frame(state, "all", paused=False))
    lines = file.getvalue().splitlines()
    assert all(len(line) <= width for line in lines)
    # The keys are visible on every screen size.
    assert lines[1].startswith("q quit")
    header, anna = (next(line for line in lines if line.startswith(start)) for start in ("node ", "anna "))
    assert "4.00 GiB" in anna and "free" in header
    assert set(header.split()) <= {"node", "address", "device", "granted", "free", "memory", "llama.cpp"}
    assert ("192.168.1.11:11435" in anna) == ("address" in header)


def test_names_are_not_interpreted_as_markup(capsys: pytest.CaptureFixture[str]) -> None:
    placed = [share | {"node_name": "[/anna]"} for share in STATE["deployments"][0]["placed"]]
    found = STATE["deployments"][0] | {"model": "odd[red]:x:on:y", "placed": placed}
    nodes = [STATE["nodes"][0] | {"name": "[/anna]"}, STATE["nodes"][1]]
    console().print(node_table(STATE | {"nodes": nodes}))
    console().print(deployment_table(STATE | {"nodes": nodes, "deployments": [found]}))
    output = capsys.readouterr().out
    assert "[/anna] *" in output and "[/anna] CPU" in output and "odd[red]:x:on:y" in output
    assert main(["config", "--config", "/dev/null", "--set", "cluster.seeds=[fe80::1]:11436"]) == Exit.DONE
    assert '["[fe80::1]:11436"]' in capsys.readouterr().out


def test_the_acceptance_rate_is_shown_once_something_was_drafted(capsys: pytest.CaptureFixture[str]) -> None:
    for drafted, shown in ((0, "(small:latest)"), (8, "(small:latest 25%)")):
        drafts = {"by": "small:latest", "drafted": drafted, "acceptance": drafted and 0.25}
        found = STATE["deployments"][0] | {"speculation": drafts}
        console().print(deployment_table(STATE | {"deployments": [found]}))
        assert shown in capsys.readouterr().out


async def test_scan_lists_workers_and_the_settings_to_use_them(url: str) -> None:
    done = await sollold(url, "scan")
    assert done.returncode == Exit.DONE, done.stderr
    assert "pc:50052  usable  1 device, 1.00 GiB  protocol 7.0.0" in done.stdout
    assert "(it serves another client)" in done.stdout
    assert 'rpc_backends = ["pc:50052"]' in done.stdout and "allow_plain_workers = true" in done.stdout
    found = json.loads((await sollold(url, "scan", "--json")).stdout)
    assert [worker["address"] for worker in found] == ["pc:50052", "tv:50052"]


async def test_plan_draws_bars_and_reports_missing_memory(url: str) -> None:
    done = await sollold(url, "plan", "big")
    assert done.returncode == Exit.DONE, done.stderr
    assert "anna (head)" in done.stdout and "█" in done.stdout and "9.5 tokens/s" in done.stdout
    assert "reads prompts at about 184 tokens/s" in " ".join(done.stdout.split())
    assert "anna alone" in done.stdout and "old (d0) would be unloaded" in done.stdout
    assert "idle is idle and makes room" in done.stdout and "d1" not in done.stdout, (
        "idle deployments are not listed twice"
    )
    assert "rest, idle, makes room" in done.stdout and "d2" not in done.stdout, (
        "nor are those that an older release describes"
    )
    done = await sollold(url, "plan", "big", "--context", "100000")
    assert done.returncode == Exit.TOO_BIG
    assert "3.00 GiB" in done.stdout and "a smaller context" in done.stdout


@pytest.mark.parametrize(
    ("model", "status"), [("big", Exit.DONE), ("huge", Exit.TOO_BIG), ("answers", Exit.DONE)]
)
async def test_route_fails_if_no_endpoint_could_answer(url: str, model: str, status: Exit) -> None:
    for more in ((), ("--json",)):
        assert (await sollold(url, "route", model, *more)).returncode == status, more


async def test_exit_statuses(url: str) -> None:
    assert (await sollold(url, "plan", "nope")).returncode == Exit.NO_MODEL
    assert (await sollold(url, "pull", "nope")).returncode == Exit.NO_MODEL
    assert (await sollold(url, "doctor")).returncode == Exit.FAILED
    assert (await sollold(url, "load", "big")).returncode == Exit.FAILED
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        done = await sollold(f"http://127.0.0.1:{taken.getsockname()[1]}", "status")
    assert done.returncode == Exit.UNREACHABLE
    assert "sollold run" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("words", [("chat", "nope", "hello"), ("load", "nope"), ("bench", "nope")])
async def test_a_missing_model_gives_the_download_command(url: str, words: tuple[str, ...]) -> None:
    done = await sollold(url, *words)
    assert done.returncode == Exit.NO_MODEL
    assert done.stderr.endswith("model 'nope' not found; to download it: sollold pull nope\n")


async def test_run_downloads_a_model_that_no_node_has(url: str) -> None:
    done = await sollold(url, "run", "absent", "hello")
    assert (done.returncode, done.stdout) == (Exit.DONE, "Hello\n")
    assert done.stderr.splitlines() == [
        "sollold: no node has absent yet, so it is downloaded",
        *("pulling manifest", "pulling 1234", "success"),
    ]
    done = await sollold(url, "run", "big", "hello")
    assert (done.stdout, done.stderr) == ("Hello\n", "")
    done = await sollold(url, "run", "nope", "hello")
    assert done.returncode == Exit.NO_MODEL
    assert done.stderr.endswith("model 'nope' not found, and could not be downloaded: file does not exist\n")


def test_chat_fails_at_once_if_the_model_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    class Daemon:
        def post(self, path: str, body: dict[str, Any]) -> None:
            raise ClientError("model 'nope' not found", 404)

    monkeypatch.setattr(chat, "client", lambda options: Daemon())
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    with pytest.raises(ClientError):
        chat.chat(read(["chat", "nope"]))


async def test_logs_follow_prints_new_lines(url: str) -> None:
    words = [sys.executable, "-m", "sollold", "logs", "--node", url, "-f", "growing"]
    # Background jobs inherit an ignored SIGINT.
    default_sigint = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = await asyncio.create_subprocess_exec(*words, stdout=subprocess.PIPE, preexec_fn=default_sigint)
    assert process.stdout is not None
    log_lines = [(await asyncio.wait_for(process.stdout.readline(), 30)).decode() for _ in range(4)]
    assert log_lines == ["==> d1 on anna: llama-server <==\n", "line 0\n", "line 1\n", "line 2\n"]
    process.send_signal(signal.SIGINT)
    assert await asyncio.wait_for(process.wait(), 30) == 130  # like `tail -f` and the other commands


@pytest.mark.parametrize(
    ("before", "now", "new"),
    [
        ("", "ab", "ab"),
        ("ab", "ab", ""),
        ("ab", "abc", "c"),
        ("abc", "bcd", "d"),
        ("aa", "aaa", "a"),
        ("ab", "xy", "xy"),
    ],
)
def test_new_lines_of_a_log(before: str, now: str, new: str) -> None:
    assert added(list(before), list(now)) == list(new)


async def test_an_empty_list_of_events_is_reported(url: str) -> None:
    done = await sollold(url, "events")
    assert (done.returncode, done.stdout) == (Exit.DONE, "") and "no events since" in done.stderr


@pytest.mark.parametrize("body", [b"<html>hello</html>", b"[1, 2]", b"\xff", b"x" * 500_000], ids=len)
@pytest.mark.parametrize("words", [("status",), ("chat", "big", "hello"), ("load", "big"), ("doctor",)])
async def test_a_server_that_is_not_sollold_is_recognized(words: tuple[str, ...], body: bytes) -> None:
    async def welcome(request: web.BaseRequest) -> web.Response:
        return web.Response(body=body)

    runner = web.ServerRunner(web.Server(welcome))
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        done = await sollold(f"127.0.0.1:{runner.addresses[0][1]}", *words)
    finally:
        await runner.cleanup()
    assert done.returncode == Exit.FAILED
    assert "is not sollold" in done.stderr and len(done.stderr.splitlines()) == 1


def test_an_unwritable_cache_is_reported_with_its_setting(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    words = ["setup", "--config", "/dev/null", "--set", f"node.cache_dir={tmp_path}/file/cache"]
    assert main([*words, "--set", f"node.state_dir={tmp_path}/state"]) == Exit.FAILED
    output = capsys.readouterr().err
    assert f"can't write {tmp_path}/file" in output and "node.cache_dir" in output


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("::", "http://[::1]:8000"),
        ("fd00::5", "http://[fd00::5]:8000"),
        ("pc2", "http://pc2:8000"),
    ],
)
def test_the_local_daemon_is_contacted_at_its_configured_address(
    monkeypatch: pytest.MonkeyPatch, host: str, url: str
) -> None:
    monkeypatch.delenv("SOLLOLD_NODE_URL", raising=False)
    monkeypatch.setenv("SOLLOLD_CONFIG", "/dev/null")
    monkeypatch.setenv("SOLLOLD_HTTP_HOST", host)
    monkeypatch.setenv("SOLLOLD_HTTP_PORT", "8000")
    assert client(read(["status"])).url == url


@pytest.mark.parametrize("words", [("status",), ("doctor",), ("support", "--output", "a.tar.gz")])
async def test_commands_reach_the_daemon_despite_an_invalid_settings_file(
    url: str, tmp_path: Path, words: tuple[str, ...]
) -> None:
    """A running daemon keeps the settings it has read."""
    (tmp_path / "sollold").mkdir()
    (tmp_path / "sollold/sollold.toml").write_text("[http]\n[http]\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SOLLOLD_")}
    environment |= {"XDG_CONFIG_HOME": str(tmp_path), "SOLLOLD_HTTP_PORT": url.rpartition(":")[2]}

    def ask() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "sollold", *words],
            env=environment, capture_output=True, text=True, timeout=60, cwd=tmp_path,
        )  # fmt: skip

    done = await asyncio.to_thread(ask)
    assert done.stdout and done.returncode in (Exit.DONE, Exit.FAILED), done.stderr
    assert done.stderr.count("sollold.toml: not TOML") == 1


async def test_chat_prints_the_streamed_answer(url: str) -> None:
    done = await sollold(url, "chat", "big", "say", "hello")
    assert (done.returncode, done.stdout) == (Exit.DONE, "Hello\n")


def test_the_progress_bar_ends_before_the_first_token(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Bar:
        def end(self) -> None:
            print("<end>", end="")

    @contextlib.contextmanager
    def loading(daemon: object, model: str) -> Iterator[Bar]:
        yield Bar()

    class Daemon:
        def stream(self, path: str, body: object) -> Iterator[dict[str, Any]]:
            yield {"message": {"content": ""}}
            yield {"message": {"content": "Hello"}, "done": True}

    monkeypatch.setattr(cli_answer, "loading", loading)
    printed = cli_answer.answer(cast(BlockingClient, Daemon()), "m", [], cli_answer.Sampling(verbose=False))
    assert printed == cli_answer.Told("Hello", stopped=False) and capsys.readouterr().out == "<end>Hello\n"


@pytest.mark.parametrize(
    ("states", "continues"),
    [
        (("failed", "draining"), False),
        (("ready",), False),
        (("failed", "loading"), True),
        (("starting",), True),
    ],
)
def test_ctrl_c_reports_whether_the_load_continues(
    states: tuple[str, ...], continues: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    class Daemon:
        def get(self, path: str, **_: object) -> dict[str, Any]:
            return {"deployments": [{"model": "big:latest", "state": state} for state in states]}

    with pytest.raises(KeyboardInterrupt), progress.loading(cast("BlockingClient", Daemon()), "big"):
        raise KeyboardInterrupt
    assert ("continues" in capsys.readouterr().err) is continues


def test_an_answer_stopped_by_ctrl_c_exits_with_130(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Daemon:
        def stream(self, path: str, body: object) -> Iterator[dict[str, Any]]:
            yield {"message": {"content": "Hel"}}
            raise KeyboardInterrupt

    monkeypatch.setattr(chat, "client", lambda options: Daemon())
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert main(["chat", "m", "hello"]) == 130
    assert capsys.readouterr().out == "Hel\n"


@pytest.mark.parametrize("width", [40, 80])
def test_findings_are_indented_and_commands_are_not_wrapped(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "console", lambda: Console(width=width, highlight=False))
    fix = "sudo systemctl edit sollold --with --many --words " * 3
    doctor._show([{"grade": "problem", "what": "something is wrong " * 9, "fix": fix}])
    first, *rest, last = capsys.readouterr().out.splitlines()
    assert first.startswith("problem  something") and last == f"         → {fix}"
    assert rest and all(line[:9].isspace() and not line[9].isspace() for line in rest)
    assert all(len(line) <= width for line in (first, *rest))


async def test_pull_prints_json_lines(url: str) -> None:
    done = await sollold(url, "pull", "small", "--json")
    assert [json.loads(line)["status"] for line in done.stdout.splitlines()]


async def test_support_prints_the_file_name_as_json(url: str, tmp_path: Path) -> None:
    file = tmp_path / "s.tar.gz"
    done = await sollold(url, "support", "--json", "-o", str(file))
    assert json.loads(done.stdout) == {"file": str(file)} and file.exists() and not done.stderr


async def test_support_accepts_an_existing_folder_only(url: str, tmp_path: Path) -> None:
    assert (await sollold(url, "support", "-o", str(tmp_path))).returncode == Exit.DONE
    assert await asyncio.to_thread(lambda: len(list(tmp_path.glob("sollold-support-*.tar.gz")))) == 1
    file = tmp_path / "nowhere" / "s.tar.gz"
    done = await sollold(url, "support", "-o", str(file))
    assert (done.returncode, done.stderr) == (
        Exit.FAILED,
        f"sollold: No such file or directory: {file}\n",
    )


def test_a_failed_write_of_an_archive_keeps_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "s.tar.gz"
    support._write(file, b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(OSError, match=r"s\.tar\.gz") as caught:
            support._write(file, bytes(2 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG
    assert [*tmp_path.iterdir()] == [file] and file.read_bytes() == b"old"
    link = tmp_path / "link"
    link.symlink_to(file)
    support._write(link, b"new")
    assert link.is_symlink() and file.read_bytes() == b"new"


def test_help_of_help_is_the_general_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        read(["help", "help"])
    assert ended.value.code == 0 and "exit status:" in capsys.readouterr().out


@pytest.mark.parametrize("columns", [40, 200])
def test_the_console_uses_the_width_of_a_dumb_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert console().width == columns


def test_only_a_prompt_may_follow_options(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ("chat big say hello", "chat big --think say hello", "chat big say --system x hello"):
        options = read(words.split())
        assert (options.model, options.prompt) == ("big", ["say", "hello"])
    for words in ("chat big --thnk hello", "load big --context 5 hello", "completion man --set http.port=1"):
        with pytest.raises(SystemExit) as ended:
            read(words.split())
        assert ended.value.code == Exit.USAGE
        assert "unrecognized arguments: " in capsys.readouterr().err


def test_an_invalid_duration_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert [read(["load", "big", "--keep-alive", time]).keep_alive for time in ("5m", "-1")] == [300, -1]
    with pytest.raises(SystemExit) as ended:
        main(["load", "big", "--keep-alive", "soon"])
    assert ended.value.code == Exit.USAGE
    assert "'soon' is not a duration" in capsys.readouterr().err


async def test_unload_models_and_ps(url: str) -> None:
    assert "2 unloaded" in (await sollold(url, "unload", "big")).stdout
    assert (await sollold(url, "unload", "--force", "pending")).stdout == "pending: load cancelled\n"
    assert "lost was lost; it is not loaded again" in (await sollold(url, "unload", "lost")).stdout
    assert "big:latest" in (await sollold(url, "models")).stdout
    assert "big:latest" in (await sollold(url, "ps")).stdout
    assert "big:latest" in (await sollold(url, "ps", "--quiet")).stdout.splitlines()


async def test_drain_waits_until_the_node_is_empty(url: str) -> None:
    done = await sollold(url, "drain", "bert")
    assert done.returncode == Exit.DONE and "bert is drained" in done.stdout and "safe to stop" in done.stdout
    assert "accepts requests again" in (await sollold(url, "drain", "--undo", "bert")).stdout
    # anna accepts the request but never reports that it is drained.
    assert (await sollold(url, "drain", "anna")).returncode == Exit.FAILED


async def test_copy_and_delete(url: str) -> None:
    done = await sollold(url, "copy", "big", "mine", "--on", "anna", "--on", "bert")
    assert (done.returncode, done.stdout) == (Exit.DONE, "copied big to mine\n"), done.stderr
    done = await sollold(url, "delete", "mine")
    assert (done.returncode, done.stdout) == (Exit.DONE, "deleted mine\n"), done.stderr
    # Downloaded copies are deleted; files of the user are kept.
    done = await sollold(url, "delete", "both")
    assert done.stdout == "deleted both from bert\nit stays on anna\n", done.stderr


def test_every_command_has_a_module_and_help() -> None:
    import importlib

    choices = subcommands(parser())
    assert set(choices) == set(ROOMS) | set(ALIASES) and set(ALIASES.values()) < set(ROOMS)
    for name, module in ROOMS.items():
        assert callable(getattr(importlib.import_module(f"sollold.cli.{module}"), name))
    for sub in choices.values():
        assert all(action.help for action in sub._actions)


@pytest.mark.parametrize("command", ["nodes", "models", "ps", "version"])
def test_a_query_command_imports_little(command: str) -> None:
    """Imports take most of the time of a short command."""
    asking = f"from sollold.cli.main import main; main(['--node', '127.0.0.1:1', '{command}'])"
    listing = "import sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", f"{asking}; {listing}"], capture_output=True, text=True, timeout=60
    )
    loaded = set(done.stdout.split())
    assert "sollold.client.blocking" in loaded
    assert not loaded & {
        "asyncio",
        "msgspec",
        "rich",
        "aiohttp",
        "sollold.settings.schema",
        "sollold.client.pool",
    }


def test_ctrl_c_during_imports_ends_quietly() -> None:
    """The entry point handles KeyboardInterrupt before it imports anything else."""
    root = Path(__file__).parents[2]
    scripts = tomllib.loads((root / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, function = scripts["sollold"].partition(":")
    program = f"""
import os, signal, sys
class Interrupted:
    def find_spec(self, name, path=None, target=None):
        if name == "argparse":
            os.kill(os.getpid(), signal.SIGINT)
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Interrupted())
from {module} import {function}
sys.exit({function}())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
    assert f"from {module} import {function}" in (root / "packaging/deb/sollold").read_text()


def test_bash_completes_names_with_a_colon(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == Exit.DONE
    script = tmp_path / "sollold.bash"
    script.write_text(capsys.readouterr().out)
    typed = """sollold() { echo llama3.2:3b; }
        timeout() { shift; "$@"; }
        source "$0"
        COMP_WORDS=(sollold run llama3.2 : 3); COMP_CWORD=4; _sollold; echo "${COMPREPLY[*]}"
        COMP_WORDS=(sollold run l); COMP_CWORD=2; _sollold; echo "${COMPREPLY[*]}"
        COMP_WORDS=(sollold --node l); COMP_CWORD=2; _sollold; echo "${COMPREPLY[*]}" """
    done = subprocess.run(["bash", "-c", typed, script], capture_output=True, text=True, timeout=30)
    assert done.stdout.splitlines() == ["3b", "llama3.2:3b", "llama3.2:3b"], done.stderr


def test_key_list_quiet_prints_valid_keys_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Client:
        def get(self, path: str) -> object:
            return {"keys": [{"name": "laptop", "revoked": ""}, {"name": "old", "revoked": "2026-01-01"}]}

    monkeypatch.setattr(key, "client", lambda options: Client())
    assert main(["key", "list", "--quiet"]) == Exit.DONE
    assert capsys.readouterr().out == "laptop\n"


def test_bash_completion_matches_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == Exit.DONE
    script = tmp_path / "sollold.bash"
    script.write_text(capsys.readouterr().out)
    typed = """sollold() { tr " " "-" <<< "$*"; }
        timeout() { shift; "$@"; }
        source "$0"
        for line in "forget " "drain " "stop " "logs " "key revoke " "key new " "admit " \\
            "cluster evict " "cluster open "; do
            COMP_WORDS=($line ""); COMP_WORDS=(sollold "${COMP_WORDS[@]}")
            COMP_CWORD=$(( ${#COMP_WORDS[@]} - 1 )); COMPREPLY=(); _sollold; echo "${COMPREPLY[*]}"
        done """
    done = subprocess.run(["bash", "-c", typed, script], capture_output=True, text=True, timeout=30)
    assert done.stdout.splitlines() == [
        "nodes---quiet---offline",
        "nodes---quiet",
        "ps---quiet",
        "ps---quiet",
        "key-list---quiet",
        "",
        "nodes---quiet---waiting",
        "nodes---quiet",
        "",
    ], done.stderr


def test_bash_completion_does_not_execute_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == Exit.DONE
    script = tmp_path / "sollold.bash"
    script.write_text(capsys.readouterr().out)
    names = ["$(touch run)", "`touch run`", "lap top", "*", "~", "a'b", "{x,y}", "$HOME"]
    (tmp_path / "names").write_text("\n".join(names) + "\n")
    typed = """sollold() { cat names; }
        timeout() { shift; "$@"; }
        source "$0"
        for command in admit drain forget; do
            COMP_WORDS=(sollold $command ""); COMP_CWORD=2; COMPREPLY=(); _sollold
            printf '%s\n' "${COMPREPLY[@]}"
        done
        COMP_WORDS=(sollold admit la); COMPREPLY=(); _sollold; printf '%s\n' "${COMPREPLY[@]}" """
    done = subprocess.run(
        ["bash", "-c", typed, script], capture_output=True, text=True, timeout=30, cwd=tmp_path
    )
    assert done.stdout.splitlines() == names * 3 + ["lap top"], done.stderr
    assert not (tmp_path / "run").exists()


def test_machines_waiting_for_admission_are_listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waiting = {"node": "c" * 16, "name": "cleo", "code": "ABCD-EFGH", "evicted": False}

    class Client:
        def get(self, path: str) -> object:
            return {"nodes": [{"name": "anna", "waiting": [waiting]}, {"name": "bert", "waiting": [waiting]}]}

    monkeypatch.setattr(nodes, "client", lambda options: Client())
    assert main(["nodes", "--waiting", "--quiet"]) == Exit.DONE
    assert capsys.readouterr().out == "cleo\n"
    assert main(["nodes", "--waiting"]) == Exit.DONE
    assert capsys.readouterr().out.splitlines()[1].split() == [
        "cleo", "c" * 16, "ABCD-EFGH", "anna,", "bert",
    ]  # fmt: skip
    assert main(["nodes", "--waiting", "--json"]) == Exit.DONE
    assert json.loads(capsys.readouterr().out) == [{**waiting, "at": ["anna", "bert"]}]


@pytest.mark.parametrize("expires", [None, "", "30d"])
def test_an_empty_expiry_of_a_key_is_sent(monkeypatch: pytest.MonkeyPatch, expires: str | None) -> None:
    sent: list[Any] = []

    class Client:
        def post(self, path: str, body: dict[str, Any]) -> object:
            sent.append(body)
            return {"key": "sk-sollold-x"}

    monkeypatch.setattr(key, "client", lambda options: Client())
    words = [] if expires is None else ["--expires", expires]
    assert main(["key", "new", "laptop", *words]) == Exit.DONE
    assert sent[0].get("expires") == expires


def test_config_check_is_silent_for_valid_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--check", "--config", "/dev/null"]) == Exit.DONE
    assert capsys.readouterr() == ("", "")
    assert main(["config", "--check", "--config", "/dev/null", "--set", "http.prt=1"]) == Exit.USAGE
    assert "http.prt" in capsys.readouterr().err


def test_config_json_has_typed_values(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["node.memory_limit=20GiB", "llama.rpc_backends=pc:50052", f"cluster.token={'ab' * 32}"]
    flags = [part for word in words for part in ("--set", word)]
    assert main(["config", "--json", "--config", "/dev/null", *flags]) == Exit.DONE
    output = capsys.readouterr().out
    found = {key: setting["value"] for key, setting in json.loads(output).items()}
    assert found["node.memory_limit"] == 20 << 30 and found["http.port"] == 11435
    assert found["llama.rpc_backends"] == ["pc:50052"] and found["models.aliases"] == {}
    assert found["llama.allow_plain_workers"] is False and found["placement.policy"] == "fastest"
    assert found["placement.keep_alive"] == 300.0 and found["cluster.token"] == "(set)"
    assert "abab" not in output


def test_config_and_completions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--config", "/dev/null", "--set", "http.port=8080"]) == Exit.DONE
    assert "--set http.port=8080" in capsys.readouterr().out
    assert main(["config", "--config", "/dev/null", "--set", "http.prt=8080"]) == Exit.USAGE
    assert "did you mean" in capsys.readouterr().err
    assert main(["completion", "bash"]) == Exit.DONE
    assert "sollold" in capsys.readouterr().out
    assert main(["completion", "fish"]) == Exit.DONE
    output = capsys.readouterr().out
    listing = "-a '(timeout 3 sollold nodes --quiet"
    assert f"complete -c sollold -n '__fish_seen_subcommand_from drain' {listing}" in output
    assert f"complete -c sollold -n '__fish_use_subcommand' -l node -x {listing}" in output
    for condition, words in (
        ("'__fish_seen_subcommand_from forget'", "nodes --quiet --offline"),
        ("'__fish_seen_subcommand_from key; and __fish_seen_subcommand_from revoke'", "key list --quiet"),
        ("'__fish_seen_subcommand_from stop'", "ps --quiet"),
        ("'__fish_seen_subcommand_from load'", "models --quiet"),
    ):
        assert f"complete -c sollold -n {condition} -a '(timeout 3 sollold {words} 2>/dev/null)'" in output
    assert main(["completion", "man"]) == Exit.DONE
    output = capsys.readouterr().out
    assert (
        ".SH COMMANDS" in output and "new secret; nothing restarts" in output and "SOLLOLD_API_KEY" in output
    )
    assert main(["token"]) == Exit.DONE
    assert len(capsys.readouterr().out.strip()) == 64
