"""Identity of a node, and how it proves that it belongs to the cluster.

A certificate authority is computed from the cluster's token (HKDF-SHA256, RFC 5869, yields an Ed25519 key,
RFC 8032), so every node that has the token can issue itself a certificate, and no other can. The certificate
names the node's id and contains the node's own key, of which the id is a hash. It lives in memory only and is
issued again with every start. Both sides of a connection require one (TLS 1.3) and check in the handshake
that name and key belong together: a member can't impersonate another. The connecting side also checks that
it reached the intended node.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import ssl
import tempfile
import weakref
from collections.abc import Sequence
from typing import Any, ClassVar

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from sollold.cluster.net.node_key import NodeKey, id_of_key
from sollold.facts import dataclass

OPEN_TOKEN = hashlib.sha256(b"sollold: the well-known token of an open cluster").digest()
"""Publicly known: with it anyone on the LAN may join."""

JOIN = "sollold-join"
"""ALPN name for asking to be admitted, without a certificate."""
INVITED = "sollold-invited"
"""ALPN name for joining by an invitation code, without a certificate."""
STRANGERS = frozenset((JOIN, INVITED))
_SUFFIX = ".sollold"
_VALID_FROM = datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC)
_VALID_UNTIL = datetime.datetime(9999, 12, 31, 23, 59, 59, tzinfo=datetime.UTC)
"""Certificates live as long as the process; clocks on a LAN may be years wrong and must not matter."""
_NO_CHECK_TIME = ssl.VerifyFlags(0x200000)
"""X509_V_FLAG_NO_CHECK_TIME, which Python does not define. A machine without a battery may start in 1970."""


class BadToken(ValueError):
    """A token in the settings is not 64 hex digits."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """The cluster's tokens. ``accepted`` has the current one first.

    To change the token without interruption, every node first gets the new token as an old one (so that it is
    accepted), then as its current token with the former as an old one; then the former is dropped.
    """

    accepted: tuple[bytes, ...]

    @classmethod
    def read(cls, token: str, old_tokens: Sequence[str] = ()) -> Tokens:
        """Parse the settings: hex digits; ``open`` or an empty string means the well-known token.

        Raises:
            BadToken: a token is not 64 hex digits.
        """
        found = [_token(token)]
        found += [old for old in map(_token, old_tokens) if old not in found]
        return cls(tuple(dict.fromkeys(found)))

    @property
    def open(self) -> bool:
        """Whether anyone on the LAN can join."""
        return OPEN_TOKEN in self.accepted

    @property
    def cluster(self) -> str:
        """A short name of the cluster that reveals nothing about the token."""
        return self.clusters[0]

    @property
    def clusters(self) -> tuple[str, ...]:
        """Names for all accepted tokens: a cluster has two while its token changes."""
        return tuple(derive(token, b"cluster name", 4).hex() for token in self.accepted)


class _SSLObject(ssl.SSLObject):
    """Refuses, at the end of the handshake, a certificate whose name does not match its key.

    Attributes:
        peer_key: the public key that the other side has proved; empty for a stranger.
        refused: ids of nodes whose certificates are not accepted, whoever issued them.
    """

    peer_key = b""
    refused: ClassVar[set[str]] = set()

    def do_handshake(self) -> None:
        """Perform the handshake.

        Raises:
            ssl.SSLError: as usual, and if the other side's certificate is for another node's name, or
                that node was evicted.
        """
        super().do_handshake()
        self.peer_key = b""
        data = self.getpeercert(binary_form=True)
        joining = self.selected_alpn_protocol() in STRANGERS
        if data is None and joining:
            return  # a stranger who asks to be admitted
        certificate = x509.load_der_x509_certificate(data) if data else None
        key = certificate.public_key() if certificate is not None else None
        if not isinstance(key, Ed25519PublicKey) or certificate is None:
            raise ssl.SSLError(ssl.SSL_ERROR_SSL, "a member must present a certificate")
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        node = id_of_key(key.public_bytes_raw())
        if names.get_values_for_type(x509.DNSName) != [tls_name(node)]:
            raise ssl.SSLError(ssl.SSL_ERROR_SSL, "the certificate names another node")
        if node in self.refused and not joining:
            raise ssl.SSLError(ssl.SSL_ERROR_SSL, "this node was evicted from the cluster")
        self.peer_key = key.public_bytes_raw()


class Identity:
    """This node's key and certificate, and which peers it accepts.

    Attributes:
        key: the node's own key.
        node: the node's id.
        tokens: the cluster's tokens.
        refused: ids of evicted nodes; changes of this set also apply to existing contexts.
    """

    def __init__(self, key: NodeKey, tokens: Tokens) -> None:
        self.key = key
        self.node = key.node
        self.refused: set[str] = set()
        self._connection = type("_OwnSSLObject", (_SSLObject,), {"refused": self.refused})
        self.change_tokens(tokens)

    def server_context(self, protocols: Sequence[str]) -> ssl.SSLContext:
        """Return a context for listening; ``protocols`` are the supported ALPN names."""
        context = self._context(ssl.PROTOCOL_TLS_SERVER, protocols)
        if not STRANGERS.isdisjoint(protocols):
            # A stranger has no valid certificate; all protocols but these require one.
            context.verify_mode = ssl.CERT_OPTIONAL
        # A member proves itself with each connection: resumption would only add tickets to every handshake.
        context.num_tickets = 0
        return context

    def client_context(self, protocol: str, *, anyone: bool = False) -> ssl.SSLContext:
        """Return a context for connecting with ALPN ``protocol``; pass `tls_name` as ``server_hostname``.

        ``anyone``: accept any member, since it is unknown which node is there.
        """
        if protocol in STRANGERS:
            # The peer is in another cluster: the handshake proves its key, which is checked later.
            context = self._bare_context(ssl.PROTOCOL_TLS_CLIENT, [protocol])
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
            return context
        context = self._context(ssl.PROTOCOL_TLS_CLIENT, [protocol])
        context.check_hostname = not anyone
        return context

    def change_tokens(self, tokens: Tokens) -> None:
        """Switch to ``tokens``; existing contexts keep the former ones."""
        self.tokens = tokens
        certificate = _leaf(self.key, *_authority(tokens.accepted[0]))
        key = self.key.private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        self._chain = MemoryFile(certificate.public_bytes(Encoding.PEM) + key)
        self._trusted = "".join(
            _authority(token)[0].public_bytes(Encoding.PEM).decode() for token in tokens.accepted
        )

    def _context(self, kind: int, protocols: Sequence[str]) -> ssl.SSLContext:
        context = self._bare_context(kind, protocols)
        context.verify_mode = ssl.CERT_REQUIRED
        context.verify_flags |= _NO_CHECK_TIME
        context.load_verify_locations(cadata=self._trusted)
        context.load_cert_chain(self._chain.path)
        return context

    def _bare_context(self, kind: int, protocols: Sequence[str]) -> ssl.SSLContext:
        context = ssl.SSLContext(kind)
        context.sslobject_class = self._connection
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.set_alpn_protocols(list(protocols))
        return context


def tls_name(node: str) -> str:
    """Return a node's name in certificates. The suffix keeps an all-digit id from passing as an address."""
    return node + _SUFFIX


def peer_of(connection: Any) -> str:
    """Return the node id that the other side of a TLS connection has proved; empty if none.

    ``connection``: the ``ssl_object`` of a connection with one of the contexts made here.
    """
    key = peer_key_of(connection)
    return id_of_key(key) if key else ""


def peer_key_of(connection: Any) -> bytes:
    """Return the public key that the other side of a TLS connection has proved; empty if none."""
    return connection.peer_key if isinstance(connection, _SSLObject) else b""


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


def derive(token: bytes, purpose: bytes, length: int) -> bytes:
    """Derive ``length`` bytes for ``purpose``, independent of those for other purposes."""
    return HKDF(SHA256(), length, salt=None, info=b"sollold 1 " + purpose).derive(token)


def _authority(token: bytes) -> tuple[x509.Certificate, Ed25519PrivateKey]:
    """Return the token's certificate authority: every node computes the same one, byte for byte."""
    key = Ed25519PrivateKey.from_private_bytes(derive(token, b"certificate authority", 32))
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "sollold " + derive(token, b"name", 8).hex())])
    public = key.public_key()
    builder = (
        x509.CertificateBuilder(issuer_name=name, subject_name=name)
        .public_key(public)
        .serial_number(1)
        .not_valid_before(_VALID_FROM)
        .not_valid_after(_VALID_UNTIL)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )
    return builder.sign(key, None), key


def _leaf(node_key: NodeKey, authority: x509.Certificate, signer: Ed25519PrivateKey) -> x509.Certificate:
    node, public = node_key.node, node_key.private.public_key()
    builder = (
        x509.CertificateBuilder(
            issuer_name=authority.subject,
            subject_name=x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, node)]),
        )
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_VALID_FROM)
        .not_valid_after(_VALID_UNTIL)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage(signs_certificates=False), critical=True)
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
    return builder.sign(signer, None)


def usage(*, signs_certificates: bool) -> x509.KeyUsage:
    """Return the key usage extension: for signing certificates, or for proving an identity."""
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


class MemoryFile:
    """Bytes at a path, for OpenSSL, which reads keys from files only: in memory if on Linux."""

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
