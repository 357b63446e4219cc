"""Settings that a running daemon applies on reload."""

from __future__ import annotations

from sollold.settings.catalogue import catalogue

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
"""Settings that a reload applies at once; changes of others need a restart and are reported."""
