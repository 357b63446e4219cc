"""Long lists of texts to embed: jobs that go on by themselves, piece by piece.

A job is cut into pieces which are asked for several at a time; the router spreads them over the endpoints,
and their low priority keeps them behind people. A piece that finds every place taken is asked for again.
What is kept is bounded: so many jobs, so many vectors; the oldest finished job goes first.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from array import array
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from sollold.serving.ask import Fault, Refusal

log = logging.getLogger("sollold.serving")

Embed = Callable[[Sequence[str]], Awaitable[Sequence[Sequence[float]]]]
"""Vectors of a piece's texts, in their order; raises `Refusal`."""

LARGEST = 10_000
"""Texts of one job."""


class Progress(StrEnum):
    """A job's life."""

    RUNNING = "running"
    DONE = "completed"
    FAILED = "failed"
    """Not a single text could be embedded."""
    CANCELLED = "cancelled"


@dataclass(slots=True)
class Job:
    """One list of texts.

    Attributes:
        vectors: of each text; None while it is not there, and for good where ``errors`` says why.
        errors: place → sentence.
        created, ended: seconds since the epoch; ``ended`` 0.0 while it runs.
    """

    id: str
    model: str
    client: str
    texts: Sequence[str]
    vectors: list[array[float] | None]
    created: float
    progress: Progress = Progress.RUNNING
    errors: dict[int, str] = field(default_factory=dict)
    done: int = 0
    ended: float = 0.0
    waiting: str = ""
    """Why it does not go on just now."""

    @property
    def total(self) -> int:
        """Texts in all."""
        return len(self.vectors)


class Batches:
    """All jobs of this node. `close` it."""

    def __init__(
        self,
        *,
        piece: int = 32,
        at_once: int = 8,
        jobs: int = 64,
        running: int = 16,
        floats: int = 64 * 1024 * 1024,
        pause: float = 1.0,
    ) -> None:
        """``piece``: texts asked for together; ``at_once``: pieces under way, over all jobs.

        ``jobs``, ``running``: most kept and most under way; ``floats``: most numbers kept of finished jobs;
        ``pause``: seconds before a piece that was refused for now is asked for again, at the least.
        """
        self._piece = piece
        self._places = asyncio.Semaphore(at_once)
        self._at_once = at_once
        self._most = jobs
        self._most_running = running
        self._most_floats = floats
        self._pause = pause
        self._jobs: dict[str, Job] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def submit(self, model: str, texts: Sequence[str], embed: Embed, client: str = "") -> Job:
        """Begin a job.

        Raises:
            Refusal: BAD_REQUEST when it is empty or too long; UNAVAILABLE when too many are under way.
        """
        if not texts:
            raise Refusal(Fault.BAD_REQUEST, "a batch needs at least one text")
        if len(texts) > LARGEST:
            raise Refusal(
                Fault.BAD_REQUEST, f"a batch has at most {LARGEST} texts, this one has {len(texts)}"
            )
        if len(self._tasks) >= self._most_running:
            message = f"{self._most_running} batches are under way already; ask again when one is done"
            raise Refusal(Fault.UNAVAILABLE, message, retry_after=30)
        job = Job(
            id=secrets.token_hex(8),
            model=model,
            client=client,
            texts=texts,
            vectors=[None] * len(texts),
            created=time.time(),
        )
        self._jobs[job.id] = job
        self._forget()
        task = asyncio.create_task(self._run(job, embed), name=f"batch {job.id}")
        self._tasks[job.id] = task
        task.add_done_callback(lambda ended: self._ended(job, ended))
        return job

    def job(self, id_: str) -> Job:
        """A job by its id.

        Raises:
            Refusal: NOT_FOUND.
        """
        job = self._jobs.get(id_)
        if job is None:
            raise Refusal(Fault.NOT_FOUND, f"there is no batch {id_[:40]!r} on this node")
        return job

    def jobs(self) -> tuple[Job, ...]:
        """All that are kept, the newest first."""
        return tuple(reversed(self._jobs.values()))

    async def cancel(self, id_: str) -> Job:
        """End a job; what it has already stays.

        Raises:
            Refusal: NOT_FOUND.
        """
        job = self.job(id_)
        task = self._tasks.get(id_)
        if task is not None:
            task.cancel()
            await asyncio.wait((task,))
            # The task's own callback runs in the next turn of the loop.
            await asyncio.sleep(0)
        return job

    async def close(self) -> None:
        """End all jobs."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _run(self, job: Job, embed: Embed) -> None:
        pieces = [
            (first, job.texts[first : first + self._piece]) for first in range(0, job.total, self._piece)
        ]
        pieces.reverse()
        async with asyncio.TaskGroup() as group:
            for _ in range(min(self._at_once, len(pieces))):
                group.create_task(self._work(job, pieces, embed))

    def _ended(self, job: Job, task: asyncio.Task[None]) -> None:
        """A job's task is over, also one that was cancelled before it began."""
        if task.cancelled():
            job.progress = Progress.CANCELLED
        else:
            failed = task.exception() is not None or len(job.errors) == job.total
            job.progress = Progress.FAILED if failed else Progress.DONE
        job.ended = time.time()
        job.texts = ()
        job.waiting = ""
        self._tasks.pop(job.id, None)
        self._forget()
        log.info("batch %s of %s texts: %s", job.id, job.total, job.progress)

    async def _work(self, job: Job, pieces: list[tuple[int, Sequence[str]]], embed: Embed) -> None:
        while pieces:
            first, texts = pieces.pop()
            await self._embed(job, first, texts, embed)

    async def _embed(self, job: Job, first: int, texts: Sequence[str], embed: Embed) -> None:
        pause = self._pause
        while True:
            try:
                async with self._places:
                    vectors = await embed(texts)
                break
            except Refusal as refusal:
                if refusal.fault not in (Fault.UNAVAILABLE, Fault.INTERRUPTED):
                    self._note(job, first, texts, refusal.message)
                    return
                job.waiting = refusal.message
                await asyncio.sleep(max(pause, refusal.retry_after))
                pause = min(pause * 2, 30.0)
            except Exception:
                log.exception("a piece of batch %s failed", job.id)
                self._note(
                    job, first, texts, "the node failed for a reason it did not expect; its log says more"
                )
                return
        job.waiting = ""
        if len(vectors) != len(texts):
            self._note(job, first, texts, f"{len(vectors)} embeddings came for {len(texts)} texts")
            return
        for place, vector in enumerate(vectors, first):
            job.vectors[place] = array("f", vector)
        job.done += len(texts)

    @staticmethod
    def _note(job: Job, first: int, texts: Sequence[str], message: str) -> None:
        for place in range(first, first + len(texts)):
            job.errors[place] = message
        job.done += len(texts)

    def _forget(self) -> None:
        """Let the oldest finished jobs go until what is kept is within its bounds."""
        finished = [job for job in self._jobs.values() if job.id not in self._tasks and job.ended]
        floats = sum(len(vector) for job in finished for vector in job.vectors if vector is not None)
        for job in finished[:-1] if len(self._jobs) <= self._most else finished:
            if floats <= self._most_floats and len(self._jobs) <= self._most:
                return
            floats -= sum(len(vector) for vector in job.vectors if vector is not None)
            del self._jobs[job.id]
