"""Pulls a model through an Ollama, which puts it into its own store."""

from __future__ import annotations

import asyncio
import json

import aiohttp

from sollold.cluster.net.rpc import PeerError
from sollold.cluster.net.rpc_client import RpcClient
from sollold.models.transfer.pull_progress import PullError, Say

PEER_PREFIX = "/ollama"
"""Prefix of the raw routes of a node's port that lead to its Ollama (`sollold.control.ollama_relay`)."""
_SILENCE_SECONDS = 300.0
"""Seconds without output after which a pull by Ollama is given up."""
VERIFY_SECONDS = 4 * 3600.0
"""The same while Ollama verifies the download: it is silent then, and reads up to hundreds of gigabytes."""


async def pull_through_ollama(
    session: aiohttp.ClientSession, base: str, name: str, say: Say, *, insecure: bool
) -> None:
    """Let the Ollama at ``base`` pull a model into its own store; ``insecure``: even without TLS.

    Raises:
        PullError: it refused, went silent, or broke off.
    """
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=5)
    try:
        async with asyncio.timeout(_SILENCE_SECONDS):
            answer = await session.post(f"{base}/api/pull", data=_body(name, insecure), timeout=timeout)
    except TimeoutError:
        raise _silent(name, _SILENCE_SECONDS) from None
    except (aiohttp.ClientError, OSError) as error:
        raise _interrupted(name, error) from None
    async with answer:
        await _report(answer, name, say)


async def pull_through_peer(calls: RpcClient, node: str, name: str, say: Say, *, insecure: bool) -> None:
    """Let the Ollama of another node pull a model into its own store.

    Raises:
        PullError: as `pull_through_ollama`, or the node can't be reached or has no Ollama.
    """
    exchange = calls.stream(
        node,
        "POST",
        f"{PEER_PREFIX}/api/pull",
        data=_body(name, insecure),
        idle_timeout=VERIFY_SECONDS,
    )
    try:
        async with exchange as answer:
            await _report(answer, name, say)
    except PeerError as error:
        raise PullError(str(error)) from None


def _body(name: str, insecure: bool) -> bytes:
    return json.dumps({"model": name, "stream": True, **({"insecure": True} if insecure else {})}).encode()


async def _report(answer: aiohttp.ClientResponse, name: str, say: Say) -> None:
    """Pass on the lines of a pull, until its end.

    Raises:
        PullError: as `pull_through_ollama`.
    """
    succeeded, silence = False, _SILENCE_SECONDS
    try:
        while raw := await _next_line(answer, silence):
            line = json.loads(raw) if raw.strip() else {}
            if not isinstance(line, dict):
                continue
            if error := line.get("error"):
                missing = "file does not exist" in str(error) or "not found" in str(error)
                raise PullError(f"Ollama could not pull {name}: {error}", missing=missing)
            status = str(line.pop("status", ""))
            succeeded = succeeded or status == "success"
            silence = VERIFY_SECONDS if status.startswith("verifying") else _SILENCE_SECONDS
            if status and status != "success":
                say(status, **line)
    except TimeoutError:
        raise _silent(name, silence) from None
    except (aiohttp.ClientError, OSError, ValueError, RecursionError) as error:
        raise _interrupted(name, error) from None
    if not succeeded:
        raise PullError(f"Ollama's pull of {name} was interrupted; pull it again to go on")


def _silent(name: str, seconds: float) -> PullError:
    return PullError(f"Ollama sent nothing for {seconds:.0f} s while it pulled {name}; see its log")


def _interrupted(name: str, error: Exception) -> PullError:
    return PullError(f"Ollama's pull of {name} was interrupted: {error}")


async def _next_line(answer: aiohttp.ClientResponse, silence: float) -> bytes:
    """Return the next line; empty at the end.

    Raises:
        TimeoutError: there was none within ``silence`` seconds.
    """
    async with asyncio.timeout(silence):
        return await answer.content.readline()
