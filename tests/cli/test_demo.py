"""`sollold demo` and `sollold run --demo-model`, with the real llama.cpp."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest

from sollold.engines.install.find import Llama
from sollold.models.gguf.demo_model import GREETING
from tests.daemons import until

pytestmark = [pytest.mark.cluster, pytest.mark.llama, pytest.mark.timeout(240)]

STARTER = """
import sys
import urllib.request
sys.path[:0] = {places!r}
from sollold.cli.main import main
sys.exit(main())
"""


def command(llama: Llama, *words: str) -> list[str]:
    """The command as the package starts it: with a Python that does not find the libraries by itself."""
    starter = STARTER.format(places=[str(Path(place or ".").absolute()) for place in sys.path])
    python = getattr(sys, "_base_executable", sys.executable)
    given = ["--set", f"llama.server={llama.server}", "--set", f"llama.rpc_server={llama.worker}"]
    return [python, "-I", "-c", starter, words[0], "--config", os.devnull, *given, *words[1:]]


def start(folder: Path, words: list[str], **more: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "TMPDIR": str(folder), "COLUMNS": "160"}
    environment.pop("PYTHONPATH", None)
    with (folder / "errors").open("w") as errors:
        return subprocess.Popen(
            words, env=environment, cwd=folder, text=True, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, **more,
        )  # fmt: skip


def remains(folder: Path) -> list[str]:
    """Return the remaining processes and folders of a demo in ``folder``."""
    running = [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
    return [words for words in running if f"{folder}/sollold-demo-" in words] + [
        str(path) for path in folder.glob("sollold-demo-*")
    ]


def test_the_demo_distributes_a_model_over_three_nodes_and_queries_each(tmp_path: Path, llama: Llama) -> None:
    process = start(tmp_path, command(llama, "demo"))
    try:
        out, _ = process.communicate(timeout=180)
    finally:
        process.kill()
    errors = (tmp_path / "errors").read_text()
    assert process.returncode == 0, errors
    assert " ".join(out.split()).count(GREETING) == 3
    for name in ("anna", "bert", "cleo"):
        assert re.search(rf"^{name} \(http://127\.0\.0\.1:\d+\), \d+ tokens/s:$", out, re.MULTILINE), out
        assert re.search(rf"{name} CPU +\d", out), out
    assert "demo-12-layers" in out and "ready" in out
    assert remains(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_terminated_demo_leaves_nothing_behind(
    tmp_path: Path, llama: Llama, number: signal.Signals
) -> None:
    process = start(tmp_path, command(llama, "demo", "--keep"))
    try:
        # Two of its daemons run; the third may be starting.
        until(lambda: len([entry for entry in remains(tmp_path) if " run " in entry]) > 1, "daemons run")
        process.send_signal(number)
        assert process.wait(60) == 128 + number, (tmp_path / "errors").read_text()
        assert "Traceback" not in (tmp_path / "errors").read_text()
        assert remains(tmp_path) == []
    finally:
        process.kill()
        process.communicate()


def test_the_demo_reports_an_unusable_llama_server(tmp_path: Path, llama: Llama) -> None:
    process = start(tmp_path, [*command(llama, "demo"), "--set", f"llama.server={tmp_path}/none"])
    process.communicate(timeout=60)
    errors = (tmp_path / "errors").read_text()
    assert process.returncode == 1 and f"sollold: {tmp_path}/none does not exist" in errors
    assert len(errors.splitlines()) == 1


def test_a_node_without_models_creates_the_demo_model(tmp_path: Path, llama: Llama) -> None:
    with socket.socket() as link:
        link.bind(("127.0.0.1", 0))
        port = link.getsockname()[1]
    words = [*command(llama, "run"), "--demo-model", "--host", "127.0.0.1", "--port", str(port)]
    words += ["--peer-port", "0", "--set", "cluster.mdns=off", "--set", "ollama.enabled=off"]
    words += ["--set", f"node.state_dir={tmp_path}/state", "--set", f"node.cache_dir={tmp_path}/cache"]
    words += ["--set", "models.huggingface=off", "--set", f"models.ollama_stores={tmp_path}/none"]
    process = start(tmp_path, words)
    try:

        def answer() -> dict[str, Any]:
            assert process.poll() is None, (tmp_path / "errors").read_text()
            body = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}], "stream": False}
            request = urllib.request.Request(f"http://127.0.0.1:{port}/api/chat", json.dumps(body).encode())
            try:
                with urllib.request.urlopen(request, timeout=120) as reply:
                    return dict(json.load(reply))
            except OSError:
                return {}  # not listening yet, or llama.cpp not found yet

        answered = until(answer, "the demo model answers", timeout=120)
        assert answered["message"]["content"] == GREETING
        process.terminate()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.communicate()
