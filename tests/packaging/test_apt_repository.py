"""apt reads the repository and finds its packages."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

BUILD = Path(__file__).parents[2] / "packaging" / "apt" / "build"
INSTALL = Path(__file__).parents[2] / "docs" / "install.md"
CONTROL = """Package: {name}
Version: {version}
Architecture: {arch}
Maintainer: nobody <nobody@example.invalid>
Description: a package of a test
"""


def package(folder: Path, name: str, version: str, arch: str) -> None:
    tree = folder / name
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN" / "control").write_text(CONTROL.format(name=name, version=version, arch=arch))
    file = folder / f"{name}_{version}_{arch}.deb"
    subprocess.run(["dpkg-deb", "--build", tree, file], check=True, capture_output=True)
    shutil.rmtree(tree)


@pytest.fixture
def key() -> Iterator[str]:
    """Yield the id of a GnuPG key made for the test. Its folder's path is short because of its sockets."""
    if not shutil.which("gpg"):
        pytest.skip("needs gnupg")
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("GNUPGHOME", folder)
        words = ["gpg", "--batch", "--passphrase", "", "--quick-gen-key", "lab@example.invalid", "ed25519"]
        subprocess.run(words, check=True, capture_output=True, timeout=60)
        try:
            yield "lab@example.invalid"
        finally:
            subprocess.run(["gpgconf", "--kill", "all"], check=False, timeout=30)


@pytest.mark.parametrize("signed", [False, True], ids=["trusted", "signed"])
@pytest.mark.skipif(
    not (shutil.which("dpkg-scanpackages") and shutil.which("apt-get")), reason="needs apt and dpkg-dev"
)
def test_apt_finds_the_packages(tmp_path: Path, request: pytest.FixtureRequest, signed: bool) -> None:
    dist, state = tmp_path / "dist", tmp_path / "apt"
    dist.mkdir()
    native = subprocess.run(["dpkg", "--print-architecture"], capture_output=True, text=True).stdout.strip()
    package(dist, "sollold", "9.1", "all")
    package(dist, "sollold-llama.cpp", "9.1", native)
    out = dist / "apt"
    words = [sys.executable, str(BUILD), "--from", str(dist), "--out", str(out)]
    if signed:
        words += ["--sign", request.getfixturevalue("key")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for step in done.stdout.splitlines()[1:]:
        assert step.strip() in INSTALL.read_text(), "the page agrees with the script"
    for folder in ("lists/partial", "cache/archives/partial", "etc/apt"):
        (state / folder).mkdir(parents=True)
    option = f"signed-by={out / 'sollold.asc'}" if signed else "trusted=yes"
    (state / "sources.list").write_text(f"deb [{option}] file:{out} stable main\n")
    options = [
        f"Dir::State={state}", f"Dir::State::lists={state}/lists", f"Dir::Cache={state}/cache",
        f"Dir::Etc::sourcelist={state}/sources.list", "Dir::Etc::sourceparts=-", "APT::Sandbox::User=root",
        f"Dir::State::status={state}/status",
    ]  # fmt: skip
    (state / "status").touch()
    apt = [word for option in options for word in ("-o", option)]
    done = subprocess.run(["apt-get", *apt, "update"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "W:" not in done.stderr, done.stderr
    for name in ("sollold", "sollold-llama.cpp"):
        shown = subprocess.run(["apt-cache", *apt, "policy", name], capture_output=True, text=True).stdout
        assert "Candidate: 9.1" in shown


def test_without_packages_the_script_explains_what_to_do(tmp_path: Path) -> None:
    words = [sys.executable, str(BUILD), "--from", str(tmp_path), "--out", str(tmp_path / "apt")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "make deb" in done.stderr
