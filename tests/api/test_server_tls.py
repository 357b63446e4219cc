"""The certificate of the HTTP port: issued, renewed, missing, about to expire."""

from __future__ import annotations

import asyncio
import datetime
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from sollold.api.http.secure_server import secure_server
from sollold.api.http.server_tls import CertificateError, CertificateFiles, ClusterCertificate, ServerTls
from sollold.cluster.net import acceptor
from sollold.cluster.net.certificate_authority import Subject, authority_pem, issue, subject_of
from sollold.cluster.net.identity import Identity, Tokens
from tests.keys import key

SECRET = b"s" * 32


def files(folder: Path, name: str, now: datetime.datetime | None = None) -> tuple[Path, Path]:
    """Write a certificate for ``name`` and its key, as files of the user."""
    pem = issue(SECRET, Subject((name,), ("127.0.0.1",)), now or datetime.datetime.now(datetime.UTC))
    certificate, key = folder / "fullchain.pem", folder / "key.pem"
    end = pem.index(b"-----BEGIN PRIVATE")
    certificate.write_bytes(pem[:end])
    key.write_bytes(pem[end:])
    return certificate, key


class Echo(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)


class EchoServer:
    def __init__(self, tls: ServerTls, *, required: bool = True) -> None:
        self.tls = tls
        listening = socket.create_server(("127.0.0.1", 0))
        listening.setblocking(False)
        self.port = listening.getsockname()[1]
        self._server = secure_server([listening], Echo, tls.context_now, required=required)

    async def names(self) -> list[str]:
        """DNS names in the certificate that the server presents."""
        trust = ssl.create_default_context(cadata=authority_pem(SECRET))
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, ssl=trust)
        writer.write(b"hello")
        assert await reader.readexactly(5) == b"hello"
        certificate = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        writer.close()
        extensions = x509.load_der_x509_certificate(certificate).extensions
        return extensions.get_extension_for_class(x509.SubjectAlternativeName).value.get_values_for_type(
            x509.DNSName
        )

    async def close(self) -> None:
        await self._server.close()
        await self.tls.close()


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[EchoServer]:
    certificate, key = files(tmp_path, "one")
    tls = ServerTls(CertificateFiles(str(certificate), str(key)))
    await tls.start()
    server = EchoServer(tls)
    yield server
    await server.close()


async def test_a_renewed_certificate_is_used_and_a_broken_one_is_not(
    served: EchoServer, tmp_path: Path
) -> None:
    assert await served.names() == ["one"] and served.tls.trouble() == ()
    certificate, _ = files(tmp_path, "two")
    await served.tls.refresh()
    assert await served.names() == ["two"]
    certificate.write_text("no certificate")
    await served.tls.refresh()
    assert await served.names() == ["two"]
    ((problem, _),) = served.tls.trouble()
    assert "is not used" in problem and str(certificate) in problem
    certificate.unlink()
    await served.tls.refresh()
    ((problem, _),) = served.tls.trouble()
    assert "can't be read: No such file" in problem
    files(tmp_path, "three")
    await served.tls.refresh()
    assert await served.names() == ["three"] and served.tls.trouble() == ()


async def test_a_certificate_that_expires_soon_is_reported(served: EchoServer, tmp_path: Path) -> None:
    year = datetime.timedelta(days=365)
    for ago, expected in (
        (year - datetime.timedelta(days=10, hours=1), "expires in 10 days"),
        (year * 2, "has expired"),
    ):
        files(tmp_path, "old", datetime.datetime.now(datetime.UTC) - ago)
        await served.tls.refresh()
        ((problem, fix),) = served.tls.trouble()
        assert expected in problem and "renew" in fix


async def test_local_plain_http_works_and_failed_handshakes_are_tolerated(served: EchoServer) -> None:
    for _ in range(3):
        _, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.close()
        _, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(b"\x16\x03rubbish that is no handshake")
        writer.close()
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    writer.write(b"GET / HTTP/1.1\r\n")
    assert await reader.readexactly(16) == b"GET / HTTP/1.1\r\n"
    writer.close()
    assert await served.names() == ["one"]


async def test_connections_without_a_first_byte_have_the_limit_of_all_connections(
    served: EchoServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sollold.api.http.secure_server.connection_limit", lambda: 2)
    server = EchoServer(served.tls, required=False)
    silent = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(3)]
    assert await silent[2][0].read() == b""
    silent[0][1].write(b"hello")
    assert await silent[0][0].readexactly(5) == b"hello"
    for _, writer in silent:
        writer.close()
    await server.close()


@pytest.mark.parametrize("required", [True, False])
async def test_other_machines_may_use_http_unless_https_is_required(
    served: EchoServer, monkeypatch: pytest.MonkeyPatch, required: bool
) -> None:
    monkeypatch.setattr(acceptor, "is_loopback", lambda address: False)
    server = EchoServer(served.tls, required=required)
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port, local_addr=("127.0.0.2", 0))
    writer.write(b"GET / HTTP/1.1\r\n\r\n")
    writer.write_eof()
    answer = await reader.read()
    assert answer.startswith(b"HTTP/1.1 400" if required else b"GET / HTTP/1.1"), answer
    writer.close()
    assert await server.names() == ["one"]
    await server.close()


@pytest.mark.parametrize(
    ("certificate", "key", "message"),
    [
        ("", "", 'http.tls = "own" needs http.tls_certificate'),
        ("fullchain.pem", "", 'http.tls = "own" needs http.tls_key'),
        ("fullchain.pem", "nowhere", "http.tls_key = .*nowhere can't be read: No such file"),
        ("fullchain.pem", "fullchain.pem", "are not a certificate and its key"),
    ],
)
async def test_a_start_with_invalid_files_explains_the_problem(
    tmp_path: Path, certificate: str, key: str, message: str
) -> None:
    files(tmp_path, "one")
    tls = ServerTls(CertificateFiles(*(str(tmp_path / name) if name else "" for name in (certificate, key))))
    with pytest.raises(CertificateError, match=message):
        await tls.start()


async def test_the_cluster_certificate_follows_addresses_and_the_secret() -> None:
    identity = Identity(key(1), Tokens((SECRET,)))
    addresses = ["127.0.0.1"]
    tls = ServerTls(
        ClusterCertificate(identity, lambda: subject_of("Anna", addresses, ("*.example.com", "*")))
    )
    await tls.start()
    served = EchoServer(tls)
    names = [
        "anna",
        "anna.local",
        "anna.lan",
        "anna.internal",
        "anna.home.arpa",
        "localhost",
        "*.example.com",
    ]
    assert await served.names() == names
    before = await tls.context_now()
    assert await tls.context_now() is before
    addresses.append("10.1.2.3")
    assert await tls.context_now() is not before and tls.trouble() == ()
    identity.change_tokens(Tokens((b"t" * 32,)))
    with pytest.raises(ssl.SSLCertVerificationError):
        await served.names()
    identity.change_tokens(Tokens.read(""))
    await tls.refresh()
    assert "the cluster is open" in tls.trouble()[0][0]
    await served.close()


async def test_without_a_start_the_first_handshake_issues_the_certificate() -> None:
    identity = Identity(key(1), Tokens((SECRET,)))
    tls = ServerTls(ClusterCertificate(identity, lambda: subject_of("Anna", ["127.0.0.1"], ())))
    served = EchoServer(tls, required=False)
    assert "anna" in await served.names()
    await served.close()


def test_invalid_names_are_left_out_of_certificates() -> None:
    subject = subject_of(
        "Anna's PC", ["fe80::1%eth0", "10.0.0.1"], ("*", "gpu.example.com", "a b", "ä.example")
    )
    assert subject == Subject(("localhost", "gpu.example.com"), ("fe80::1", "10.0.0.1", "127.0.0.1", "::1"))
    pem = issue(SECRET, subject, datetime.datetime.now(datetime.UTC))
    assert x509.load_pem_x509_certificate(pem).public_bytes(Encoding.DER)
    assert authority_pem(SECRET) == authority_pem(SECRET) != authority_pem(b"t" * 32)
