"""Short-lived programs."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import psutil
import pytest

from sollold.machine.program import run_program


def test_variables_that_set_options_of_llama_cpp_are_not_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_ARG_RPC", "192.168.1.5:50052")
    monkeypatch.setenv("SOLLOLD_CLUSTER_TOKEN", "secret")
    done = run_program(["/usr/bin/env"], 30.0, env={"LLAMA_CACHE": "/x"})
    lines = done.stdout.decode().splitlines()
    assert [line for line in lines if line.startswith(("LLAMA_", "SOLLOLD_"))] == ["LLAMA_CACHE=/x"]
    assert f"PATH={os.environ['PATH']}" in lines


@pytest.mark.parametrize("own_group", [False, True])
def test_a_program_that_takes_too_long_is_killed_with_the_program_that_it_runs(
    tmp_path: Path, *, own_group: bool
) -> None:
    script, told = tmp_path / "llama-server", tmp_path / "pid"
    # With job control, as ninja does, what runs in the background has a process group of its own.
    control = "set -m" if own_group else ""
    script.write_text(f"#!/bin/sh\n{control}\nsleep 600 &\necho $! > {told}\nwait\n")
    script.chmod(0o755)
    with pytest.raises(subprocess.TimeoutExpired):
        run_program([script, "--version"], 1.0)
    if psutil.pid_exists(pid := int(told.read_text())):
        psutil.Process(pid).wait(5)


@pytest.mark.parametrize(("with_errors", "output"), [(True, b"out\nerror\n"), (False, b"out\n")])
def test_the_output_includes_errors_if_wanted(with_errors: bool, output: bytes) -> None:
    done = run_program(["/bin/sh", "-c", "echo out; echo error >&2; exit 3"], 30.0, with_errors=with_errors)
    assert (done.returncode, done.stdout) == (3, output)
