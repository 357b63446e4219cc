"""The certificate of the HTTP port, from files or from the cluster, and its renewal."""

from __future__ import annotations

import asyncio
import datetime
import logging
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from cryptography import x509

from sollold.cluster.net.acceptor import is_loopback
from sollold.cluster.net.certificate_authority import LIFE, Subject, issue
from sollold.cluster.net.identity import Identity, MemoryFile
from sollold.errors import system_reason
from sollold.settings.location import expanded
from sollold.settings.read_file import read_file
from sollold.settings.schema import HttpSettings
from sollold.tasks import cancel_and_wait

log = logging.getLogger("sollold.http")

_CHECK_SECONDS = 30.0
"""Seconds between two checks for a newer certificate, besides those before each handshake."""
_EXPIRES_SOON = datetime.timedelta(days=14)


class CertificateError(OSError):
    """There is no usable certificate; the message says why."""


def certificate_of(
    settings: HttpSettings, identity: Identity, subject: Callable[[], Subject]
) -> ServerTls | None:
    """Return the certificate of the port; None: HTTP only. ``subject``: the node's names now.

    Where the settings don't require HTTPS, other nodes' commands still use it to prove their membership.
    """
    if settings.tls == "own":
        return ServerTls(CertificateFiles(settings.tls_certificate, settings.tls_key))
    if settings.tls == "off" and is_loopback(settings.host):
        return None
    return ServerTls(ClusterCertificate(identity, subject))


class CertificateSource(Protocol):
    """A source of certificates. `stamp` and `load` block."""

    def stamp(self) -> object:
        """Return a value that changes when there may be another certificate."""
        ...

    def issuable_by_anyone(self) -> bool:
        """Whether anybody could obtain such a certificate. Does not block."""
        ...

    def load(self) -> tuple[ssl.SSLContext, datetime.datetime]:
        """Return the TLS context with the certificate, and when it expires.

        Raises:
            CertificateError: it can't be used.
        """
        ...


class CertificateFiles:
    """The user's own certificate with its chain, and its key."""

    def __init__(self, certificate: str, key: str) -> None:
        self._certificate = expanded(certificate)
        self._key = expanded(key)

    def stamp(self) -> object:
        """Return a value that changes with either file."""
        state = []
        for file in (self._certificate, self._key):
            try:
                status = file.stat()
                state.append((status.st_mtime_ns, status.st_size, status.st_ino))
            except OSError:
                state.append((0, 0, 0))
        return state

    def issuable_by_anyone(self) -> bool:
        """Return False."""
        return False

    def load(self) -> tuple[ssl.SSLContext, datetime.datetime]:
        """Load the files as they are now.

        Raises:
            CertificateError: they can't be read, or do not belong together.
        """
        certificate = _read(self._certificate, "http.tls_certificate")
        key = _read(self._key, "http.tls_key")
        try:
            first = x509.load_pem_x509_certificates(certificate)[0]
            # Both as they were read: a file replaced in the meantime might not match the other.
            return _context(MemoryFile(certificate + b"\n" + key)), first.not_valid_after_utc
        except (OSError, ValueError) as error:
            raise CertificateError(
                f"http.tls_certificate = {self._certificate} and http.tls_key = {self._key} are not a "
                f"certificate and its key in PEM without a password: {error}"
            ) from None


def _read(file: Path, setting: str) -> bytes:
    if file == Path():
        raise CertificateError(f'http.tls = "own" needs {setting}')
    try:
        return read_file(file)
    except OSError as error:
        raise CertificateError(f"{setting} = {file} can't be read: {system_reason(error)}") from None


class ClusterCertificate:
    """A certificate that the node issues itself, with the authority of its cluster."""

    def __init__(self, identity: Identity, subject: Callable[[], Subject]) -> None:
        """``subject`` returns the node's names now."""
        self._identity = identity
        self._subject = subject

    def stamp(self) -> object:
        """Return a value that changes with the cluster's secret, the node's names, and each half lifetime."""
        turn = _now().timestamp() // (LIFE.total_seconds() / 2)
        return self._identity.tokens.accepted[0], self._subject(), turn

    def issuable_by_anyone(self) -> bool:
        """Whether the cluster is open: then everybody knows its secret."""
        return self._identity.tokens.open

    def load(self) -> tuple[ssl.SSLContext, datetime.datetime]:
        """Issue a new certificate, signed by the cluster's authority."""
        now = _now()
        pem = MemoryFile(issue(self._identity.tokens.accepted[0], self._subject(), now))
        return _context(pem), now + LIFE


class ServerTls:
    """Keeps the newest certificate. Call `start` to load it at once, then finally `close`."""

    def __init__(self, source: CertificateSource) -> None:
        self._source = source
        self._stamp: object = None
        self._ends = _now()
        self._problem = ""
        self._task: asyncio.Task[None] | None = None
        self._context: ssl.SSLContext | None = None

    async def start(self) -> None:
        """Load the certificate, and check for newer ones from now on.

        Raises:
            CertificateError: there is none.
        """
        await self.refresh()
        if self._context is None:
            raise CertificateError(f"https can't be served: {self._problem}")
        self._task = asyncio.create_task(self._watch(), name="certificate")

    async def close(self) -> None:
        """Stop checking."""
        await cancel_and_wait(self._task)

    async def context_now(self) -> ssl.SSLContext:
        """Return the TLS context for the next connection.

        Raises:
            CertificateError: there is no usable certificate.
        """
        await self.refresh()
        if self._context is None:
            raise CertificateError(self._problem)
        return self._context

    async def refresh(self) -> None:
        """Load a newer certificate; if there is none, or it can't be used, the last one stays."""
        stamp = await asyncio.to_thread(self._source.stamp)
        if stamp == self._stamp:
            return
        try:
            self._context, self._ends = await asyncio.to_thread(self._source.load)
        except CertificateError as error:
            if self._problem != str(error):
                log.warning("%s", error)
            self._problem = str(error)
            return
        if self._stamp is not None:
            log.info("a new certificate is in use; it expires on %s", self._ends.date())
        self._stamp, self._problem = stamp, ""

    def trouble(self) -> tuple[tuple[str, str], ...]:
        """Return what `sollold doctor` reports about it, as (problem, how to fix it)."""
        remaining = self._ends - _now()
        if self._source.issuable_by_anyone():
            problem = "the cluster is open, so anybody on the LAN can issue certificates for its nodes"
            return ((problem, "sollold cluster secure"),)
        if self._problem:
            current = f"the one in use expires on {self._ends.date()}"
            return ((f"the new certificate is not used: {self._problem}; {current}", "fix the files"),)
        if remaining > _EXPIRES_SOON:
            return ()
        state = "has expired" if remaining < datetime.timedelta() else f"expires in {remaining.days} days"
        fix = "renew the file of http.tls_certificate; it is reloaded automatically"
        return ((f"the certificate of the API's port {state} ({self._ends.date()})", fix),)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_CHECK_SECONDS)
            await self.refresh()


def _context(pem: MemoryFile) -> ssl.SSLContext:
    """Return the TLS context for a certificate, its chain and its key."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    # Otherwise OpenSSL would ask for the password on the terminal, if there is one.
    context.load_cert_chain(pem.path, password=lambda: b"")
    return context


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
