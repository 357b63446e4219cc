"""What the leader needs to know of models: which node has which, and what a header says."""

from __future__ import annotations

from typing import Protocol

from sollold.models.model import Model
from sollold.models.names import Resolved
from sollold.models.shape import Shape


class Library(Protocol):
    """The models of the whole cluster. `sollold.models.library.Library` is one."""

    def resolve(self, name: str) -> Resolved:
        """Which model a caller means."""
        ...

    def find(self, name: str) -> tuple[tuple[str, Model], ...]:
        """(node, model) for each live node that has the content; empty when it is not exactly one."""
        ...

    async def shape(self, node: str, model: Model) -> Shape:
        """What the model's header says, asked of ``node``.

        Raises:
            LookupError: the node can't be asked or can't read the file; the message says why.
        """
        ...
