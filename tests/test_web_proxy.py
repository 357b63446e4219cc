"""Selection of the proxy for a URL from the environment."""

from __future__ import annotations

import pytest

from sollold.web_proxy import BadProxy, excepted, proxy_for

HUB = "https://huggingface.co/a/b"


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        ({"HTTPS_PROXY": "http://proxy:3128"}, "http://proxy:3128"),
        ({"https_proxy": "proxy:3128"}, "http://proxy:3128"),
        ({"https_proxy": "http://a:1", "HTTPS_PROXY": "http://b:2"}, "http://a:1"),
        ({"https_proxy": "", "HTTPS_PROXY": "http://b:2"}, None),
        ({"HTTP_PROXY": "http://proxy:3128"}, None),
        ({"HTTPS_PROXY": " https://proxy "}, "https://proxy"),
        ({"HTTPS_PROXY": "http://proxy:3128", "NO_PROXY": "example.com"}, "http://proxy:3128"),
        ({"HTTPS_PROXY": "http://proxy:3128", "no_proxy": "huggingface.co"}, None),
        ({"HTTPS_PROXY": "http://proxy:3128", "NO_PROXY": "*"}, None),
    ],
)
def test_the_proxy_of_an_https_url(environ: dict[str, str], expected: str | None) -> None:
    found = proxy_for(HUB, environ)
    assert (found and found.url) == expected


@pytest.mark.parametrize(
    "host", ["localhost", "127.0.0.1", "127.9.9.9:80", "[::1]:11434", "a.localhost", "0.0.0.0"]
)
def test_loopback_urls_never_use_a_proxy(host: str) -> None:
    proxies = {"HTTP_PROXY": "http://proxy:3128", "HTTPS_PROXY": "http://proxy:3128"}
    assert proxy_for(f"http://{host}/x", proxies) is None
    assert proxy_for(f"https://{host}/x", proxies) is None
    assert proxy_for("http://example.com/x", proxies) is not None


@pytest.mark.parametrize(
    ("host", "rules", "expected"),
    [
        ("example.com", "example.com", True),
        ("hub.example.com", "example.com", True),
        ("hub.example.com", ".example.com", True),
        ("hub.example.com", "*.example.com", True),
        ("badexample.com", "example.com", False),
        ("EXAMPLE.com", "a, Example.COM ,b", True),
        ("example.com", "a b example.com", True),
        ("example.com", "example.com:443", True),
        ("example.com", "example.com:8443", False),
        ("10.1.2.3", "10.0.0.0/8", True),
        ("11.1.2.3", "10.0.0.0/8", False),
        ("10.1.2.3", "10.1.2.3:443", True),
        ("fd00::5", "[fd00::5]:443", True),
        ("fd00::5", "fd00::/8", True),
        ("example.com", "", False),
        ("example.com", ", .", False),
    ],
)
def test_no_proxy_rules(host: str, rules: str, expected: bool) -> None:
    assert excepted(host, 443, rules) is expected


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("socks5://proxy:1080", "HTTPS_PROXY names a socks5 proxy"),
        ("http://", "HTTPS_PROXY is not a proxy's URL"),
        ("http://proxy:none", "HTTPS_PROXY is not a proxy's URL"),
    ],
)
def test_unusable_proxies_are_refused(value: str, words: str) -> None:
    with pytest.raises(BadProxy, match=words):
        proxy_for(HUB, {"HTTPS_PROXY": value})


def test_the_password_of_a_proxy_is_not_shown() -> None:
    proxy = proxy_for(HUB, {"HTTPS_PROXY": "http://anna:s3cret@proxy:3128"})
    assert str(proxy) == "http://proxy:3128 (HTTPS_PROXY)"
