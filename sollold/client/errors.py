"""What goes wrong when a daemon is asked. Imports nothing, so that every client can have it."""

from __future__ import annotations


def no_daemon(url: str, reason: str, another: str) -> str:
    """Says that nobody answers at ``url``; ``another``: how the caller names another node."""
    return (
        f"no daemon answers at {url} ({reason}). Start it with `systemctl start sollold` or `sollold run`, "
        f"or name another node with {another}"
    )


def no_answer(url: str, seconds: float, another: str) -> str:
    """Says that a connection was made to ``url`` and no answer came; ``another`` as in `no_daemon`."""
    return (
        f"{url} did not answer within {seconds:g} s. It is overloaded or hangs: see `journalctl -u sollold` "
        f"there, or ask another node with {another}"
    )


class ClientError(Exception):
    """The daemon could not be asked, or said no.

    Attributes:
        message: in words, the daemon's own where it said something.
        status: HTTP's; 0 when no node could be reached.
    """

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.message = message
        self.status = status


class NodeLost(ClientError):
    """Nobody answers at the node's address, or its answer broke off: another node may do better."""


class RequestTimeout(ClientError, TimeoutError):
    """There was no answer in time. Also a `TimeoutError`; ``status`` is 504."""

    def __init__(self, message: str) -> None:
        super().__init__(message, 504)


class NodeSilent(RequestTimeout):
    """A node took the request and says nothing: it is overloaded, or hangs."""


class InsufficientMemory(ClientError):
    """The model does not fit into the memory of the cluster, or of what the router may use of it.

    Attributes:
        needed, there, missing: bytes: what the model needs, what there is, and the difference; 0 where the
            cluster could not tell. ``missing`` is 0 when the sum would do, but is in pieces.
        remedies: what would help, the cheapest first; sentences.
    """

    def __init__(
        self,
        message: str,
        *,
        needed: int = 0,
        there: int = 0,
        missing: int = 0,
        remedies: tuple[str, ...] = (),
    ) -> None:
        super().__init__(message, 507)
        self.needed = needed
        self.there = there
        self.missing = missing
        self.remedies = remedies


def error_text(item: object) -> str:
    """The words of an error body in any of the dialects."""
    if isinstance(item, dict):
        error = item.get("error", "")
        if isinstance(error, dict):
            return str(error.get("message", error))
        return str(error)
    return ""
