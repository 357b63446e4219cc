"""Command-line parsing: aliases, option order, hints, and the choice of the node."""

from __future__ import annotations

import argparse
import re
import socket
from pathlib import Path

import pytest

import sollold
from sollold.cli import asking
from sollold.cli.asking import client
from sollold.cli.exit import Exit
from sollold.cli.parser import parser, read, subcommands
from sollold.client.blocking import BlockingClient
from sollold.client.errors import ClientError


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("list", "models"), ("ls", "models"), ("rm m", "delete"), ("cp m n", "copy"), ("stop m", "unload"),
        ("serve", "run"), ("run", "run"), ("run m", "chat"), ("show m", "show"), ("ps", "ps"),
    ],
)  # fmt: skip
def test_command_names_of_ollama_are_aliases(typed: str, meant: str) -> None:
    assert read(typed.split()).command == meant


def test_run_takes_a_prompt() -> None:
    options = read(["run", "m", "why", "is", "the", "sky", "blue?", "--system", "be brief"])
    assert (options.command, options.model, " ".join(options.prompt)) == ("chat", "m", "why is the sky blue?")
    assert options.system == "be brief"


def test_options_may_come_before_or_after_the_command() -> None:
    for words in (["--node", "bert", "--json", "status"], ["status", "--json", "--node", "bert"]):
        options = read(words)
        assert (options.command, options.node, options.json) == ("status", "bert", True)
    assert read(["status"]).node == ""


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("status --jsn", "did you mean --json?"),
        ("statsu", "did you mean status?"),
        ("--node x modles", "did you mean models?"),
        ("evict bert", "did you mean cluster evict?"),
        ("--json rotate", "did you mean cluster rotate?"),
        ("revoke laptop", "did you mean key revoke?"),
        ("frobnicate", "`sollold help` lists all commands"),
        ("STATUS", "did you mean status?"),
        ("bogus", "unknown command 'bogus' (`sollold help`"),
        ("load m extra", "usage: sollold load "),
        ("key", "missing one of new, list, revoke"),
        ("chat", "missing MODEL\n"),
        ("plan m --policy x", "argument --policy: invalid choice: 'x' (choose from "),
        ("serve m", "sollold run MODEL"),
        ("setup --node x", "unrecognized arguments"),
        ("--node x setup", "asks no node"),
    ],
)
def test_invalid_arguments_give_a_hint(words: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        read(words.split())
    assert ended.value.code == Exit.USAGE and hint in capsys.readouterr().err


def test_commands_in_messages_quote_names() -> None:
    """A machine or model may be called ``$(id)``."""
    known = "|".join(subcommands(parser()))
    command = re.compile(rf"sollold (?:{known}) (?:[a-z]+ |--\S+ )*(?:\{{([^}}]*)|%s)")
    bare = [
        f"{file.name}:{number}: {line.strip()}"
        for file in Path(sollold.__file__).parent.rglob("*.py")
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if command.search(line)
        and "quote" not in line
        and "{answer['code']}" not in line
        and "_named(" not in line
    ]
    assert bare == []


def test_minus_v_prints_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        read(["-v"])
    assert ended.value.code == 0 and capsys.readouterr().out.startswith("sollold ")


@pytest.mark.parametrize("words", [[], ["help"], ["help", "load"], ["--help"]])
def test_help(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        read(words)
    assert ended.value.code == 0
    assert ("keep-alive" if "load" in words else "doctor") in capsys.readouterr().out


@pytest.mark.parametrize(
    ("named", "url"),
    [
        ("http://pc:8080/", "http://pc:8080"),
        ("10.1.2.3", "http://10.1.2.3:11435"),
        ("10.1.2.3:99", "http://10.1.2.3:99"),
        ("fe80::1", "http://[fe80::1]:11435"),
        ("[fe80::1]:99", "http://[fe80::1]:99"),
        ("pc.lan", "http://pc.lan:11435"),
        ("bert", "http://192.168.1.12:11435"),
        ("BERT", "http://192.168.1.12:11435"),
        ("elsewhere", "http://elsewhere:11435"),
    ],
)
def test_the_node_option_accepts_urls_addresses_and_names(
    named: str, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = [{"name": "Bert", "node": "b1", "url": "http://192.168.1.12:11435"}]
    monkeypatch.setattr(BlockingClient, "get", lambda self, path: {"nodes": nodes})
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, port: [host])
    assert client(argparse.Namespace(node=named)).url == url


def test_a_node_name_is_looked_up_in_the_cluster_of_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []

    def get(self: BlockingClient, path: str) -> dict[str, object]:
        asked.append(self.url)
        return {"nodes": [{"name": "bert", "node": "b1", "url": "http://192.168.1.12:11435"}]}

    monkeypatch.setattr(BlockingClient, "get", get)
    monkeypatch.setenv("SOLLOLD_NODE_URL", "http://server:8080")
    assert client(argparse.Namespace(node="bert")).url == "http://192.168.1.12:11435"
    assert asked == ["http://server:8080"]


@pytest.mark.parametrize(
    "words", [["help"], ["--json", "help"], ["--node", "bert", "help"], ["help", "load"]]
)
def test_help_after_options(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        read(words)
    assert ended.value.code == 0 and "usage: sollold" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("two", "several nodes are named 'two'; name one by its id: b2 (http://a), b3 (http://b)"),
        ("nowhere", "there is no node 'nowhere' and no machine of that name; nodes: two, two"),
    ],
)
def test_an_ambiguous_or_unknown_node_is_reported(
    named: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = [
        {"name": "two", "node": f"b{number}", "url": url}
        for number, url in ((2, "http://a"), (3, "http://b"))
    ]
    monkeypatch.setattr(BlockingClient, "get", lambda self, path: {"nodes": nodes})
    monkeypatch.setattr(asking, "_is_host", lambda name: False)
    with pytest.raises(ClientError, match=re.escape(message)):
        client(argparse.Namespace(node=named))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["run", "m", "hi", "--port", "8080"],
            "--port: only without a MODEL; --node HOST:PORT names the daemon",
        ),
        (["run", "m", "--set", "http.port=1", "--seed", "pc:1"], "--set, --seed: only without a MODEL"),
        (["run", "--system", "be brief", "--think"], "--system, --think: only with a MODEL"),
        (["serve", "--think"], "--think: only with a MODEL"),
    ],
)
def test_options_of_run_that_would_do_nothing_are_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        read(words)
    assert ended.value.code == 2 and message in capsys.readouterr().err
    assert read(["run", "m", "--think"]).command == "chat" and read(["run", "--port", "1"]).command == "run"
