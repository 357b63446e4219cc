"""``sollold chat`` and ``run MODEL``: one question, or a conversation."""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import Any

from sollold.cli.answer import Sampling, answer
from sollold.cli.asking import client, print_json
from sollold.cli.conversation import INFO, Conversation, LineResult, Quit
from sollold.cli.exit import Exit
from sollold.cli.pictures import question
from sollold.cli.pull import pull_missing
from sollold.cli.show import print_part
from sollold.cli.streams import harmless
from sollold.client.blocking import BlockingClient
from sollold.client.errors import ClientError


def chat(options: argparse.Namespace) -> int:
    """Ask once, adding piped input to the prompt, or hold a conversation until the end of the input."""
    prompt = " ".join(options.prompt)
    piped = "" if sys.stdin.isatty() else sys.stdin.read()
    has_prompt = bool(prompt.strip() or piped.strip())
    if not has_prompt and not sys.stdin.isatty():
        print("sollold: there is no prompt: give one after the model, or pipe one in", file=sys.stderr)
        return Exit.USAGE
    if options.typed == "run":
        # As Ollama's `run` does.
        pull_missing(client(options), options.model)
    return _ask_once(options, prompt, piped) if has_prompt else _converse(options)


def _ask_once(options: argparse.Namespace, prompt: str, piped: str) -> int:
    messages: list[dict[str, Any]] = []
    if options.system:
        messages.append({"role": "system", "content": options.system})
    daemon = client(options)
    message = question(daemon, options.model, prompt)
    if piped.strip():
        # Piped text comes from another program and must not name files to attach.
        message["content"] = f"{message['content']}\n\n{piped}" if prompt else piped
    messages.append(message)
    sampling = Sampling(think=True if options.think else None)
    if options.json:
        body = sampling.body(options.model, messages) | {"stream": False}
        print_json(daemon.post("/api/chat", body, timeout=3600))
        return Exit.DONE
    if answer(daemon, options.model, messages, sampling).stopped:
        # For scripts: the printed answer is incomplete.
        raise KeyboardInterrupt
    return Exit.DONE


def _converse(options: argparse.Namespace) -> int:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (line editing and history for input())
    talk = Conversation(options.model, system=options.system, sampling=Sampling(options.think or None))
    daemon = client(options)
    shown: dict[str, Any] = {}
    try:
        shown = daemon.post("/api/show", {"model": options.model})
    except ClientError as error:
        # Load now rather than with the first question.
        if error.status == 404:
            raise
    print(f"{_introduction(options.model, shown)} /? shows the commands, /bye or Ctrl-D ends it.")
    interrupted = False
    while True:
        try:
            line = input("... " if talk.in_block else ">>> ")
        except EOFError:
            print()
            return Exit.DONE
        except KeyboardInterrupt:
            if interrupted:
                raise
            interrupted = True
            talk.cancel_block()
            print("\nUse /bye, Ctrl-D or Ctrl-C again to end the conversation.")
            continue
        interrupted = False
        try:
            result = talk.typed(line)
        except Quit:
            return Exit.DONE
        if result.words:
            print(result.words)
        if result.show or result.load:
            _about_model(daemon, talk, result)
        if not result.ask:
            continue
        try:
            talk.ask(question(daemon, talk.model, talk.asked))
            text = answer(daemon, talk.model, talk.messages(), talk.sampling).text
        except KeyboardInterrupt:
            # Before the first word: the question may be asked again.
            print()
            talk.unasked()
        except ClientError as error:
            if not error.status:
                raise
            talk.unasked()
            print(f"sollold: {harmless(error.message)}", file=sys.stderr)
        else:
            talk.answered(text)


def _introduction(model: str, shown: dict[str, Any]) -> str:
    """The first line of a conversation; ``shown``: the answer of ``/api/show``, if any."""
    words = f"Talking with {model}."
    if note := shown.get("note"):
        words += f" It has {harmless(str(note))}. Ctrl-C stops an answer that does not end."
    return words


def _about_model(daemon: BlockingClient, talk: Conversation, result: LineResult) -> None:
    """Handle ``/show`` and ``/load``. An error is printed and does not end the conversation."""
    model = result.load or talk.model
    try:
        found = daemon.post("/api/show", {"model": model})
    except ClientError as error:
        print(f"sollold: {harmless(error.message)}", file=sys.stderr)
        return
    if result.load:
        talk.begin(model)
        print(_introduction(model, found))
    elif result.show == INFO:
        print_part(found, "")
    elif found.get(result.show):
        print_part(found, result.show)
    else:
        print(f"{model} has no {result.show} of its own")
