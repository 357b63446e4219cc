"""Debian machines with a real systemd, booted by ``systemd-nspawn -b`` in the network of a `Lan` machine.

The base tree is made once by debootstrap and kept in the user's cache folder. Each machine has an overlay
over it, which survives power cycles and is removed with the machine. It has no compiler and only Debian's
Python.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.netns import Machine

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sollold-tests"
PACKAGES = "systemd,systemd-sysv,dbus,iproute2,curl,ca-certificates,python3,libgomp1,libstdc++6,procps"
MEMORY_V1 = Path("/sys/fs/cgroup/memory")


def lacking() -> str:
    """Return why machines can't be booted here, or an empty string."""
    if os.geteuid() != 0:
        return "booting machines needs root"
    for tool, package in (("debootstrap", "debootstrap"), ("systemd-nspawn", "systemd-container")):
        if not shutil.which(tool):
            return f"booting machines needs {tool} (package {package})"
    if not MEMORY_V1.is_dir():
        return f"a machine's memory can't be limited here: there is no {MEMORY_V1}"
    return ""


def until(condition: Callable[[], Any], description: str, timeout: float = 90) -> Any:
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"after {timeout} s still not: {description}"
        time.sleep(0.3)


def base(suite: str = "bookworm") -> Path:
    """Return the base tree and create it if necessary, which takes two minutes.

    Raises:
        OSError: debootstrap failed, for example because no mirror is reachable.
    """
    tree = CACHE / f"{suite}-2"
    if tree.is_dir():
        return tree
    CACHE.mkdir(parents=True, exist_ok=True)
    making = CACHE / f".{suite}-{os.getpid()}"
    shutil.rmtree(making, ignore_errors=True)
    done = subprocess.run(
        ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", suite, str(making)],
        capture_output=True,
        text=True,
        timeout=900,
    )
    if done.returncode:
        shutil.rmtree(making, ignore_errors=True)
        raise OSError(f"debootstrap failed: {done.stdout[-500:]}{done.stderr[-500:]}")
    try:
        making.rename(tree)
    except OSError:  # another run was faster
        shutil.rmtree(making)
    return tree


class Container:
    """One machine, initially powered off.

    Args:
        cable: the machine of a `Lan` that provides its network namespace.
        folder: the folder of its disk.
        name: its host name.
        memory: bytes of RAM (the cgroup limit of the container); 0: unlimited.
    """

    def __init__(self, cable: Machine, folder: Path, name: str, memory: int = 0) -> None:
        self.cable = cable
        self.name = name
        self.memory = memory
        self.root = folder / name / "root"
        self._folder = folder / name
        self._process: subprocess.Popen[bytes] | None = None
        self._cgroup = MEMORY_V1 / f"{cable.namespace}-{name}"
        for part in ("upper", "work", "root"):
            (self._folder / part).mkdir(parents=True)
        layers = f"lowerdir={base()},upperdir={self._folder}/upper,workdir={self._folder}/work"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", layers, str(self.root)], check=True)
        (self.root / "etc/hostname").write_text(f"{name}\n")
        (self.root / "etc/machine-id").write_text("")

    def power_on(self, timeout: float = 90) -> None:
        """Boot and wait until systemd reports that the system is up.

        Raises:
            TimeoutError: the machine did not boot in time.
        """
        words = [
            "systemd-nspawn", "--quiet", "--boot", f"--directory={self.root}",
            f"--machine={self.cable.namespace}", f"--hostname={self.name}",
            f"--network-namespace-path=/run/netns/{self.cable.namespace}",
            "--register=no", "--keep-unit", "--link-journal=no", "--console=pipe", "--resolv-conf=off",
        ]  # fmt: skip
        enter = []
        if self.memory:
            self._cgroup.mkdir(exist_ok=True)
            (self._cgroup / "memory.limit_in_bytes").write_text(str(self.memory))
            enter = ["sh", "-c", f'echo $$ > {self._cgroup}/cgroup.procs; exec "$@"', "sh"]
        log = (self._folder / "console").open("ab")
        self._process = subprocess.Popen(
            enter + words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
        log.close()
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            if self.init and self.run(["systemctl", "is-system-running"], check=False).strip() in (
                "running",
                "degraded",
            ):
                return
            time.sleep(0.3)
        raise TimeoutError(f"{self.name} did not boot:\n{(self._folder / 'console').read_text()[-2000:]}")

    @property
    def init(self) -> int:
        """Return the host's PID of the machine's PID 1, or 0."""
        if self._process is None:
            return 0
        try:
            pid = self._process.pid
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            return int(children[0]) if children else 0
        except OSError:
            return 0

    def run(self, words: Sequence[str | Path], *, timeout: float = 120, check: bool = True) -> str:
        """Run a command on the machine and return its output.

        Raises:
            AssertionError: the command failed and ``check`` is set.
        """
        done = subprocess.run(
            ["nsenter", f"--target={self.init}", "--all", "--", *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
        )
        if check and done.returncode:
            raise AssertionError(f"{self.name}: {' '.join(map(str, words))} failed:\n{done.stdout}")
        return done.stdout

    def type(self, line: str, *, timeout: float = 120) -> str:
        """Run a line in the machine's shell and return its output."""
        return self.run(["bash", "-c", line], timeout=timeout)

    def power_off(self) -> None:
        """Kill all processes of the machine at once."""
        if self._process is None:
            return
        if init := self.init:
            subprocess.run(["kill", "-KILL", str(init)], check=False)
        self._process.kill()
        self._process.wait()
        self._process = None

    def journal(self, lines: int = 60) -> str:
        """Return the last lines of the daemon's journal."""
        return self.run(["journalctl", "-u", "sollold", "-n", str(lines), "--no-pager"], check=False)

    def remove(self) -> None:
        """Power off and delete the disk."""
        self.power_off()
        for _ in range(50):
            if subprocess.run(["umount", str(self.root)], capture_output=True).returncode == 0:
                break
            time.sleep(0.2)
        else:
            subprocess.run(["umount", "--lazy", str(self.root)], check=False)
        shutil.rmtree(self._folder, ignore_errors=True)
        if self._cgroup.is_dir():
            for _ in range(50):
                try:
                    _remove_cgroup(self._cgroup)
                    break
                except OSError:
                    time.sleep(0.2)


def _remove_cgroup(folder: Path) -> None:
    for child in folder.iterdir():
        if child.is_dir():
            _remove_cgroup(child)
    folder.rmdir()
