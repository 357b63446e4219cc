"""JSON schema's formats of texts, as patterns that llama.cpp makes grammars of. Pure.

The usual spelling of each: an email address in quotes or an IPv6 address within a URI is never written.
"""

from __future__ import annotations

from sollold.api.grammar.pattern import convertible_pattern

NATIVE = {
    "date": (10, 10),
    "time": (9, 18),
    "date-time": (20, 29),
    "uuid": (36, 36),
    **{f"uuid{version}": (36, 36) for version in range(1, 6)},
}
"""Formats that llama.cpp knows by itself: the fewest and the most characters that it writes."""
OTHER_FORMATS = frozenset(("idn-email", "idn-hostname", "iri", "iri-reference", "uri-template", "regex"))
"""Formats of the standard that have no pattern here. A name that it does not know forbids nothing."""

_LABEL = "[A-Za-z0-9]([A-Za-z0-9-]{0,58}[A-Za-z0-9])?"
_LOCAL = "[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]{1,20}"
_OCTET = "(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_HEX = "[0-9A-Fa-f]{1,4}"
_IPV6 = "|".join(
    (
        f"({_HEX}:){{7}}{_HEX}",
        f"({_HEX}:){{1,7}}:",
        *(f"({_HEX}:){{1,{before}}}(:{_HEX}){{1,{7 - before}}}" for before in range(6, 0, -1)),
        f":(:{_HEX}){{1,7}}",
        "::",
    )
)
_COUNT = "[0-9]{1,9}"
_DAYS = f"({_COUNT}Y({_COUNT}M({_COUNT}D)?)?|{_COUNT}M({_COUNT}D)?|{_COUNT}D)"
_HOURS = f"T({_COUNT}H({_COUNT}M({_COUNT}S)?)?|{_COUNT}M({_COUNT}S)?|{_COUNT}S)"
_ESCAPED = "%[0-9A-Fa-f]{2}"
_PATH = f"([A-Za-z0-9._~!$&'()*+,;=:@-]|{_ESCAPED})"
_NO_COLON = f"([A-Za-z0-9._~!$&'()*+,;=@-]|{_ESCAPED})"
_REST = f"([A-Za-z0-9._~!$&'()*+,;=:@/?-]|{_ESCAPED})*"
_AFTER = rf"(\?{_REST})?(#{_REST})?"
_AUTHORITY = f"//[A-Za-z0-9._~-]*(:[0-9]{{1,5}})?(/{_PATH}*)*"
_FROM_ROOT = f"/({_PATH}+(/{_PATH}*)*)?"
_URI = f"[A-Za-z][A-Za-z0-9+.-]{{0,20}}:({_AUTHORITY}|{_FROM_ROOT}|{_PATH}+(/{_PATH}*)*){_AFTER}"
_RELATIVE = f"({_AUTHORITY}|{_FROM_ROOT}|{_NO_COLON}+(/{_PATH}*)*)?{_AFTER}"
_POINTER = "(/([^~/]|~[01])*)*"

_WRITTEN = {
    "email": rf"^{_LOCAL}(\.{_LOCAL}){{0,2}}@{_LABEL}(\.{_LABEL}){{0,2}}$",
    "hostname": rf"^{_LABEL}(\.{_LABEL}){{0,3}}$",
    "ipv4": rf"^{_OCTET}(\.{_OCTET}){{3}}$",
    "ipv6": f"^({_IPV6})$",
    "uri": f"^{_URI}$",
    "uri-reference": f"^({_URI}|{_RELATIVE})$",
    "duration": f"^P({_DAYS}({_HOURS})?|{_HOURS}|{_COUNT}W)$",
    "json-pointer": f"^{_POINTER}$",
    "relative-json-pointer": f"^(0|[1-9][0-9]{{0,8}})(#|{_POINTER})$",
}
FORMATS = {name: convertible_pattern(pattern) for name, pattern in _WRITTEN.items()}
"""What they write has at most as many characters as the standard lets it have."""
