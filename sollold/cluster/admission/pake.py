"""A key from a short code that both sides know and nobody else learns: SPAKE2, by the package ``spake2``.

Who listens learns nothing of the code, and who takes part has one guess. The public keys of both nodes are
the identities of the exchange (RFC 9382, section 3.3): whoever is in the middle, with a key of its own, gets
another key out of it than either side. Both sides then show that they have the same key, and what is secret
is sealed with it. Making and finishing a side take some hundredths of a second: call them off the loop.
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
    """What the other side sent does not belong to such an exchange, or was made with another code."""


def new_code() -> str:
    """Eight random digits, as people read them out: ``1234-5678``."""
    digits = f"{secrets.randbelow(10**_DIGITS):0{_DIGITS}}"
    return f"{digits[: _DIGITS // 2]}-{digits[_DIGITS // 2 :]}"


def plain_code(text: str) -> str:
    """The digits of a code as it was typed.

    Raises:
        ValueError: it is none.
    """
    digits = "".join(letter for letter in text if letter not in " -")
    if len(digits) != _DIGITS or not (digits.isascii() and digits.isdigit()):
        raise ValueError(f"a code has {_DIGITS} digits, such as 1234-5678")
    return digits


@dataclass(frozen=True, slots=True)
class Agreed:
    """What both sides have when both knew the code.

    Attributes:
        newcomer: shows the member that the newcomer has it; ``member`` the reverse.
    """

    newcomer: bytes
    member: bytes
    _sealing: bytes

    def seal(self, data: bytes) -> bytes:
        """``data`` for the other side alone. Once."""
        return ChaCha20Poly1305(self._sealing).encrypt(_NONCE, data, None)

    def unseal(self, sealed: bytes) -> bytes:
        """What the other side sealed.

        Raises:
            BadExchange: it was sealed with another key, or damaged.
        """
        try:
            return ChaCha20Poly1305(self._sealing).decrypt(_NONCE, sealed, None)
        except InvalidTag:
            raise BadExchange("it was sealed with another key") from None


class Side:
    """One side of an exchange.

    Args:
        code: as `plain_code` gives it.
        newcomer, member: the public keys of the two nodes.
        joins: this is the newcomer's side.

    Attributes:
        message: for the other side.
    """

    def __init__(self, code: str, newcomer: bytes, member: bytes, *, joins: bool) -> None:
        # Costs a tenth of a second that no other node has to pay.
        from spake2 import SPAKE2_A, SPAKE2_B

        self._exchange = (SPAKE2_A if joins else SPAKE2_B)(code.encode(), idA=newcomer, idB=member)
        self.message: bytes = self._exchange.start()

    def finish(self, message: bytes) -> Agreed:
        """What follows from the other side's message. Whether it knew the code shows by its proof alone.

        Raises:
            BadExchange: it is no message of the other side.
        """
        try:
            key: bytes = self._exchange.finish(message)
        except Exception as error:
            # The package raises errors of many kinds for points that are none.
            raise BadExchange(f"its message is not one of SPAKE2: {error}") from None
        derived = HKDF(SHA256(), 96, salt=None, info=b"sollold invitation 1").derive(key)
        return Agreed(derived[:32], derived[32:64], derived[64:])


def same(one: bytes, other: bytes) -> bool:
    """Whether two proofs are equal, in a time that does not depend on where they differ."""
    return hmac.compare_digest(one, other)
