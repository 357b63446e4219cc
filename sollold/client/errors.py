"""The clients' exceptions. Imports nothing, so that every client can use it."""

from __future__ import annotations


def no_daemon(url: str, reason: str, another: str) -> str:
    """Message that no server listens at ``url``; ``another``: how the caller names another node."""
    return (
        f"no daemon answers at {url} ({reason}). Start it with `systemctl start sollold` or `sollold run`, "
        f"or name another node with {another}"
    )


def no_answer(url: str, seconds: float, another: str) -> str:
    """Message that ``url`` accepted the connection and did not respond; ``another`` as in `no_daemon`."""
    return (
        f"{url} did not answer within {round(seconds, 1) or seconds:g} s. It is overloaded or hangs: see "
        f"`journalctl -u sollold` there, or ask another node with {another}"
    )


class ClientError(Exception):
    """The daemon was unreachable, or returned an error.

    Attributes:
        message: the error message, the daemon's own if it sent one.
        status: HTTP status; 0 if no node was reachable.
    """

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.message = message
        self.status = status


class NodeLost(ClientError):
    """The node is unreachable, or its response broke off; another node may succeed."""


class RequestTimeout(ClientError, TimeoutError):
    """The answer did not arrive in time. Also a `TimeoutError`; ``status`` is 504."""

    def __init__(self, message: str) -> None:
        super().__init__(message, 504)


class NodeSilent(RequestTimeout):
    """A node accepted the request and stayed silent: it is overloaded, or hangs."""


class InsufficientMemory(ClientError):
    """The model does not fit into the cluster's memory, or the part of it that the router may use.

    Attributes:
        needed, there, missing: bytes needed, available and missing; 0 if unknown. ``missing`` is 0 if the
            total suffices but is fragmented.
        remedies: sentences on what would help, cheapest first.
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
    """The message of an error body in any of the dialects."""
    if isinstance(item, dict):
        error = item.get("error", "")
        if isinstance(error, dict):
            return str(error.get("message", error))
        return str(error)
    return ""
