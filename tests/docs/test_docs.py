"""The documentation agrees with the program: pages, commands, routes, settings, links."""

from __future__ import annotations

import argparse
import importlib.util
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from sollold import tracing
from sollold.cli import status
from sollold.cli.parser import parser, read, subcommands
from sollold.settings.catalogue import catalogue
from tests.docs.pages import FOLDER, PAGES, routes

ROOT = FOLDER.parent
PAGE_FILES = sorted(
    [*FOLDER.glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("packaging/*.md")]
)
PACKAGES = sorted((ROOT / "sollold").glob("*/"))
_BLOCK = re.compile(r"^```(sh|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_KEY = re.compile(r"`(\w+\.\w+)(?: = [^`]*)?`")


def commands() -> list[tuple[str, str]]:
    """Return each command of the shell and console blocks with its page."""
    found = []
    for page in PAGE_FILES:
        for kind, block in _BLOCK.findall(page.read_text("utf-8")):
            for line in block.replace("\\\n", " ").splitlines():
                if kind == "console":
                    if not line.startswith("$ "):
                        continue
                    line = line[2:]
                if line.strip() and not line.startswith("#"):
                    found.append((page.name, line))
    return found


def of_program(name: str) -> list[tuple[str, str]]:
    return [entry for entry in commands() if shlex.split(entry[1], comments=True)[:1] == [name]]


@pytest.mark.parametrize("name", sorted(PAGES))
def test_generated_pages_are_current(name: str) -> None:
    assert (FOLDER / name).read_text("utf-8") == PAGES[name](), "run: python -m tests.docs.pages"


@pytest.mark.parametrize(("page", "line"), of_program("sollold"))
def test_each_command_is_valid(page: str, line: str) -> None:
    words = shlex.split(line.partition(" > ")[0], comments=True)[1:]
    assert read(words).command


def test_files_are_written_to_folders_created_before() -> None:
    """The configuration folders do not exist in a new account."""
    lines = [line for _, line in commands()]
    made = {word for line in lines if line.startswith("mkdir -p ") for word in shlex.split(line)[2:]}
    for line in lines:
        _, written, file = line.partition(" > ")
        assert not written or "/" not in file or file.rpartition("/")[0] in made, line


def test_each_inline_command_is_valid() -> None:
    """A command's name without its arguments is valid too."""
    known = subcommands(parser())
    for page in PAGE_FILES:
        for code in re.findall(r"`sollold ([^`]+)`", page.read_text("utf-8").replace("\n", " ")):
            words = [word for word in shlex.split(code) if word != "…"]
            if words in ([], ["--node"], ["--node", "NODE"], ["COMMAND", "--help"]):
                continue
            assert words[0] in known or read(words).command, f"{page.name}: {code}"
            options = [word.partition("=")[0] for word in words[1:] if word.startswith("--")]
            assert set(options) <= known.get(words[0], parser())._option_string_actions.keys(), code


def test_nothing_installs_sollold_from_pypi() -> None:
    """sollold is not on PyPI: installing it by name would fail or install another project."""
    by_name = re.compile(r"(?:pipx? |uv )(?:tool |pip )?install[^`,\n]* ['\"]?sollold\b(?!-)")
    files = [*PAGE_FILES, *(ROOT / "sollold").rglob("*.py"), *(ROOT / "packaging").rglob("*.md")]
    found = [f"{file.name}: {line}" for file in files for line in by_name.findall(file.read_text("utf-8"))]
    assert not found


def test_the_traces_extra_matches_the_documented_packages() -> None:
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["traces"]
    assert [re.split(r"[<>=]", requirement)[0] for requirement in extra] == tracing.NEEDED.split()
    assert f"pipx inject sollold {tracing.NEEDED}" in (FOLDER / "monitoring.md").read_text("utf-8")


def test_commands_and_requests_are_found() -> None:
    assert len(of_program("sollold")) > 25 and len(of_program("curl")) > 8


@pytest.mark.parametrize(("page", "line"), of_program("curl"))
def test_each_request_has_a_route(page: str, line: str) -> None:
    words = shlex.split(line)
    url = next(word for word in words if word.startswith("http"))
    method = "POST" if "-d" in words else "GET"
    path = urlsplit(url).path or "/"
    rows = [(row.method, re.sub(r"\{[^}]*\}", "[^/]+", row.path)) for row in routes()]
    assert any(method == row[0] and re.fullmatch(row[1], path) for row in rows), path


@pytest.mark.parametrize("page", PAGE_FILES, ids=lambda page: page.name)
def test_each_named_setting_exists(page: Path) -> None:
    known = catalogue()
    sections = {key.split(".")[0] for key in known}
    for key in _KEY.findall(page.read_text("utf-8")):
        if key.split(".")[0] in sections and not key.endswith((".py", ".md", ".yml")):
            assert key in known, key


@pytest.mark.parametrize("page", PAGE_FILES, ids=lambda page: page.name)
def test_each_internal_link_has_a_target(page: Path) -> None:
    text = page.read_text("utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        target_page = page.parent / file if file else page
        assert target_page.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target_page.read_text("utf-8"), re.MULTILINE)
            slugs = {
                re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles
            }
            assert anchor in slugs, target


@pytest.mark.parametrize("page", PAGE_FILES, ids=lambda page: page.name)
def test_each_named_file_and_make_target_exists(page: Path) -> None:
    text = page.read_text("utf-8")
    makes = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z]+)", text, re.MULTILINE)) <= makes
    for name in re.findall(r"`((?:packaging|tests|[a-z_]+(?:/[a-z_]+)*)/[\w./-]*\.[a-z]+)`", text):
        assert any((root / name).exists() for root in (ROOT, ROOT / "sollold", *PACKAGES)), name


def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("no mkdocs here")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--quiet",
        "--site-dir",
        str(tmp_path / "site"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "site" / "start" / "index.html").exists()


def test_the_sample_output_in_the_readme_is_current(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    memory = {"total": 1.27 * 2**30, "limit": 1.27 * 2**30}
    nodes = [
        {
            "node": name,
            "name": name,
            "addresses": [f"192.168.1.{number}"],
            "http_port": 11435,
            "build": "b11434",
        }
        | {"devices": [{**memory, "id": "CPU", "granted": used * memory["limit"], "available": free * 2**20}]}
        for number, name, used, free in (
            (11, "anna", 0.3, 331),
            (12, "bert", 0.54, 20.7),
            (13, "cleo", 0.54, 18.0),
        )
    ]
    placed = [
        {"node_name": name, "device": "CPU", "first": first, "last": last, "bytes": mib * 2**20}
        for name, first, last, mib in (("anna", 0, 4, 381), ("bert", 4, 14, 708), ("cleo", 14, 25, 712))
    ]
    model = {"model": "recital:latest", "state": "ready", "layers": 24, "context": 8192, "placed": placed}
    model |= {"active": 1, "waiting": 0, "speed": 0.0, "pinned": False, "expires": 300.0, "reason": ""}
    state = {"nodes": nodes, "leader": "anna", "term": 1, "deployments": [model], "open": False}

    class Daemon:
        def get(self, path: str) -> dict[str, Any]:
            return state

    monkeypatch.setattr(status, "client", lambda options: Daemon())
    monkeypatch.setenv("COLUMNS", "110")
    status.status(argparse.Namespace(json=False, watch=False))
    printed = "\n".join(line.rstrip() for line in capsys.readouterr().out.splitlines())
    assert f"```console\n$ sollold status\n{printed}\n```" in (ROOT / "README.md").read_text("utf-8"), printed
