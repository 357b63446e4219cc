"""The container image: built from the packages on a bare Debian, and a node in it answers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.doubles import free_port
from tests.systemd import container
from tests.systemd.container import until
from tests.systemd.packages import ROOT

pytestmark = [pytest.mark.systemd, pytest.mark.timeout(900)]

if os.geteuid() != 0 or not shutil.which("buildah"):
    pytest.skip("building images needs root and buildah", allow_module_level=True)


class Builder:
    """buildah with a store of its own. It needs no daemon and no namespaces."""

    def __init__(self, folder: Path) -> None:
        store = ["--root", str(folder / "store"), "--runroot", str(folder / "run"), "--storage-driver", "vfs"]
        self.words = ["buildah", *store]

    def __call__(self, *words: str, cwd: Path = ROOT) -> str:
        done = subprocess.run([*self.words, *words], capture_output=True, text=True, cwd=cwd, timeout=600)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout.strip()


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory, packages: list[Path]) -> Iterator[tuple[Builder, str]]:
    try:
        tree = container.base()
    except OSError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("images")
    context = folder / "dist"
    context.mkdir()
    for package in packages:
        shutil.copy(package, context)
    builder = Builder(folder)
    try:
        bare = builder("from", "scratch")
        builder("copy", "--quiet", bare, str(tree), "/")
        builder("commit", "--quiet", "--rm", bare, "localhost/debian")
        recipe = str(ROOT / "packaging/container/Containerfile")
        builder(
            "build", "--isolation", "chroot", "--network", "host", "--format", "docker",
            "--build-arg", "BASE=localhost/debian", "--file", recipe, "--tag", "sollold", str(context),
        )  # fmt: skip
        yield builder, "localhost/sollold"
    finally:
        shutil.rmtree(folder / "store", ignore_errors=True)


def test_the_image_starts_as_a_user_and_answers(image: tuple[Builder, str]) -> None:
    builder, name = image
    settings = json.loads(builder("inspect", "--type", "image", name))["Docker"]["config"]
    assert settings["User"] == "sollold" and settings["Entrypoint"] == ["sollold"]
    inside = builder("from", name)
    port, peer = free_port(), free_port()
    words = ["sollold", "run", "--demo-model", "--set", f"http.port={port}", "--set", f"cluster.port={peer}"]
    run = [*builder.words, "run", "--isolation", "chroot", "--network", "host", inside, "--", *words]
    process = subprocess.Popen([*run, "--set", "cluster.mdns=off"], start_new_session=True)
    try:
        until(lambda: asked(port, "/api/cluster")["nodes"][0]["build"], "the node has its llama.cpp")
        body = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}], "stream": False}
        assert "sollold" in asked(port, "/api/chat", body)["message"]["content"]
    finally:
        os.killpg(process.pid, 15)
        process.wait(60)


def asked(port: int, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", data, timeout=60) as answer:
            return dict(json.load(answer))
    except OSError:
        return {"nodes": [{"build": ""}], "message": {"content": ""}}
