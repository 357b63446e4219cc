"""The container images are built on a minimal Debian, and a node in a container answers.

llama.cpp is not compiled here, which would take from ten minutes to hours. Images built by the commands of
the installation page (``localhost/sollold-vulkan`` etc.) in buildah's default store are tested if they are
named: ``SOLLOLD_TEST_IMAGES="vulkan cuda"``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from sollold.engines.install.build import TAG
from sollold.engines.install.find import Llama
from tests.doubles import free_port
from tests.systemd import container
from tests.systemd.container import until
from tests.systemd.packages import ROOT

RECIPES = ROOT / "packaging/container"
KINDS = os.environ.get("SOLLOLD_TEST_IMAGES", "").split()

pytestmark = [pytest.mark.systemd, pytest.mark.timeout(900)]

if os.geteuid() != 0 or not shutil.which("buildah"):
    pytest.skip("building images needs root and buildah", allow_module_level=True)


class Builder:
    """buildah with a separate store in ``folder``. It needs no daemon and no namespaces."""

    def __init__(self, folder: Path | None = None) -> None:
        self.words = ["buildah"]
        if folder is not None:
            self.words += ["--root", str(folder / "store"), "--runroot", str(folder / "run")]
            # vfs copies each layer; the kernel may not allow overlay mounts.
            driver = ["--storage-driver", "overlay"]
            tried = subprocess.run([*self.words, *driver, "info"], capture_output=True, timeout=60)
            self.words += driver if tried.returncode == 0 else ["--storage-driver", "vfs"]

    def __call__(self, *words: str, cwd: Path = ROOT) -> str:
        done = subprocess.run([*self.words, *words], capture_output=True, text=True, cwd=cwd, timeout=600)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout.strip()


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Builder]:
    """Yield a builder with a minimal Debian, localhost/debian, in its store."""
    try:
        tree = container.base()
    except OSError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("images")
    builder = Builder(folder)
    try:
        bare = builder("from", "scratch")
        builder("copy", "--quiet", bare, str(tree), "/")
        # Use this machine's CA certificates, since it may be behind a TLS-inspecting proxy.
        builder("copy", "--quiet", bare, "/etc/ssl/certs/ca-certificates.crt", "/trust.crt")
        builder("config", "--env", "PIP_CERT=/trust.crt", bare)
        builder("commit", "--quiet", "--rm", bare, "localhost/debian")
        yield builder
    finally:
        shutil.rmtree(folder / "store", ignore_errors=True)


def build(builder: Builder, recipe: str, context: Path, *words: str) -> str:
    """Build an image from a recipe on the minimal Debian and return its name."""
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


@pytest.fixture(scope="module")
def gpu_image(builder: Builder, llama: Llama, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Build the Vulkan image, but with the existing llama.cpp for CPUs."""
    bare = builder("from", "localhost/debian")
    builder("copy", "--quiet", bare, str(llama.server.parent), f"/build/llama.cpp/portable-vulkan-{TAG}/bin")
    builder("commit", "--quiet", "--rm", bare, "localhost/debian-llama")
    context = tmp_path_factory.mktemp("wheel")
    wheel = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(context)]
    subprocess.run(wheel, cwd=ROOT, check=True, capture_output=True)
    vulkan = ("--build-arg", "BACKEND=vulkan", "--build-arg", "BASE=localhost/debian-llama")
    return build(builder, "Containerfile.gpu", context, *vulkan)


@pytest.mark.parametrize("made", ["image", "gpu_image"])
def test_an_image_starts_as_a_user_and_answers(
    builder: Builder, made: str, request: pytest.FixtureRequest
) -> None:
    name = request.getfixturevalue(made)
    settings = json.loads(builder("inspect", "--type", "image", name))["Docker"]["config"]
    assert settings["User"] == "sollold" and settings["Entrypoint"] == ["sollold"]
    with node(builder, name) as port:
        body = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}], "stream": False}
        assert "sollold" in answer_to(port, "/api/chat", body)["message"]["content"]


@pytest.mark.parametrize("kind", KINDS or [""])
@pytest.mark.skipif(not KINDS, reason="SOLLOLD_TEST_IMAGES names no manually built image")
def test_a_manually_built_image_uses_its_gpu_or_reports_none(kind: str) -> None:
    """Vulkan always has a device: Mesa's software renderer."""
    environment = {"vulkan": {"GGML_VK_VISIBLE_DEVICES": "0"}}.get(kind, {})
    words = ("--set", "node.devices=Vulkan0") if kind == "vulkan" else ()
    with node(Builder(), f"localhost/sollold-{kind}", *words, **environment) as port:

        def listed() -> list[str]:
            return [device["id"] for device in answer_to(port, "/api/cluster")["nodes"][0]["devices"]]

        devices = until(listed, "the devices that llama.cpp can use are known")
        body = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}], "stream": False}
        answer = answer_to(
            port, "/api/chat", body, timeout=300
        )  # the software renderer compiles shaders for minutes
        assert "sollold" in answer["message"]["content"]
        used = [device.partition("/")[2] for device in answer["_routing"]["devices"]]
        findings = json.dumps(answer_to(port, "/api/doctor"))
        if kind == "vulkan":
            assert devices == used == ["Vulkan0"] and "no GPU was found" not in findings
        else:
            assert devices[-1] == "CPU" and (len(devices) > 1) != ("no GPU was found" in findings)


def test_the_installation_page_agrees_with_the_recipes() -> None:
    page = (ROOT / "docs/install.md").read_text()
    recipe = (RECIPES / "Containerfile.gpu").read_text().partition("ARG")[0].replace(" \\\n#    ", "")
    commands = re.findall(r"^#   podman (build .*)", recipe, re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        assert set(command.split()) <= set(page.replace("--format docker ", "").split()), command
    services = yaml.safe_load((RECIPES / "compose.yaml").read_text())["services"]
    for name, service in services.items():
        assert service["image"] in page and service["network_mode"] == "host", name
        assert (
            RECIPES / service["build"]["context"] / service["build"]["dockerfile"]
        ).parent.resolve() == RECIPES
    assert services["rocm"]["build"]["args"]["BACKEND"] == "hip"


@contextmanager
def node(builder: Builder, image: str, *words: str, **environment: str) -> Iterator[int]:
    """Run a node with a model in a container of the image and yield its port."""
    inside = builder("from", image)
    port, peer = free_port(), free_port()
    run = [*builder.words, "run", "--isolation", "chroot", "--network", "host"]
    run += [word for name, value in environment.items() for word in ("--env", f"{name}={value}")]
    run += [inside, "--", "sollold", "run", "--demo-model", "--set", f"http.port={port}"]
    run += ["--set", f"cluster.port={peer}", "--set", "cluster.mdns=off", *words]
    process = subprocess.Popen(run, start_new_session=True)
    try:
        until(lambda: answer_to(port, "/api/cluster")["nodes"][0]["build"], "the node has its llama.cpp")
        yield port
    finally:
        os.killpg(process.pid, 15)
        process.wait(60)
        builder("rm", inside)


def answer_to(
    port: int, path: str, body: dict[str, Any] | None = None, timeout: float = 60
) -> dict[str, Any]:
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", data, timeout=timeout) as answer:
            return dict(json.load(answer))
    except OSError:
        return {"nodes": [{"build": "", "devices": []}], "message": {"content": ""}}
