"""JSON Schema's string formats as patterns that llama.cpp can convert to grammars. Pure.

Only the usual form of each: an email address with quotes or an IPv6 address in a URI is never generated.
"""

from __future__ import annotations

from functools import lru_cache

from sollold.api.grammar.pattern import convertible_pattern
from sollold.api.grammar.pattern_match import matches, samples

NATIVE = {
    "date": (10, 10),
    "time": (9, 18),
    "date-time": (20, 29),
    "uuid": (36, 36),
    **{f"uuid{version}": (36, 36) for version in range(1, 6)},
}
"""llama.cpp's own formats → the minimum and maximum number of characters that it generates."""
OTHER_FORMATS = frozenset(("idn-email", "idn-hostname", "iri", "iri-reference", "uri-template", "regex"))
"""Standard formats that have no pattern here. Names that are not standard forbid nothing."""

_LABEL = "[A-Za-z0-9]([A-Za-z0-9-]{0,58}[A-Za-z0-9])?"
_LOCAL = "[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]{1,20}"
_OCTET = "(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_HEX = "[0-9A-Fa-f]{1,4}"
_IPV6 = "|".join(
    (
        f"({_HEX}:){{7}}{_HEX}",
        f"({_HEX}:){{1,7}}:",
        *(f"({_HEX}:){{1,{groups}}}(:{_HEX}){{1,{7 - groups}}}" for groups in range(6, 0, -1)),
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
_SUFFIX = rf"(\?{_REST})?(#{_REST})?"
_AUTHORITY = f"//[A-Za-z0-9._~-]*(:[0-9]{{1,5}})?(/{_PATH}*)*"
_ABSOLUTE = f"/({_PATH}+(/{_PATH}*)*)?"
_URI = f"[A-Za-z][A-Za-z0-9+.-]{{0,20}}:({_AUTHORITY}|{_ABSOLUTE}|{_PATH}+(/{_PATH}*)*){_SUFFIX}"
_RELATIVE = f"({_AUTHORITY}|{_ABSOLUTE}|{_NO_COLON}+(/{_PATH}*)*)?{_SUFFIX}"
_POINTER = "(/([^~/]|~[01])*)*"

_GENERATED = {
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
_DATE = "[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])"
_TIME = r"([01][0-9]|2[0-3]):[0-5][0-9](:([0-5][0-9]|60)(\.[0-9]+)?)?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
_UUID = "[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}"
FORMATS = {name: convertible_pattern(pattern) for name, pattern in _GENERATED.items()}
"""Format → its pattern, which generates no more characters than the standard allows."""

_NAME = "[A-Za-z0-9][A-Za-z0-9-]*"
_HOST = rf"{_NAME}(\.{_NAME})*"
_ACCEPTED = {
    # For checking, more is accepted than is generated: times without seconds, and longer strings.
    **_GENERATED,
    "date": f"^{_DATE}$",
    "time": f"^{_TIME}$",
    "date-time": f"^{_DATE}[Tt]{_TIME}$",
    "uuid": f"^{_UUID}$",
    **{f"uuid{version}": f"^{_UUID}$" for version in range(1, 6)},
    "email": rf"^{_LOCAL[:-6]}+(\.{_LOCAL[:-6]}+)*@{_HOST}$",
    "hostname": f"^{_HOST}$",
}
_CONVERTED = {name: convertible_pattern(pattern) for name, pattern in _ACCEPTED.items()}
_SAMPLE_COUNT = 48
_MAX_CHARACTERS = 1000


def has_format(text: str, name: str) -> bool | None:
    """Return True if a string has a format, or the format is unknown and so forbids nothing; else None."""
    if (pattern := _CONVERTED.get(name)) is not None:
        return True if matches(pattern, text) else None
    return None if name in OTHER_FORMATS else True


@lru_cache(maxsize=512)
def implies_format(pattern: str, name: str) -> bool:
    """Whether strings that match a converted pattern have a format, judging by many samples."""
    accepted = _CONVERTED.get(name)
    if accepted is None or len(pattern) > _MAX_CHARACTERS:
        return False
    found = samples(pattern, _SAMPLE_COUNT)
    return bool(found) and all(matches(accepted, text) for text in found)
