"""Pulls a model through this machine's Ollama, which puts it into its own store."""

from __future__ import annotations

import asyncio
import json

import aiohttp

from sollold.models.transfer.pull_progress import PullError, Say

_SILENCE_SECONDS = 300.0
"""Seconds without output after which a pull by Ollama is given up."""
_VERIFY_SECONDS = 4 * 3600.0
"""The same while Ollama verifies the download: it is silent then, and reads up to hundreds of gigabytes."""


async def pull_through_ollama(
    session: aiohttp.ClientSession, base: str, name: str, say: Say, *, insecure: bool
) -> None:
    """Let the Ollama at ``base`` pull a model into its own store; ``insecure``: even without TLS.

    Raises:
        PullError: it refused, went silent, or broke off.
    """
    url = f"{base}/api/pull"
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=5)
    succeeded, silence = False, _SILENCE_SECONDS
    try:
        body = {"model": name, "stream": True, **({"insecure": True} if insecure else {})}
        async with asyncio.timeout(silence):
            answer = await session.post(url, json=body, timeout=timeout)
        async with answer:
            while raw := await _next_line(answer, silence):
                line = json.loads(raw) if raw.strip() else {}
                if not isinstance(line, dict):
                    continue
                if error := line.get("error"):
                    missing = "file does not exist" in str(error) or "not found" in str(error)
                    raise PullError(f"Ollama could not pull {name}: {error}", missing=missing)
                status = str(line.pop("status", ""))
                succeeded = succeeded or status == "success"
                silence = _VERIFY_SECONDS if status.startswith("verifying") else _SILENCE_SECONDS
                if status and status != "success":
                    say(status, **line)
    except TimeoutError:
        raise PullError(
            f"Ollama sent nothing for {silence:.0f} s while it pulled {name}; see its log"
        ) from None
    except (aiohttp.ClientError, OSError, ValueError, RecursionError) as error:
        raise PullError(f"Ollama's pull of {name} was interrupted: {error}") from None
    if not succeeded:
        raise PullError(f"Ollama's pull of {name} was interrupted; pull it again to go on")


async def _next_line(answer: aiohttp.ClientResponse, silence: float) -> bytes:
    """Return the next line; empty at the end.

    Raises:
        TimeoutError: there was none within ``silence`` seconds.
    """
    async with asyncio.timeout(silence):
        return await answer.content.readline()
