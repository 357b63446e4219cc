"""Hostile variations of a request: body text, headers, framing, path and method."""

from __future__ import annotations

import gzip
import random
import zlib
from collections.abc import Callable

# --- body text


def truncated(random: random.Random, text: bytes) -> bytes:
    return text[: random.randrange(len(text) + 1)]


def flipped(random: random.Random, text: bytes) -> bytes:
    data = bytearray(text)
    for _ in range(random.choice((1, 3, 30))):
        data[random.randrange(len(data))] = random.randrange(256)
    return bytes(data)


def invalid_utf8(random: random.Random, text: bytes) -> bytes:
    position = random.randrange(len(text))
    return (
        text[:position]
        + random.choice((b"\xff\xfe", b"\xc0\x80", b"\xed\xa0\x80", b"\xf8\x88", b"\x80" * 3000))
        + text[position:]
    )


def other_encoding(random: random.Random, text: bytes) -> bytes:
    return text.decode().encode(
        random.choice(("utf-16", "utf-16-le", "utf-32", "utf-7", "cp037", "utf-8-sig"))
    )


def nested(random: random.Random, text: bytes) -> bytes:
    return random.choice((b"[", b'{"a":', b'{"model":[', b'{"messages":[{"content":')) * random.choice(
        (500, 20_000, 300_000)
    )


def duplicate_keys(random: random.Random, text: bytes) -> bytes:
    return b'{"model":1,"model":null,' + b'"stream":true,' * random.choice((1, 5000)) + text[1:]


def garbage(random: random.Random, text: bytes) -> bytes:
    return random.randbytes(random.choice((1, 100, 5000, 300_000)))


def not_json(random: random.Random, text: bytes) -> bytes:
    return random.choice(
        (b"", b" ", b"null", b"1", b'"a"', b"[]", b"NaN", b"model=x&stream=true", b"--x\r\n\r\na\r\n--x--",
        b"{'a':1}",
         b"{,}", b"{}" + text, text + b"x", text + b"\0", b"// c\n" + text, text * 2,
         b"<?xml version='1.0'?><a/>")
    )  # fmt: skip


def many_escapes(random: random.Random, text: bytes) -> bytes:
    return (
        b'{"prompt":"' + random.choice((b"\\ud800", b"\\u0000", b"\\\\", b'\\"')) * 90_000 + b'",' + text[1:]
    )


def many_numbers(random: random.Random, text: bytes) -> bytes:
    return b'{"context":[' + b"1e5," * 60_000 + b"9" * 50_000 + b"]," + text[1:]


def many_objects(random: random.Random, text: bytes) -> bytes:
    return (
        b'{"messages":['
        + random.choice((b"{},", b"[],", b'{"role":"user","content":[{}]},', b'"",')) * 40_000
        + b"{}],"
        + text[1:]
    )


def larger(random: random.Random, text: bytes) -> bytes:
    return b'{"prompt":"' + b"x" * random.choice((2 << 20, 9 << 20)) + b'",' + text[1:]


TEXTS: tuple[Callable[[random.Random, bytes], bytes], ...] = (
    truncated, flipped, flipped, invalid_utf8, other_encoding, nested, duplicate_keys, garbage, not_json,
    not_json,
    many_escapes, many_numbers, many_objects, larger,
)  # fmt: skip

# --- headers

HEADERS = (
    "Content-Type: text/plain\r\n",
    "Content-Type: application/x-www-form-urlencoded\r\n",
    "Content-Type: multipart/form-data; boundary=x\r\n",
    "Content-Type: application/json; charset=utf-16\r\n",
    "Content-Type: application/json; charset=nothing\r\n",
    "Content-Type: " + "a/" * 5000 + "\r\n",
    "Content-Type: \r\n",
    "Content-Type: image/png\r\n",
    "X-A: " + "a" * 60_000 + "\r\n",
    "X-A: " + "a" * 70_000 + "\r\n",
    "".join(f"X-{number}: {number}\r\n" for number in range(500)),
    "".join(f"X-{number}: {number}\r\n" for number in range(9000)),
    "Cookie: " + "a=b; " * 9000 + "\r\n",
    "Host: evil.example\r\n",
    "Host: \r\n",
    "Host: a:b:c\r\n",
    "Host: [::1\r\n",
    "Host: localhost:99999999999999\r\n",
    "Host: " + "a" * 20_000 + "\r\n",
    "Host: localhost\r\nHost: evil.example\r\n",
    "Host: xn--\udcff\udcfe\r\n",
    "Origin: http://evil.example\r\n",
    "Origin: null\r\n",
    "Origin: " + "x" * 9000 + "\r\n",
    "Origin: http://[::\r\n",
    "Sec-Fetch-Site: cross-site\r\n",
    "Origin: http://localhost:3000\r\nAccess-Control-Request-Method: \x01\r\n",
    "Authorization: Bearer\r\n",
    "Authorization: Basic ====\r\n",
    "Authorization: Bearer " + "a" * 30_000 + "\r\n",
    "Authorization: Bearer \udcff\udcfe\r\nX-Api-Key: \udc80\r\n",
    "X-Api-Key: sk-sollold-" + "0" * 64 + "\r\n",
    "X-Forwarded-For: 127.0.0.1\r\nX-Real-IP: 127.0.0.1\r\nForwarded: for=127.0.0.1\r\n",
    "X-Forwarded-For: " + "1.2.3.4, " * 6000 + "\r\n",
    "X-Request-Id: " + "x" * 10_000 + "\r\n",
    "X-Request-Id: a\x1b[2J\x7f\r\n",
    "X-Sollold-Priority: high\r\nX-Sollold-Deadline: soon\r\n",
    "X-Priority: 99999999999999999999\r\n",
    "X-Sollold-Priority: -1\r\nX-Sollold-Deadline: -1\r\n",
    "X-Sollold-Deadline: 1e400\r\n",
    "X-Sollold-Deadline: 0.001\r\n",
    "anthropic-version: \udcff\r\nanthropic-beta: " + "x," * 5000 + "\r\n",
    "Range: bytes=0-0,1-1,5-\r\nIf-Range: x\r\n",
    "If-None-Match: *\r\nIf-Modified-Since: yesterday\r\n",
    "Accept: " + "*/*;q=0.1," * 5000 + "\r\n",
    "Accept-Encoding: gzip;q=nan, br, *;q=-1\r\n",
    "Expect: 100-continue\r\n",
    "Expect: the-unexpected\r\n",
    "Upgrade: websocket\r\nSec-WebSocket-Key: x\r\n",
    "Upgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n",
    "Connection: upgrade, close, keep-alive, host\r\n",
    "Trailer: Content-Length\r\nTE: trailers\r\n",
    "Max-Forwards: 0\r\nVia: " + "1.1 a," * 3000 + "\r\n",
)


def _bomb(text: bytes) -> bytes:
    packer = zlib.compressobj(9, wbits=31)
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(64)) + packer.flush()


CONTENTS: tuple[tuple[str, Callable[[bytes], bytes]], ...] = (
    *((("", bytes),) * 12),
    ("gzip", gzip.compress),
    ("gzip", bytes),
    ("gzip", lambda text: gzip.compress(text)[:-9]),
    ("gzip", _bomb),
    ("deflate", zlib.compress),
    ("br", bytes),
    ("zstd", bytes),
    ("gzip, gzip", lambda text: gzip.compress(gzip.compress(text))),
    ("nothing", bytes),
)
"""Content encodings and the functions that produce them."""

# --- framing

Frame = Callable[[random.Random, str, str, bytes], bytes]


def _head(method: str, path: str, lines: str, version: str = "HTTP/1.1", end: str = "\r\n") -> bytes:
    host = f"Host: localhost{end}Content-Type: application/json{end}"
    return f"{method} {path} {version}{end}{host}{lines}{end}".encode()


def odd_length(random: random.Random, method: str, path: str, body: bytes) -> bytes:
    length = random.choice(
        ("-1", "+5", "0x10", "1e2", "", " ", "99999999999999999999", "5, 5", "5;q", "\u0665", "00005")
    )
    return _head(method, path, f"Content-Length: {length}\r\n") + body


def conflicting_lengths(random: random.Random, method: str, path: str, body: bytes) -> bytes:
    return _head(method, path, f"Content-Length: {len(body)}\r\nContent-Length: {len(body) - 1}\r\n") + body


def length_and_chunks(random: random.Random, method: str, path: str, body: bytes) -> bytes:
    lines = f"Content-Length: {len(body)}\r\nTransfer-Encoding: chunked\r\n"
    return _head(method, path, lines) + b"0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n"


def too_long(random: random.Random, method: str, path: str, body: bytes) -> bytes:
    return _head(method, path, f"Content-Length: {len(body) + random.choice((1, 10**6, 10**9))}\r\n") + body


def too_short(random: random.Random, method: str, path: str, body: bytes) -> bytes:
    return _head(method, path, f"Content-Length: {len(body) // 2}\r\n") + body


def odd_encoding(random: random.Random, method: str, path: str, body: bytes) -> bytes:
    name = random.choice(
        ("chunked, chunked", "gzip, chunked", "identity", "xchunked", "chunked;a=b", "\x0bchunked", "CHUNKED")
    )
    return _head(method, path, f"Transfer-Encoding: {name}\r\n") + b"%x\r\n%s\r\n0\r\n\r\n" % (
        len(body),
        body,
    )


def odd_chunks(random: random.Random, method: str, path: str, body: bytes) -> bytes:
    size = b"%x" % len(body)
    chunks = random.choice(
        (b"0x" + size + b"\r\n" + body, b"-1\r\n" + body, b"f" * 17 + b"\r\n" + body,
        b" " + size + b" \r\n" + body,
         size + b";" + b"a=b;" * 9000 + b"\r\n" + body, size + b"\n" + body + b"\n0\n\n",
         size + b"\r\n" + body + b"xx",
         b"", b"\r\n", b"zz\r\n", size + b"\r\n" + body[:5],
         size + b"\r\n" + body + b"\r\n0\r\n" + b"T: x\r\n" * 5000)
    )  # fmt: skip
    return _head(method, path, "Transfer-Encoding: chunked\r\n") + chunks + b"\r\n0\r\n\r\n"


def chunks_of_one(random: random.Random, method: str, path: str, body: bytes) -> bytes:
    chunks = b"".join(b"1\r\n%c\r\n" % value for value in body + b" " * 30_000)
    return _head(method, path, "Transfer-Encoding: chunked\r\n") + chunks + b"0\r\n\r\n"


def odd_version(random: random.Random, method: str, path: str, body: bytes) -> bytes:
    version = random.choice(
        ("HTTP/1.0", "HTTP/0.9", "HTTP/2.0", "HTTP/9.9", "HTTP/1.11", "http/1.1", "HTTPS/1.1", "", "ICY")
    )
    return _head(method, path, f"Content-Length: {len(body)}\r\n", version) + body


def bare_feeds(random: random.Random, method: str, path: str, body: bytes) -> bytes:
    return _head(method, path, f"Content-Length: {len(body)}\n", end="\n") + body


def odd_lines(random: random.Random, method: str, path: str, body: bytes) -> bytes:
    line = random.choice(
        ("X-A: a\r\n b\r\n\tc\r\n", "X-A : a\r\n", "X-A\r\n", ": a\r\n", "X A: a\r\n", "X-A: \0\r\n",
        "X-A: a\rb\r\n", "\r\n",
         "X-A: \x7f\x01\r\n", " X-A: a\r\n", "X-\u00e9: a\r\n", "@: a\r\n", "X-A:" + "\t" * 9000 + "\r\n")
    )  # fmt: skip
    return _head(method, path, f"{line}Content-Length: {len(body)}\r\n") + body


def odd_start(random: random.Random, method: str, path: str, body: bytes) -> bytes:
    return random.choice(
        (b"\r\n\r\n\r\n", b"\n" * 3000, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b" ",
         b"GET\r\n\r\n", b"GET  /  HTTP/1.1\r\n\r\n", b"\0" * 100, b"GET / HTTP/1.1 x\r\n\r\n",
         b"* * *\r\n\r\n")
    ) + _head(method, path, "Content-Length: 0\r\n")  # fmt: skip


def pipelined(random: random.Random, method: str, path: str, body: bytes) -> bytes:
    single = _head(method, path, f"Content-Length: {len(body)}\r\n") + body
    return single * random.choice((2, 10)) + _head("GET", "/api/version", "") * random.choice((1, 100))


def cut(random: random.Random, method: str, path: str, body: bytes) -> bytes:
    whole = _head(method, path, f"Content-Length: {len(body)}\r\n") + body
    return whole[: random.randrange(len(whole))]


FRAMES: tuple[Frame, ...] = (
    odd_length, conflicting_lengths, length_and_chunks, too_long, too_short, odd_encoding, odd_chunks,
    chunks_of_one,
    odd_version, bare_feeds, odd_lines, odd_start, pipelined, cut,
)  # fmt: skip

# --- paths and methods

NAMES = (
    "x", "..", "%2e%2e%2f%2e%2e%2fetc%2fpasswd", "%00", "%ff%fe", "%", "%zz", "a" * 5000, "%F0%9F%92%A9",
    "count", "a;b=c",
    "resp_" + "0" * 32, "sha256:" + "0" * 64, "sha256-zz", "app.js", "-1", "99999999999999999999",
    "%0d%0aX:y", "a%2fb",
)  # fmt: skip
"""Values for the names in paths."""

PATHS: tuple[Callable[[random.Random, str], str], ...] = (
    lambda random, path: path + "/",
    lambda random, path: path.replace("/", "//"),
    lambda random, path: "/" * 3000 + path,
    lambda random, path: path + "?" + "a=b&" * 5000,
    lambda random, path: path + random.choice(("?", "?x", "?limit=-1", "?limit=1e9", "?limit=%00",
    "?since=nan", "?a[]=1", "?limit=9" + "9" * 400)),
    lambda random, path: path + "#fragment",
    lambda random, path: path + random.choice(("%00", "%2f", "%", "%zz", "%ff", "%0d%0a", ";x", "%20", "\\",
    "%c0%af")),
    lambda random, path: path + "/.." * 20,
    lambda random, path: "/web/../" + path,
    lambda random, path: "/./" + path,
    lambda random, path: path.upper(),
    lambda random, path: path.replace("a", "%61").replace("/", "%2F"),
    lambda random, path: "http://localhost" + path,
    lambda random, path: "http://evil.example:1" + path,
    lambda random, path: "http://[::" + path,
    lambda random, path: "http://localhost:99999" + path,
    lambda random, path: path.lstrip("/"),
    lambda random, path: "*",
    lambda random, path: "localhost:80",
    lambda random, path: "/" + "x" * 60_000,
    lambda random, path: "/v1" + path,
    lambda random, path: "/api/unknown",
)  # fmt: skip

METHODS = (
    "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE", "TRACE", "CONNECT", "PROPFIND", "get", "G\u00cbT",
    "A" * 5000, "M-SEARCH",
    "PURGE", "GET,POST", "QUERY", "_", "POST", "GET",
)  # fmt: skip
