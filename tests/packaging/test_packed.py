"""The wheel and the source distribution, installed as by pipx."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    out = tmp_path_factory.mktemp("dist")
    words = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return sorted(out.iterdir())


def test_wheel_and_sdist_are_built(made: list[Path]) -> None:
    assert [file.name.endswith(".whl") for file in made] == [True, False]


def test_the_sdist_has_what_the_documented_commands_need(made: list[Path]) -> None:
    with tarfile.open(made[1]) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    if listed.returncode:
        pytest.skip("this is no checkout")
    tracked = {name for name in listed.stdout.splitlines() if not name.startswith(".")}
    assert tracked <= names, sorted(tracked - names)[:5]


@pytest.mark.parametrize("which", [0, 1], ids=["wheel", "sdist"])
def test_the_installed_package_runs(made: list[Path], which: int, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    words += ["--no-index", "--target", str(tmp_path / "site"), str(made[which])]
    done = subprocess.run(words, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    program = tmp_path / "site/bin/sollold"
    for command in ([str(program), "--version"], [str(program), "config", "--example"]):
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=60, cwd=tmp_path, env=environment
        )
        assert done.returncode == 0, done.stderr
    assert "[placement]" in done.stdout
    where = subprocess.run(
        [sys.executable, "-c", "import sollold.api.dashboard as d; print(d.__file__)"],
        capture_output=True, text=True, timeout=60, cwd=tmp_path, env=environment,
    )  # fmt: skip
    assert where.stdout.startswith(str(tmp_path)), where.stderr
    assert list((tmp_path / "site/sollold/api").rglob("*.html")), "the dashboard's page is included"
    assert (tmp_path / "site/sollold/engines/install/build_tools.lock").is_file()
