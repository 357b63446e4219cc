"""The container images: built on a bare Debian, and a node in one answers."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.doubles import free_port
from tests.systemd import container
from tests.systemd.container import until
from tests.systemd.packages import ROOT

RECIPES = ROOT / "packaging/container"

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
def builder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Builder]:
    """With a bare Debian in its store, localhost/debian."""
    try:
        tree = container.base()
    except OSError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("images")
    builder = Builder(folder)
    try:
        bare = builder("from", "scratch")
        builder("copy", "--quiet", bare, str(tree), "/")
        # This machine's authorities: it may sit behind a proxy that inspects TLS.
        builder("copy", "--quiet", bare, "/etc/ssl/certs/ca-certificates.crt", "/trust.crt")
        builder("config", "--env", "PIP_CERT=/trust.crt", bare)
        builder("commit", "--quiet", "--rm", bare, "localhost/debian")
        yield builder
    finally:
        shutil.rmtree(folder / "store", ignore_errors=True)


def build(builder: Builder, recipe: str, context: Path, *words: str) -> str:
    """An image from a recipe, on the bare Debian; its name."""
    name = recipe.lower().replace("containerfile", "sollold").replace(".", "-")
    builder(
        "build", "--isolation", "chroot", "--network", "host", "--format", "docker",
        "--build-arg", "BASE=localhost/debian", *words,
        "--file", str(RECIPES / recipe), "--tag", name, str(context),
    )  # fmt: skip
    return f"localhost/{name}"


@pytest.fixture(scope="module")
def image(builder: Builder, packages: list[Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    context = tmp_path_factory.mktemp("packages")
    for package in packages:
        shutil.copy(package, context)
    return build(builder, "Containerfile", context)


def test_the_image_starts_as_a_user_and_answers(builder: Builder, image: str) -> None:
    settings = json.loads(builder("inspect", "--type", "image", image))["Docker"]["config"]
    assert settings["User"] == "sollold" and settings["Entrypoint"] == ["sollold"]
    inside = builder("from", image)
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


def test_the_recipe_for_gpus_builds_but_for_the_toolkit(builder: Builder, tmp_path: Path) -> None:
    wheel = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(tmp_path)]
    subprocess.run(wheel, cwd=ROOT, check=True, capture_output=True)
    name = build(builder, "Containerfile.gpu", tmp_path, "--build-arg", "PACKAGES=")
    settings = json.loads(builder("inspect", "--type", "image", name))["Docker"]["config"]
    assert settings["User"] == "sollold" and settings["Entrypoint"] == ["sollold"]
    inside = builder("from", name)
    run = ("run", "--isolation", "chroot", "--network", "host", inside, "--")
    # What the first start needs to build llama.cpp, and may write where it does.
    script = "sollold config >/dev/null; g++ --version; git --version; touch $CACHE_DIRECTORY/a; id -un"
    assert builder(*run, "sh", "-ec", script).endswith("sollold")
    # The packages of the recipe's own base, which only a machine with a GPU has a use for.
    packages = re.search(r'PACKAGES="(.*)"', (RECIPES / "Containerfile.gpu").read_text())
    assert packages is not None
    simulated = f"apt-get update -qq && apt-get install --simulate -qq {packages[1]}"
    assert "Inst libvulkan-dev" in builder("run", "--user", "root", *run[1:], "sh", "-ec", simulated)


def test_what_the_pages_say_of_images_is_what_the_recipe_says() -> None:
    recipe = (RECIPES / "Containerfile.gpu").read_text()
    page = (ROOT / "docs/install.md").read_text()
    bases = re.findall(r"--build-arg BASE=(\S+)", recipe)
    assert len(bases) == 2 and re.findall(r"--build-arg BASE=(\S+)", page) == bases


def asked(port: int, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", data, timeout=60) as answer:
            return dict(json.load(answer))
    except OSError:
        return {"nodes": [{"build": ""}], "message": {"content": ""}}
