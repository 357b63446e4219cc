"""Which settings a running daemon takes over when it is told to read them again."""

from __future__ import annotations

from sollold.settings.load import catalogue

LIVE_KEYS = frozenset(
    {
        "http.auth",
        "http.cors_origins",
        "http.hosts",
        "http.trusted_proxies",
        "http.wait_limit",
        "log.level",
        "log.requests",
        "models.aliases",
        "models.folders",
        "models.huggingface",
        "models.ollama_stores",
        "models.transfer_rate",
        "serving.drain_limit",
        "serving.recover_limit",
        "serving.stall",
    }
    | {key for key in catalogue() if key.startswith("placement.")}
)
"""Settings that a reload changes at once; the others need a restart and are named."""
