"""``sollold bench``: speed of prompt processing and generation, for one and for several callers."""

from __future__ import annotations

import argparse
import secrets
import statistics
import sys
import threading
import time
from concurrent.futures import Future
from typing import Any

from sollold.cli.asking import client, print_json
from sollold.cli.exit import Exit
from sollold.cli.progress import loading
from sollold.cli.table import print_table
from sollold.client.blocking import BlockingClient
from sollold.client.errors import ClientError
from sollold.facts import dataclass

_WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seven", "wizards")


@dataclass(frozen=True, slots=True)
class Answer:
    """One measured answer. Times in seconds; ``first``: time to the first token."""

    prompt_tokens: int
    prompt_seconds: float
    tokens: int
    seconds: float
    first: float


@dataclass(frozen=True, slots=True)
class Result:
    """Answers that ran concurrently; ``wall``: seconds until the last one ended."""

    callers: int
    answers: tuple[Answer, ...]
    wall: float

    def row(self) -> dict[str, float]:
        """The figures as text: medians over the callers, in tokens per second and seconds."""
        prompt = [a.prompt_tokens / a.prompt_seconds for a in self.answers if a.prompt_seconds > 0]
        speed = [a.tokens / a.seconds for a in self.answers if a.seconds > 0]
        return {
            "callers": self.callers,
            "prompt_tokens_per_second": round(statistics.median(prompt), 1) if prompt else 0.0,
            "tokens_per_second": round(statistics.median(speed), 1) if speed else 0.0,
            "total_tokens_per_second": round(sum(a.tokens for a in self.answers) / self.wall, 1),
            "first_token_seconds": round(statistics.median(a.first for a in self.answers), 3),
        }


def bench(options: argparse.Namespace) -> int:
    """Measure with each number of callers in turn, and print a row per number."""
    daemon = client(options, timeout=3600)
    if not options.json:
        print(f"Loading {options.model} …", file=sys.stderr)
    with loading(daemon, options.model):
        daemon.post("/api/generate", {"model": options.model, "stream": False}, timeout=3600)
    rows = [
        measured(daemon, options.model, callers, options.prompt_tokens, options.tokens).row()
        for callers in options.callers
    ]
    if options.json:
        print_json(rows)
        return Exit.DONE
    titles = ("callers", "prompt tokens/s", "tokens/s each", "tokens/s in all", "first token")
    cells = [
        (
            f"{row['callers']:.0f}",
            f"{row['prompt_tokens_per_second']:.1f}",
            f"{row['tokens_per_second']:.1f}",
            f"{row['total_tokens_per_second']:.1f}",
            f"{row['first_token_seconds']:.2f} s",
        )
        for row in rows
    ]
    print_table(titles, cells, right=titles, spare=titles[::-1])
    return Exit.DONE


def measured(daemon: BlockingClient, model: str, callers: int, prompt_tokens: int, tokens: int) -> Result:
    """Run ``callers`` concurrent requests of ``tokens`` tokens, with prompts of about ``prompt_tokens``.

    Raises:
        ClientError: a request failed.
    """
    begin = time.monotonic()
    pending = [Future[Answer]() for _ in range(callers)]
    for job in pending:
        # Not a thread pool: on Ctrl-C the interpreter would wait for its threads until their answers end.
        threading.Thread(target=_fill, args=(job, daemon, model, prompt_tokens, tokens), daemon=True).start()
    answers = tuple(job.result() for job in pending)
    return Result(callers, answers, time.monotonic() - begin)


def _fill(
    answer: Future[Answer], daemon: BlockingClient, model: str, prompt_tokens: int, tokens: int
) -> None:
    try:
        answer.set_result(_answer(daemon, model, prompt_tokens, tokens))
    except Exception as error:
        answer.set_exception(error)


def _answer(daemon: BlockingClient, model: str, prompt_tokens: int, tokens: int) -> Answer:
    # A unique beginning, so that no engine has the prompt cached.
    words = [secrets.token_hex(4), *(_WORDS[k % len(_WORDS)] for k in range(max(1, prompt_tokens - 8)))]
    body = {
        "model": model,
        "prompt": " ".join(words),
        "raw": True,
        "options": {"num_predict": tokens, "temperature": 0.8},
    }
    begin, first, final = time.monotonic(), 0.0, dict[str, Any]()
    for chunk in daemon.stream("/api/generate", body):
        if not first and (chunk.get("response") or chunk.get("thinking")):
            first = time.monotonic() - begin
        if chunk.get("done"):
            final = chunk
    if not final:
        raise ClientError(f"{model}: the answer ended early", 502)
    return Answer(
        int(final.get("prompt_eval_count", 0)),
        float(final.get("prompt_eval_duration", 0)) / 1e9,
        int(final.get("eval_count", 0)),
        float(final.get("eval_duration", 0)) / 1e9,
        first or time.monotonic() - begin,
    )
