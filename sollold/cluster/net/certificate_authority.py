"""Certificates that nodes present to HTTPS clients, and the certificate authority of a cluster.

The authority is derived from the cluster's secret, like the one that `sollold.cluster.net.identity` uses
between nodes, but by another derivation. A client that trusts its certificate trusts every node of the
cluster, but no evicted one, since eviction changes the secret. Its key is on the curve P-256, which browsers
and all TLS libraries support (FIPS 186-5, A.2.1: extra bits, so that the remainder is evenly distributed).
"""

from __future__ import annotations

import datetime
import ipaddress
import re
from collections.abc import Sequence

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from sollold.cluster.net.identity import derive, usage
from sollold.facts import dataclass

_CURVE = ec.SECP256R1()
_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
_VALID_FROM = datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC)
_VALID_UNTIL = datetime.datetime(2099, 12, 31, 23, 59, 59, tzinfo=datetime.UTC)
LIFE = datetime.timedelta(days=365)
"""Validity of a node's certificate. Apple's systems accept at most 825 days."""
_LOCAL_SUFFIXES = (".local", ".lan", ".internal", ".home.arpa")
_DNS_NAME = re.compile(r"(?=.{1,253}$)(\*\.)?[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*")
_CLOCK_MARGIN = datetime.timedelta(days=30)


@dataclass(frozen=True, slots=True)
class Subject:
    """Names and IP addresses (as strings) by which clients reach a node."""

    names: tuple[str, ...]
    addresses: tuple[str, ...]


def subject_of(name: str, addresses: Sequence[str], hosts: Sequence[str]) -> Subject:
    """Return the subject of a node. ``hosts``: additional names, including wildcards as ``*.example.com``."""
    names = [name, *(f"{name}{suffix}" for suffix in _LOCAL_SUFFIXES), "localhost", *hosts]
    return Subject(
        tuple(dict.fromkeys(host for host in (text.lower() for text in names) if _DNS_NAME.fullmatch(host))),
        tuple(dict.fromkeys((*(ip.partition("%")[0] for ip in addresses), "127.0.0.1", "::1"))),
    )


def authority_pem(secret: bytes) -> str:
    """Return the authority's certificate as PEM, the same on all nodes."""
    certificate, _ = _authority(secret)
    return certificate.public_bytes(Encoding.PEM).decode()


def issue(secret: bytes, subject: Subject, now: datetime.datetime) -> bytes:
    """Return a new key and its certificate, as PEM, valid from 30 days before ``now`` until `LIFE` after."""
    authority, signer = _authority(secret)
    key = ec.generate_private_key(_CURVE)
    names: list[x509.GeneralName] = [x509.DNSName(name) for name in subject.names]
    names += [x509.IPAddress(ipaddress.ip_address(address)) for address in subject.addresses]
    builder = (
        _builder(authority.subject, _named("sollold node"), key.public_key(), now - _CLOCK_MARGIN, now + LIFE)
        .serial_number(x509.random_serial_number())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
        )
    )
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return builder.sign(signer, SHA256()).public_bytes(Encoding.PEM) + private


def _authority(secret: bytes) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    number = int.from_bytes(derive(secret, b"people's certificate authority", 48)) % (_ORDER - 1) + 1
    key = ec.derive_private_key(number, _CURVE)
    name = _named(f"sollold cluster {derive(secret, b'cluster name', 4).hex()}")
    builder = (
        _builder(name, name, key.public_key(), _VALID_FROM, _VALID_UNTIL)
        .serial_number(1)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    # Deterministic (RFC 6979): every node computes the same certificate, byte for byte.
    return builder.sign(key, SHA256(), ecdsa_deterministic=True), key


def _builder(
    issuer: x509.Name,
    subject: x509.Name,
    key: ec.EllipticCurvePublicKey,
    since: datetime.datetime,
    until: datetime.datetime,
) -> x509.CertificateBuilder:
    return x509.CertificateBuilder(
        issuer_name=issuer,
        subject_name=subject,
        public_key=key,
        not_valid_before=since,
        not_valid_after=until,
    )


def _named(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])
