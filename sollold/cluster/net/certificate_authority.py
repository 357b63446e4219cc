"""The certificates that nodes show to people's programs, and the one authority behind all of a cluster's.

The authority follows from the cluster's secret as `sollold.cluster.net.identity` has it for the nodes among
themselves, by another derivation: whoever trusts its certificate trusts every node of the cluster, and none
that was evicted, since the secret is changed then. Its key is on the curve P-256, which browsers and all TLS
libraries know (FIPS 186-5, A.2.1: extra bits, so that the remainder is even).
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
_SINCE = datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC)
_UNTIL = datetime.datetime(2099, 12, 31, 23, 59, 59, tzinfo=datetime.UTC)
LIFE = datetime.timedelta(days=365)
"""Apple's systems take no certificate of more than 825 days."""
_LOCAL = (".local", ".lan", ".internal", ".home.arpa")
_DNS_NAME = re.compile(r"(?=.{1,253}$)(\*\.)?[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*")
_SLOW_CLOCKS = datetime.timedelta(days=30)


@dataclass(frozen=True, slots=True)
class Subject:
    """What a node is called by those who reach it: names, and IP addresses as text."""

    names: tuple[str, ...]
    addresses: tuple[str, ...]


def subject_of(name: str, addresses: Sequence[str], hosts: Sequence[str]) -> Subject:
    """What a node called ``name`` is reached by. ``hosts``: more names; ``*.example.com``: all below it."""
    names = [name, *(f"{name}{suffix}" for suffix in _LOCAL), "localhost", *hosts]
    return Subject(
        tuple(dict.fromkeys(one for one in (text.lower() for text in names) if _DNS_NAME.fullmatch(one))),
        tuple(dict.fromkeys((*(one.partition("%")[0] for one in addresses), "127.0.0.1", "::1"))),
    )


def authority_pem(secret: bytes) -> str:
    """The authority's certificate, the same on all nodes."""
    certificate, _ = _authority(secret)
    return certificate.public_bytes(Encoding.PEM).decode()


def issue(secret: bytes, subject: Subject, now: datetime.datetime) -> bytes:
    """A fresh key and its certificate for ``subject``, from a while ago until `LIFE` after ``now``; PEM."""
    authority, signer = _authority(secret)
    key = ec.generate_private_key(_CURVE)
    names: list[x509.GeneralName] = [x509.DNSName(name) for name in subject.names]
    names += [x509.IPAddress(ipaddress.ip_address(one)) for one in subject.addresses]
    builder = (
        _builder(authority.subject, _named("sollold node"), key.public_key(), now - _SLOW_CLOCKS, now + LIFE)
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
        _builder(name, name, key.public_key(), _SINCE, _UNTIL)
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
