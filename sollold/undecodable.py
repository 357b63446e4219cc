"""What decoding data of others may raise."""

from __future__ import annotations

import msgspec

UNDECODABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""Exceptions of msgspec's decoders for data of others, such as a file after a fault of the disk. A string
that is not UTF-8 has its own, which is no `msgspec.DecodeError`."""
