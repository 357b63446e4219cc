"""The test of a new llama.cpp: a real one passes; those that crash, exit or compute nonsense do not."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from sollold.engines.install import self_test as tested
from sollold.engines.install.build_step import Cancelled
from sollold.engines.install.find import Llama, LlamaUnusable
from sollold.engines.install.self_test import self_test

SERVER = """#!{python}
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(b"{{}}")
    def do_POST(self):
        {middle}
        self.answer({answer!r})
    def answer(self, body):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *words):
        pass
port = int(sys.argv[sys.argv.index("--port" if "--port" in sys.argv else "-p") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
GREETING = b'{"content": "Hello! This is"}'


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    program(folder / "llama-server", SERVER, answer=GREETING)
    program(folder / "ggml-rpc-server", SERVER, answer=b"{}")
    return folder


def program(file: Path, text: str, *, answer: bytes = b"", middle: str = "pass") -> None:
    file.write_text(text.format(python=sys.executable, answer=answer, middle=middle))
    file.chmod(0o755)


def run(programs: Path, check: Callable[[], None] = lambda: None) -> None:
    before = children()
    try:
        self_test(programs, programs.parent, check)
    finally:
        assert children() <= before


def children() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


@pytest.mark.llama
def test_a_working_build_passes(tmp_path: Path, llama: Llama, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "bin").mkdir()
    for file in (llama.server, llama.worker):
        shutil.copy2(file, tmp_path / "bin" / file.name)
    run(tmp_path / "bin")
    assert caplog.records == []


def test_a_right_answer_passes(programs: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(programs)
    assert caplog.records == []


@pytest.mark.parametrize(
    "file, script, words",
    [
        ("llama-server", "kill -SEGV $$", "llama-server: it was terminated by SIGSEGV: no driver"),
        ("llama-server", "kill -ILL $$", "instructions that this machine's processor does not have"),
        ("ggml-rpc-server", "exit 3", "ggml-rpc-server: it exited with code 3: no driver"),
    ],
)
def test_a_program_that_exits_is_named(programs: Path, file: str, script: str, words: str) -> None:
    program(programs / file, f"#!/bin/sh\necho no driver\n{script}\n")
    with pytest.raises(LlamaUnusable, match=words):
        run(programs)


def test_a_crash_at_the_first_prompt_is_named(programs: Path) -> None:
    crash = "import os; os.kill(os.getpid(), 6)"
    program(programs / "llama-server", SERVER, answer=GREETING, middle=crash)
    with pytest.raises(LlamaUnusable, match="llama-server: it was terminated by SIGABRT"):
        run(programs)


def test_a_crash_that_ends_later_than_the_connection_is_named(programs: Path) -> None:
    """A GPU's driver may take a moment to free the memory of a process that has crashed."""
    crash = (
        "import os, threading; threading.Timer(0.5, os.abort).start(); self.connection.shutdown(2); return"
    )
    program(programs / "llama-server", SERVER, answer=GREETING, middle=crash)
    with pytest.raises(LlamaUnusable, match="llama-server: it was terminated by SIGABRT"):
        run(programs)


def test_a_build_that_answers_with_an_error_is_refused(programs: Path) -> None:
    error = b'{"error": {"code": 500, "message": "Compute error."}}'
    program(programs / "llama-server", SERVER, answer=error)
    with pytest.raises(LlamaUnusable, match="Compute error"):
        run(programs)


@pytest.mark.parametrize("answer", [b'{"content": "Hxllo"}', b'{"content": ""}', b'{"content": 7}', b"{}"])
def test_wrong_results_are_found(programs: Path, answer: bytes) -> None:
    program(programs / "llama-server", SERVER, answer=answer)
    with pytest.raises(LlamaUnusable, match="it computes wrong results"):
        run(programs)


@pytest.mark.parametrize(
    "script, words",
    [
        ("kill -KILL $$", "killed"),
        ("echo failed to allocate buffer of size 9; exit 1", "it ran out of memory"),
        ('echo "couldn\'t bind HTTP server socket"; exit 1', "couldn't bind"),
        ("exec sleep 600", "did not start within 1 s"),
    ],
)
def test_a_build_that_can_not_be_tested_passes(
    programs: Path,
    script: str,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(tested, "_START_SECONDS", 1.0)
    program(programs / "llama-server", f"#!/bin/sh\n{script}\n")
    with caplog.at_level(logging.WARNING):
        run(programs)
    assert "could not be tested with a model" in caplog.text and words in caplog.text


def test_cancelling_ends_the_test(programs: Path) -> None:
    program(programs / "llama-server", "#!/bin/sh\nexec sleep 600\n")

    def cancel() -> None:
        raise Cancelled

    with pytest.raises(Cancelled):
        run(programs, cancel)
