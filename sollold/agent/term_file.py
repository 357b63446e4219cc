"""Persists the newest term that this node has obeyed, before any reply reveals it."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import msgspec

from sollold.cluster.gossip.term import Term, follows
from sollold.errors import system_reason
from sollold.settings.state_file import read_json, write_whole

log = logging.getLogger("sollold.agent")

_WRITE_SECONDS = 10.0


class TermFile:
    """The file ``term.json`` in the state folder.

    Attributes:
        on_disk: the term that the file is known to contain.
    """

    def __init__(self, state: Path) -> None:
        self._path = state / "term.json"
        self._writing: asyncio.Task[str] | None = None
        self._warned = False
        self.on_disk = Term()

    def read(self) -> Term:
        """Read an earlier run's term; the zero term if the file is missing or damaged. Blocks."""
        found = read_json(self._path, Term) or Term()
        if follows(found, Term()):
            self.on_disk = found
        else:
            log.warning("%s names term %d, which is impossible; it is ignored", self._path, found.counter)
        return self.on_disk

    async def keep(self, term: Term) -> str:
        """Wait until ``term`` or a newer one is on disk; return why it is not, or an empty string.

        Any number of callers may wait; one write runs at a time, even if the caller that started it gives up.
        """
        try:
            async with asyncio.timeout(_WRITE_SECONDS):
                while self.on_disk < term:
                    if self._writing is None or self._writing.done():
                        self._writing = asyncio.create_task(self._write(term))
                    refusal = await asyncio.shield(self._writing)
                    if refusal:
                        return refusal
        except TimeoutError:
            return f"the term is not on disk after {_WRITE_SECONDS:.0f} s of writing {self._path}"
        return ""

    async def _write(self, term: Term) -> str:
        try:
            await asyncio.to_thread(write_whole, self._path, msgspec.json.encode(term))
        except OSError as error:
            refusal = f"the term can't be written to {self._path}: {system_reason(error)}"
            if not self._warned:
                self._warned = True
                log.error("%s; until then, this node takes part in no load", refusal)
            return refusal
        self._warned = False
        self.on_disk = term
        return ""
