"""A program without a daemon starts one (`auto_setup_rpc`), which ends with the program."""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from sollold.client.daemon_process import DaemonProcess
from sollold.client.errors import ClientError
from sollold.client.http import Client
from sollold.engines.install.find import Llama
from tests.daemons import until
from tests.doubles import free_ports

pytestmark = [pytest.mark.cluster, pytest.mark.llama, pytest.mark.timeout(300)]


def daemon_arguments(folder: Path, llama: Llama) -> tuple[str, list[str]]:
    """Return the daemon's URL and arguments that isolate it from other daemons."""
    http, peer = free_ports(2)
    values = {
        "node.state_dir": folder / "state",
        "node.cache_dir": folder / "cache",
        "http.host": "127.0.0.1",
        "http.port": http,
        "cluster.host": "127.0.0.1",
        "cluster.port": peer,
        "cluster.mdns": "off",
        "models.huggingface": "off",
        "ollama.enabled": "off",
        "llama.build": "off",
        "llama.server": llama.server,
        "llama.rpc_server": llama.worker,
    }
    given = ["--config", os.devnull]
    return f"http://127.0.0.1:{http}", given + [
        word for key, value in values.items() for word in ("--set", f"{key}={value}")
    ]


async def answers(url: str) -> bool:
    try:
        async with Client(url, timeout=2) as client:
            return bool(await client.get("/api/version"))
    except ClientError:
        return False


def _forked_child_ends(daemon: DaemonProcess) -> int:
    """Stop ``daemon`` in a forked child and return the child's exit status."""
    child = os.fork()
    if not child:
        try:
            asyncio.run(daemon.stop())
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


async def test_a_daemon_is_started_once_and_ended(
    tmp_path: Path, llama: Llama, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "sollold.client")
    url, given = daemon_arguments(tmp_path, llama)
    first, second = DaemonProcess(url=url, words=given), DaemonProcess(url=url, words=given)
    assert not await answers(url)
    try:
        await asyncio.gather(first.ensure(), first.ensure(), first.ensure())
        assert await answers(url) and "daemon ready" in caplog.text
        assert caplog.text.count("starting one") == 1, "concurrent calls start one daemon"
        await second.ensure()
        await second.stop()
        assert await answers(url), "the daemon belongs to the first process object"
        assert await asyncio.to_thread(_forked_child_ends, first) == 0
        await pickle.loads(pickle.dumps(first)).stop()
        assert await answers(url), "the daemon belongs to the parent"
    finally:
        await first.stop()
    assert not await answers(url)


async def test_a_failed_start_gives_its_reason(tmp_path: Path, llama: Llama) -> None:
    url, given = daemon_arguments(tmp_path, llama)
    (tmp_path / "file").touch()
    given += ["--set", f"node.state_dir={tmp_path}/file/state"]
    with pytest.raises(ClientError, match="could not be started") as failed:
        await DaemonProcess(url=url, words=given).ensure()
    assert "file" in failed.value.message


PROGRAM = """
import asyncio, sys
from sollold.client.daemon_process import DaemonProcess
async def main():
    await DaemonProcess(url=sys.argv[1], words=sys.argv[2:]).ensure()
    print("ready", flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""


def test_a_daemon_does_not_outlive_its_program(tmp_path: Path, llama: Llama) -> None:
    url, given = daemon_arguments(tmp_path, llama)
    program = subprocess.Popen([sys.executable, "-c", PROGRAM, url, *given], stdout=subprocess.PIPE)
    try:
        assert program.stdout is not None and program.stdout.readline() == b"ready\n"
        port = int(url.rpartition(":")[2])
        assert not _refused(port)
        program.send_signal(signal.SIGKILL)
        program.wait(10)
        until(lambda: _refused(port), "the daemon is gone", timeout=30)
    finally:
        program.kill()
        program.wait(10)


def _refused(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0
