"""``sollold chat``: one question, or a conversation."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
from typing import Any

from sollold.cli.asking import client, console, print_json
from sollold.cli.exit import Exit
from sollold.cli.progress import loading
from sollold.cli.streams import harmless
from sollold.client.http import Client, ClientError


def chat(options: argparse.Namespace) -> int:
    """Ask once, or until the end of the input.

    What is typed is read outside of the loop: Ctrl-C ends a program that waits for its user, and would not
    end a thread of the loop's that does.
    """
    messages: list[dict[str, Any]] = []
    if options.system:
        messages.append({"role": "system", "content": options.system})
    prompt = " ".join(options.prompt)
    if not prompt and not sys.stdin.isatty():
        prompt = sys.stdin.read()
    if prompt.strip():
        messages.append({"role": "user", "content": prompt})
        asyncio.run(_asked(options, messages))
        return Exit.DONE
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (line editing and history for input())
    print(f"Talking with {options.model}; an empty line or Ctrl-D ends it.")
    while True:
        try:
            line = input(">>> ")
        except EOFError:
            print()
            return Exit.DONE
        if not line.strip():
            return Exit.DONE
        messages.append({"role": "user", "content": line})
        try:
            messages.append({"role": "assistant", "content": asyncio.run(_asked(options, messages))})
        except ClientError as error:
            if not error.status:
                raise
            messages.pop()
            print(f"sollold: {harmless(error.message)}", file=sys.stderr)


async def _asked(options: argparse.Namespace, messages: list[dict[str, Any]]) -> str:
    async with client(options) as daemon:
        return await _answer(daemon, options, messages)


async def _answer(daemon: Client, options: argparse.Namespace, messages: list[dict[str, Any]]) -> str:
    body: dict[str, Any] = {"model": options.model, "messages": messages, "stream": not options.json}
    if options.think:
        body["think"] = True
    if options.json:
        item = await daemon.post("/api/chat", body, timeout=3600)
        print_json(item)
        return str(item["message"]["content"])
    parts: list[str] = []
    final: dict[str, Any] = {}
    thinking = False
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(loading(daemon, options.model))
        async for item in daemon.stream("/api/chat", body):
            message = item.get("message", {})
            thought, text = message.get("thinking") or "", message.get("content") or ""
            if thought or text:
                await stack.aclose()
            if thought:
                if not thinking:
                    print("(thinking) ", end="")
                thinking = True
                print(thought, end="", flush=True)
            if text:
                if thinking:
                    print("\n")
                    thinking = False
                parts.append(text)
                print(text, end="", flush=True)
            if item.get("done"):
                final = item
    print()
    _footer(final)
    return "".join(parts)


def _footer(final: dict[str, Any]) -> None:
    """Where the answer came from and how fast, dim, on a terminal only."""
    if not sys.stdout.isatty():
        return
    routing = final.get("_routing") or {}
    words = [str(routing.get("backend", "")), f"on {routing['node']}" if routing.get("node") else ""]
    if final.get("eval_count") and final.get("eval_duration"):
        words.append(f"{final['eval_count'] / (final['eval_duration'] / 1e9):.1f} tokens/s")
    if routing.get("resumed"):
        words.append(f"resumed after a fault, {routing.get('gap_ms', 0) / 1000:.1f} s")
    console().print("  ".join(word for word in words if word), style="dim")
