"""Batches: background jobs that embed long lists of texts, piece by piece.

A job is split into pieces, several of which are requested at a time; the router spreads them over the
endpoints, and their low priority keeps them behind interactive requests. A piece that finds every slot taken
is retried. One that is refused is halved until the text that can't be embedded is isolated; one that makes
engines die is requested text by text after a few attempts, so that the other texts get their vectors.
The jobs, vectors and text that are kept are bounded; the oldest finished job is dropped first.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from array import array
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import field, replace
from enum import StrEnum

from sollold.errors import Fault, Refusal, bad_request
from sollold.facts import dataclass

log = logging.getLogger("sollold.serving")

Embed = Callable[[Sequence[str]], Awaitable[Sequence[Sequence[float]]]]
"""Returns the vectors of a piece's texts, in order; raises `Refusal` or `BatchEnded`."""

LARGEST = 10_000
"""Maximum number of texts in a job."""
_MAX_DEATHS = 3
"""Engine deaths over a piece after which its texts are requested one by one."""


class JobState(StrEnum):
    """The states of a job."""

    RUNNING = "running"
    DONE = "completed"
    FAILED = "failed"
    """No text could be embedded, or the job itself failed."""
    CANCELLED = "cancelled"


@dataclass(slots=True)
class Job:
    """One list of texts to embed.

    Attributes:
        vectors: the vector of each text; None until it is there, and finally for texts in ``errors``.
        errors: index of a text → why it has no vector.
        done: number of texts that have a vector or an error.
        created, ended: Unix times; ``ended`` is 0.0 while the job runs.
    """

    id: str
    model: str
    client: str
    texts: Sequence[str]
    vectors: list[array[float] | None]
    created: float
    progress: JobState = JobState.RUNNING
    errors: dict[int, str] = field(default_factory=dict)
    done: int = 0
    ended: float = 0.0
    waiting: str = ""
    """Why the job makes no progress at the moment; empty if it does."""
    width: int = 0
    """Dimensions of a vector; 0 until the first arrives. From then on, room for all is reserved."""

    @property
    def total(self) -> int:
        """Number of texts."""
        return len(self.vectors)

    @property
    def floats(self) -> int:
        """Numbers in all its vectors, including those still to come."""
        return self.width * ((self.done if self.ended else self.total) - len(self.errors))


@dataclass(frozen=True, slots=True)
class _Piece:
    """Texts that are requested together. ``broken``: number of engines that died over them."""

    first: int
    texts: Sequence[str]
    broken: int = 0

    def cut(self, length: int) -> list[_Piece]:
        """Split into pieces of at most ``length`` texts."""
        starts = range(0, len(self.texts), length)
        return [_Piece(self.first + start, self.texts[start : start + length]) for start in starts]

    def after_break(self) -> list[_Piece]:
        """The pieces to request after an engine died over this one; empty if nothing is left to try."""
        if self.broken + 1 < _MAX_DEATHS:
            return [replace(self, broken=self.broken + 1)]
        last = _MAX_DEATHS - 1
        return [replace(piece, broken=last) for piece in self.cut(1)] if len(self.texts) > 1 else []


class BatchEnded(Exception):
    """Raised by an `Embed` to end the whole job; the message says why."""


class _NoRoom(Exception):
    """The vectors of the job exceed the room for them."""


def no_batch(id_: str) -> Refusal:
    """The error for a request for an unknown batch."""
    return Refusal(Fault.NOT_FOUND, f"there is no batch {id_[:40]!r} on this node")


class Batches:
    """All jobs of this node. The owner calls `close`."""

    def __init__(
        self,
        *,
        piece: int = 32,
        at_once: int = 8,
        jobs: int = 64,
        running: int = 16,
        running_each: int = 8,
        floats: int = 128 * 1024 * 1024,
        characters: int = 256 * 1024 * 1024,
        pause: float = 1.0,
    ) -> None:
        """Set the limits.

        ``piece``: texts per piece; ``at_once``: pieces requested concurrently, over all jobs; ``jobs``: jobs
        kept; ``running``: jobs running, ``running_each``: per client; ``floats``: numbers kept in vectors, of
        4 bytes each, including those that running jobs will produce; ``characters``: length of all texts of
        running jobs; ``pause``: minimum seconds before a temporarily refused piece is retried.
        """
        self._piece = piece
        self._slots = asyncio.Semaphore(at_once)
        self._concurrency = at_once
        self._max_jobs = jobs
        self._max_running = running
        self._max_running_each = running_each
        self._max_floats = floats
        self._max_characters = characters
        self._pause = pause
        self._jobs: dict[str, Job] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def submit(
        self, model: str, texts: Sequence[str], embed: Embed, client: str = "", deadline: float = 0.0
    ) -> Job:
        """Start a job. ``deadline``: seconds after which missing vectors are given up; 0: never.

        Raises:
            Refusal: BAD_REQUEST if it is empty or too long; UNAVAILABLE if too much is already running.
        """
        if not texts:
            raise bad_request("a batch needs at least one text")
        if len(texts) > LARGEST:
            raise bad_request(f"a batch has at most {LARGEST} texts, this one has {len(texts)}")
        if len(self._tasks) >= self._max_running:
            message = f"{self._max_running} batches are already running; try again when one is done"
            raise Refusal(Fault.UNAVAILABLE, message, retry_after=30)
        if sum(self._jobs[id_].client == client for id_ in self._tasks) >= self._max_running_each:
            message = (
                f"{self._max_running_each} of your batches are already running; try again when one is done"
            )
            raise Refusal(Fault.UNAVAILABLE, message, retry_after=30)
        kept = sum(len(text) for job in self._jobs.values() for text in job.texts)
        if sum(map(len, texts)) + kept > self._max_characters:
            message = "the running batches hold too much text; try again when one is done"
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
        self._evict()
        task = asyncio.create_task(self._run(job, embed, deadline), name=f"batch {job.id}")
        self._tasks[job.id] = task
        task.add_done_callback(lambda ended: self._ended(job, ended))
        return job

    def job(self, id_: str) -> Job:
        """Return the job with this id.

        Raises:
            Refusal: NOT_FOUND.
        """
        job = self._jobs.get(id_)
        if job is None:
            raise no_batch(id_)
        return job

    def jobs(self) -> tuple[Job, ...]:
        """All jobs kept, newest first."""
        return tuple(reversed(self._jobs.values()))

    async def cancel(self, id_: str) -> Job:
        """Cancel a job; it keeps the vectors that it already has.

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
        """Cancel all jobs."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _run(self, job: Job, embed: Embed, deadline: float) -> None:
        pieces = _Piece(0, job.texts).cut(self._piece)
        pieces.reverse()
        try:
            async with asyncio.timeout(deadline or None):
                await self._run_workers(job, pieces, embed)
        except TimeoutError:
            self._give_up(job, f"not embedded within the batch's deadline of {deadline:g} s")

    async def _run_workers(self, job: Job, pieces: list[_Piece], embed: Embed) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                # The first alone: while its model is loaded, others would occupy the slots of other jobs.
                await self._embed_next(job, pieces, embed)
                for _ in range(min(self._concurrency, len(pieces))):
                    group.create_task(self._work(job, pieces, embed))
        except* BatchEnded as ended:
            self._give_up(job, str(ended.exceptions[0]))
        except* _NoRoom:
            self._give_up(
                job,
                f"{job.total} vectors of {job.width} dimensions do not fit beside those of the other batches "
                "on this node; try again when these are done, or with fewer texts or dimensions",
            )

    def _ended(self, job: Job, task: asyncio.Task[None]) -> None:
        """Called when a job's task has ended, even if it was cancelled before it began."""
        if task.cancelled():
            job.progress = JobState.CANCELLED
        else:
            failed = task.exception() is not None or len(job.errors) == job.total
            job.progress = JobState.FAILED if failed else JobState.DONE
        job.ended = time.time()
        job.texts = ()
        job.waiting = ""
        self._tasks.pop(job.id, None)
        self._evict()
        log.info("batch %s of %s texts: %s", job.id, job.total, job.progress)

    async def _work(self, job: Job, pieces: list[_Piece], embed: Embed) -> None:
        while pieces:
            await self._embed_next(job, pieces, embed)

    async def _embed_next(self, job: Job, pieces: list[_Piece], embed: Embed) -> None:
        pieces += reversed(await self._embed(job, pieces.pop(), embed))
        job.waiting = ""

    async def _embed(self, job: Job, piece: _Piece, embed: Embed) -> list[_Piece]:
        """Store the vectors of a piece, or the error. Return the pieces to request instead, if any."""
        pause = self._pause
        while True:
            try:
                async with self._slots:
                    vectors = await embed(piece.texts)
                break
            except Refusal as refusal:
                if refusal.fault is not Fault.UNAVAILABLE:
                    smaller = self._smaller(job, piece, refusal.fault)
                    if not smaller:
                        self._note(job, piece, refusal.message)
                    elif refusal.fault is Fault.INTERRUPTED:
                        job.waiting = refusal.message
                        await asyncio.sleep(max(pause, refusal.retry_after))
                    return smaller
                job.waiting = refusal.message
                await asyncio.sleep(max(pause, refusal.retry_after))
                pause = min(pause * 2, 30.0)
            except BatchEnded:
                raise
            except Exception:
                log.exception("a piece of batch %s failed", job.id)
                self._note(job, piece, "internal error; the node's log has the details")
                return []
        if len(vectors) != len(piece.texts):
            self._note(job, piece, f"the engine gave {len(vectors)} embeddings for {len(piece.texts)} texts")
            return []
        self._keep(job, piece, vectors)
        return []

    def _smaller(self, job: Job, piece: _Piece, fault: Fault) -> list[_Piece]:
        """The pieces to request instead of a refused one; empty if its error is final."""
        if fault is Fault.INTERRUPTED:
            return piece.after_break()
        # Errors that concern the model are not retried text by text; and if text after text fails and none
        # has ever succeeded, the texts are not the cause.
        hopeless = len(job.errors) == job.done >= self._piece
        if fault not in (Fault.ENGINE, Fault.BAD_REQUEST) or len(piece.texts) == 1 or hopeless:
            return []
        return piece.cut((len(piece.texts) + 1) // 2)

    def _keep(self, job: Job, piece: _Piece, vectors: Sequence[Sequence[float]]) -> None:
        """Store the vectors of a piece.

        Raises:
            _NoRoom: the vectors of this job do not fit.
        """
        if not job.width:
            job.width = max(1, *map(len, vectors))
            self._evict()
            if self._floats() > self._max_floats:
                raise _NoRoom
        for index, vector in enumerate(vectors, piece.first):
            # All vectors of a model have the same length; a longer one must not exceed the reserved room.
            job.vectors[index] = array("f", vector[: job.width])
        job.done += len(piece.texts)

    @staticmethod
    def _note(job: Job, piece: _Piece, message: str) -> None:
        for index in range(piece.first, piece.first + len(piece.texts)):
            job.errors[index] = message
        job.done += len(piece.texts)

    @staticmethod
    def _give_up(job: Job, message: str) -> None:
        """Set the error of every text that has neither a vector nor an error."""
        for index, vector in enumerate(job.vectors):
            if vector is None:
                job.errors.setdefault(index, message)
        job.done = job.total

    def _floats(self) -> int:
        return sum(job.floats for job in self._jobs.values())

    def _evict(self) -> None:
        """Drop the oldest finished jobs until the kept jobs and vectors are within bounds."""
        finished = [job for job in self._jobs.values() if job.id not in self._tasks and job.ended]
        for job in finished[:-1] if len(self._jobs) <= self._max_jobs else finished:
            if self._floats() <= self._max_floats and len(self._jobs) <= self._max_jobs:
                return
            del self._jobs[job.id]
