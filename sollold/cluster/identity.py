"""Who a node is, and how it proves that it belongs to the cluster.

From the cluster's token a certificate authority follows by computation (HKDF-SHA256, RFC 5869, gives an
Ed25519 key, RFC 8032), so every node that has the token can issue itself a certificate, and no other can.
The certificate names the node's id. It lives in memory only and is made anew with every start. Both sides
of a connection ask for it (TLS 1.3), and a caller checks that it reached the very node it meant.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import os
import secrets
import ssl
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from sollold.cluster.state_file import read_bounded, write_whole

OPEN_TOKEN = hashlib.sha256(b"sollold: the well-known token of an open cluster").digest()
"""Everybody knows it: who uses it says that whoever is on the LAN may join."""

_SUFFIX = ".sollold"
_SINCE = datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC)
_UNTIL = datetime.datetime(9999, 12, 31, 23, 59, 59, tzinfo=datetime.UTC)
"""Certificates end with the process; clocks on a LAN may be years wrong and must not matter."""


class BadToken(ValueError):
    """A token in the settings is not 64 hex digits."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """The cluster's secret. ``accepted`` has the current one first.

    To change a token without a gap: first every node gets the new one as an old one (it is accepted),
    then as its token with the former as an old one, then the former is dropped.
    """

    accepted: tuple[bytes, ...]

    @classmethod
    def read(cls, token: str, old_tokens: Sequence[str] = ()) -> Tokens:
        """From the settings: hex digits; ``open`` stands for the well-known one, and so does nothing.

        Raises:
            BadToken: a token is not 64 hex digits.
        """
        found = [_token(token)]
        found += [one for one in map(_token, old_tokens) if one not in found]
        return cls(tuple(dict.fromkeys(found)))

    @property
    def open(self) -> bool:
        """Whether everybody on the LAN can join."""
        return OPEN_TOKEN in self.accepted

    @property
    def cluster(self) -> str:
        """A short name of the cluster that tells nothing of the token."""
        return self.clusters[0]

    @property
    def clusters(self) -> tuple[str, ...]:
        """The names by all tokens that are accepted: while it is changed a cluster has two."""
        return tuple(_derive(token, b"cluster name", 4).hex() for token in self.accepted)


def node_id(state: Path) -> str:
    """This node's id, 16 hex digits, made at the first start and kept in the folder ``state``.

    Blocks for the disk.

    Raises:
        OSError: the file can't be read or written.
    """
    path = state / "node-id"
    with contextlib.suppress(FileNotFoundError):
        found = read_bounded(path, 64).decode("ascii", "replace").strip()
        if len(found) == 16 and all(letter in "0123456789abcdef" for letter in found):
            return found
    fresh = secrets.token_hex(8)
    write_whole(path, fresh.encode() + b"\n")
    return fresh


class Identity:
    """What this node shows and whom it believes.

    Attributes:
        node: its id.
        tokens: the cluster's.
    """

    def __init__(self, node: str, tokens: Tokens) -> None:
        self.node = node
        self.tokens = tokens
        current = _authority(tokens.accepted[0])
        certificate, key = _leaf(node, *current)
        self._chain = _File(certificate.public_bytes(Encoding.PEM) + _pem(key))
        self._trusted = "".join(
            _authority(token)[0].public_bytes(Encoding.PEM).decode() for token in tokens.accepted
        )

    def server_context(self, protocols: Sequence[str]) -> ssl.SSLContext:
        """For listening; ``protocols`` are the ALPN names spoken."""
        context = self._context(ssl.PROTOCOL_TLS_SERVER, protocols)
        # A member proves itself with each connection: resuming would only add tickets to every handshake.
        context.num_tickets = 0
        return context

    def client_context(self, protocol: str, *, anyone: bool = False) -> ssl.SSLContext:
        """For calling with ALPN ``protocol``; pass `tls_name` as ``server_hostname``.

        ``anyone``: any member will do, since it is not known yet who is there.
        """
        context = self._context(ssl.PROTOCOL_TLS_CLIENT, [protocol])
        context.check_hostname = not anyone
        return context

    def _context(self, kind: int, protocols: Sequence[str]) -> ssl.SSLContext:
        context = ssl.SSLContext(kind)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cadata=self._trusted)
        context.load_cert_chain(self._chain.path)
        context.set_alpn_protocols(list(protocols))
        return context


def tls_name(node: str) -> str:
    """The name of a node in its certificate. With a suffix: an id of digits alone is taken for an address."""
    return node + _SUFFIX


def peer_of(connection: Any) -> str:
    """The node id that the other side of a TLS connection has proved; empty when there is none.

    ``connection``: an ``ssl_object`` or a socket with ``getpeercert``.
    """
    certificate = connection.getpeercert() if connection is not None else None
    for kind, name in (certificate or {}).get("subjectAltName", ()):
        if kind == "DNS" and str(name).endswith(_SUFFIX):
            return str(name).removesuffix(_SUFFIX)
    return ""


def _token(text: str) -> bytes:
    text = text.strip()
    if text in ("", "open"):
        return OPEN_TOKEN
    try:
        token = bytes.fromhex(text)
    except ValueError:
        token = b""
    if len(token) != 32:
        raise BadToken("a cluster token is 64 hex digits; `openssl rand -hex 32` makes one")
    return token


def _derive(token: bytes, what: bytes, length: int) -> bytes:
    return HKDF(SHA256(), length, salt=None, info=b"sollold 1 " + what).derive(token)


def _authority(token: bytes) -> tuple[x509.Certificate, Ed25519PrivateKey]:
    """The token's certificate authority: every node computes the same one, byte for byte."""
    key = Ed25519PrivateKey.from_private_bytes(_derive(token, b"certificate authority", 32))
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "sollold " + _derive(token, b"name", 8).hex())])
    public = key.public_key()
    builder = (
        x509.CertificateBuilder(issuer_name=name, subject_name=name)
        .public_key(public)
        .serial_number(1)
        .not_valid_before(_SINCE)
        .not_valid_after(_UNTIL)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )
    return builder.sign(key, None), key


def _leaf(
    node: str, authority: x509.Certificate, signer: Ed25519PrivateKey
) -> tuple[x509.Certificate, Ed25519PrivateKey]:
    key = Ed25519PrivateKey.generate()
    public = key.public_key()
    builder = (
        x509.CertificateBuilder(
            issuer_name=authority.subject,
            subject_name=x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, node)]),
        )
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_SINCE)
        .not_valid_after(_UNTIL)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
            critical=False,
        )
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(tls_name(node))]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
        )
    )
    return builder.sign(signer, None), key


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(key: Ed25519PrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


class _File:
    """Bytes under a path, for OpenSSL, which reads keys from files only: in memory where Linux can."""

    def __init__(self, data: bytes) -> None:
        if hasattr(os, "memfd_create"):
            descriptor = os.memfd_create("sollold", os.MFD_CLOEXEC)
            self.path = f"/proc/self/fd/{descriptor}"
            weakref.finalize(self, os.close, descriptor)
        else:
            descriptor, self.path = tempfile.mkstemp()  # readable by its owner alone
            weakref.finalize(self, os.close, descriptor)
            weakref.finalize(self, os.unlink, self.path)
        os.write(descriptor, data)
