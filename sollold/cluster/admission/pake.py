"""Derives a key from a short code that only both sides know: SPAKE2, by the package ``spake2``.

An eavesdropper learns nothing about the code, and a participant has one guess. The public keys of both nodes
are the identities of the exchange (RFC 9382, section 3.3): a man in the middle, with its own key, gets
another key than either side. Both sides then prove that they have the same key, which seals the secret.
Creating and finishing a side take some hundredths of a second: call them off the loop.
"""

from __future__ import annotations

import hmac
import secrets

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from sollold.facts import dataclass

MESSAGE_BYTES = 33
PROOF_BYTES = 32
_DIGITS = 8
_NONCE = bytes(12)
"""Each key seals one message."""


class BadExchange(ValueError):
    """The other side's message is invalid, or was made with another code."""


def new_code() -> str:
    """Return eight random digits, formatted as ``1234-5678``."""
    digits = f"{secrets.randbelow(10**_DIGITS):0{_DIGITS}}"
    return f"{digits[: _DIGITS // 2]}-{digits[_DIGITS // 2 :]}"


def plain_code(text: str) -> str:
    """Return the digits of a code as typed.

    Raises:
        ValueError: it is not a code.
    """
    digits = "".join(letter for letter in text if letter not in " -")
    if len(digits) != _DIGITS or not (digits.isascii() and digits.isdigit()):
        raise ValueError(f"a code has {_DIGITS} digits, such as 1234-5678")
    return digits


@dataclass(frozen=True, slots=True)
class Agreed:
    """Result of an exchange if both sides knew the code.

    Attributes:
        newcomer: proves to the member that the newcomer has it; ``member``: the reverse.
    """

    newcomer: bytes
    member: bytes
    _sealing: bytes

    def seal(self, data: bytes) -> bytes:
        """Encrypt ``data`` for the other side. Call at most once."""
        return ChaCha20Poly1305(self._sealing).encrypt(_NONCE, data, None)

    def unseal(self, sealed: bytes) -> bytes:
        """Decrypt the other side's message.

        Raises:
            BadExchange: it was sealed with another key, or is corrupt.
        """
        try:
            return ChaCha20Poly1305(self._sealing).decrypt(_NONCE, sealed, None)
        except InvalidTag:
            raise BadExchange("it was sealed with another key") from None


class Side:
    """One side of an exchange.

    Args:
        code: as returned by `plain_code`.
        newcomer, member: public keys of the two nodes.
        joins: this is the newcomer's side.

    Attributes:
        message: message for the other side.
    """

    def __init__(self, code: str, newcomer: bytes, member: bytes, *, joins: bool) -> None:
        # Imported here: it takes a tenth of a second, which other nodes need not spend.
        from spake2 import SPAKE2_A, SPAKE2_B

        self._exchange = (SPAKE2_A if joins else SPAKE2_B)(code.encode(), idA=newcomer, idB=member)
        self.message: bytes = self._exchange.start()

    def finish(self, message: bytes) -> Agreed:
        """Process the other side's message. Only its proof shows whether it knew the code.

        Raises:
            BadExchange: the message is invalid.
        """
        try:
            key: bytes = self._exchange.finish(message)
        except Exception as error:
            # The package raises various exceptions for invalid points.
            raise BadExchange(f"its message is not valid in SPAKE2: {error}") from None
        derived = HKDF(SHA256(), 96, salt=None, info=b"sollold invitation 1").derive(key)
        return Agreed(derived[:32], derived[32:64], derived[64:])


def same(first: bytes, second: bytes) -> bool:
    """Whether two proofs are equal, compared in constant time."""
    return hmac.compare_digest(first, second)
