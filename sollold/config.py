"""Floor 0: the settings, as facts. One class a section of ``sollold.toml``; every field has its default.

How they are read and checked, and where each value came from, is in `sollold.settings`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from msgspec import Meta

MIB = 1024 * 1024
GIB = 1024 * MIB

Bytes = Annotated[int, Meta(ge=0, le=2**62, title="bytes")]
"""Written as a number of bytes or with a unit: ``"20 GiB"``, ``"400 MB"``."""
Seconds = Annotated[float, Meta(title="seconds")]
"""Written as a number of seconds or with a unit: ``"5m"``, ``"1h30m"``."""
Limit = Annotated[float, Meta(ge=0, le=1e8, title="seconds")]
"""`Seconds` that somebody is made to wait at the most: never negative, never for ever."""
Token = Annotated[
    str,
    Meta(
        pattern=r"^\s*([0-9a-fA-F]{64}|open|)\s*$",
        description="64 hex digits, as `sollold token` makes them, or open",
    ),
]
SeedText = Annotated[
    str,
    Meta(
        pattern=r"^\s*(\[[0-9a-fA-F:.%\w]+\](:\d{1,5})?|[^\s:\[\]]+(:\d{1,5})?|[0-9a-fA-F:.%\w]+)\s*$",
        description="host, host:port or [IPv6]:port",
    ),
]
Port = Annotated[int, Meta(ge=0, le=65535, title="port")]
"""0 takes a free one."""
Count = Annotated[int, Meta(ge=0, title="count")]
MOST_SLOTS = 64
"""Requests at a time that one deployment can be loaded for."""
KvType = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"]


@dataclass(frozen=True, slots=True)
class NodeSettings:
    """``[node]``: this machine."""

    name: str = ""
    """Shown to people; empty: the host name."""
    state_dir: str = ""
    """Identity, journal, logs; empty: ``$STATE_DIRECTORY`` or ``~/.local/state/sollold``."""
    cache_dir: str = ""
    """llama.cpp, workers' tensors; empty: ``$CACHE_DIRECTORY`` or ``~/.cache/sollold``."""
    memory_limit: Bytes = 0
    """Most bytes that may be granted over all devices; 0: no limit but the devices' own."""
    device_limits: dict[str, Bytes] = field(default_factory=dict)
    """Most bytes per device (``CUDA0 = "20 GiB"``)."""
    reserve: Bytes = 512 * MIB
    """Bytes of RAM left to the rest of the machine, whoever asks."""
    gpu_reserve: Bytes = 256 * MIB
    """Bytes of every GPU left to the rest of the machine."""
    devices: tuple[str, ...] = ()
    """Devices that may be used; empty: GPUs, and the processor too."""


@dataclass(frozen=True, slots=True)
class HttpSettings:
    """``[http]``: the port for people."""

    host: str = "0.0.0.0"
    """Address to listen on; ``127.0.0.1`` keeps the API to this machine."""
    port: Port = 11435
    """Where Ollama's, OpenAI's and Anthropic's clients and browsers connect."""
    cors_origins: tuple[str, ...] = (
        "http://localhost",
        "https://localhost",
        "http://127.0.0.1",
        "https://127.0.0.1",
        "app://*",
        "file://*",
        "tauri://*",
        "vscode-webview://*",
        "vscode-file://*",
    )
    """Pages that may call the API from a browser, or from a program that is built like one (``app://*``: all
    of that scheme); ``"*"``: all. A page of a node's own is always allowed."""
    wait_limit: Limit = 600.0
    """Seconds that a caller waits for a model to load before 503."""


@dataclass(frozen=True, slots=True)
class ClusterSettings:
    """``[cluster]``: finding the others."""

    token: Token = ""
    """The cluster's secret, 64 hex digits; empty: the well-known one of an open cluster."""
    old_tokens: tuple[Token, ...] = ()
    """Accepted besides ``token`` while it is being changed."""
    host: str = "::"
    """Address to listen on for other nodes; ``::``: all of both families, ``0.0.0.0``: of IPv4 alone."""
    port: Port = 11436
    """UDP for gossip and TCP (TLS) for everything else between nodes; the same on all is best."""
    seeds: tuple[SeedText, ...] = ()
    """``host:port`` of nodes to join without multicast."""
    mdns: bool = True
    """Find nodes by multicast DNS. Seeds and remembered peers work without it."""
    interfaces: tuple[str, ...] = ()
    """Names of the interfaces for mDNS; empty: chosen, physical ones first."""


@dataclass(frozen=True, slots=True)
class LlamaSettings:
    """``[llama]``: llama.cpp."""

    server: str = ""
    """Path of ``llama-server``; empty: found, or built."""
    rpc_server: str = ""
    """Path of ``ggml-rpc-server``, of the same build."""
    build: bool = True
    """Build the pinned version when none is found."""
    jobs: Count = 0
    """Compilers at a time; 0: one a core."""
    worker_port: Port = 50052
    """First port tried for workers, on loopback."""
    server_port: Port = 18080
    """First port tried for ``llama-server``, on loopback."""
    threads: Count = 0
    """Threads of each engine; 0: one a physical core."""
    worker_cache: bool = True
    """Workers keep tensors on disk, so that a second load is quick."""
    worker_cache_limit: Bytes = 64 * GIB
    """Most bytes of that cache; what was used longest ago goes first."""
    rpc_backends: tuple[str, ...] = ()
    """``host:port`` of llama.cpp RPC workers that others started; the variable RPC_BACKENDS sets it too."""
    allow_plain_workers: bool = False
    """Use them. They know no password and no encryption: whoever is on the network can read and change what
    is computed there."""
    extra_args: tuple[str, ...] = ()
    """Added to every ``llama-server`` command line."""


@dataclass(frozen=True, slots=True)
class ModelProfile:
    """What is known of a model whose file is not here yet. All of it may be left out."""

    parameters: Annotated[float, Meta(ge=0)] = 0.0
    """In billions."""
    memory: Bytes = 0
    """That it takes with its context; 0: guessed from the parameters."""
    requires_distributed: bool = False
    """Spread it over machines even where it would fit one."""


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """``[models]``: where models are."""

    folders: tuple[str, ...] = ()
    """Folders with GGUF files; read, never written."""
    ollama_stores: tuple[str, ...] = ()
    """Roots of Ollama stores; empty: where Ollama puts them. A managed Ollama uses the first."""
    huggingface: bool = True
    """Look into the Hugging Face cache and llama.cpp's older one."""
    aliases: dict[str, str] = field(default_factory=dict)
    """Names of your own (``gpt-4o = "llama3.1:70b"``)."""
    profiles: dict[str, ModelProfile] = field(default_factory=dict)
    """What is known of models that no node has yet: [models.profiles."llama3.1:405b"] with parameters (in
    billions), memory and requires_distributed. For plans until there is a file, which then says it itself."""
    download_dir: str = ""
    """Where fetched models go; empty: ``<state_dir>/models``. The service may write to its own folders alone:
    for another one give it ``ReadWritePaths=`` with ``systemctl edit sollold``."""
    fetch_seconds: Limit = 300.0
    """Longest that the machine best for a model may take to fetch its file from another before the model is
    loaded; 0: models run only where their files are already, and nothing is fetched unasked."""
    transfer_rate: Bytes = 0
    """Bytes per second for transfers between nodes; 0: no limit."""


@dataclass(frozen=True, slots=True)
class PlacementSettings:
    """``[placement]``: how layers are placed."""

    policy: Literal["fastest", "memory_aware", "even", "spread"] = "fastest"
    """``fastest``: least time a token; ``memory_aware``: by memory; ``even``: alike; ``spread``: on all."""
    context: Count = 8192
    """Tokens a slot, when the caller names none and memory allows."""
    slots: Annotated[int, Meta(ge=1, le=MOST_SLOTS)] = 4
    """Requests at a time a model, fewer where memory is short."""
    type_k: KvType = "f16"
    """KV cache of keys; ``q8_0`` halves it."""
    type_v: KvType = "f16"
    """KV cache of values."""
    ubatch: Annotated[int, Meta(ge=1)] = 512
    """Tokens of a prompt computed at a time."""
    keep_alive: Seconds = 300.0
    """Seconds of idleness before a model is unloaded; negative: never."""
    spare: Annotated[float, Meta(ge=0, le=0.5)] = 0.02
    """Share of each device's memory that plans leave unused."""
    max_workers: Annotated[int, Meta(ge=1, le=15)] = 15
    """Most machines besides the head that one model is spread over."""
    enable_distributed: bool = True
    """Spread models over machines; false: only run what fits one."""
    distributed_threshold: float = 0.0
    """Parameters in billions from which a model is sharded even if it fits one machine; 0: never."""


@dataclass(frozen=True, slots=True)
class OllamaSettings:
    """``[ollama]``: the Ollama on this machine."""

    enabled: bool = True
    """Use an Ollama that runs on this machine."""
    url: str = ""
    """Empty: ``$OLLAMA_HOST`` where that is this machine, the one in Ollama's unit, or ``http://127.0.0.1:11434``."""
    manage: bool = False
    """Start and supervise Ollama when a binary is there and none answers."""
    binary: str = ""
    """Path of ``ollama``; empty: found in PATH."""
    evict: bool = True
    """Unload its idle models when a deployment needs the room."""
    strategy: Literal["intelligent", "least_loaded", "latency_first", "round_robin"] = "intelligent"
    """How one of several endpoints is chosen."""


@dataclass(frozen=True, slots=True)
class ServingSettings:
    """``[serving]``: requests."""

    queue: Count = 512
    """Requests in line at an endpoint, or waiting for a model to load, before 503."""
    bodies: Bytes = GIB
    """Bytes of all requests' bodies that the node holds at a time before 503; 0: no limit."""
    stall: Seconds = 120.0
    """Seconds without a token before a stream is taken for hung, at the least; 0 or negative: never."""
    still: Seconds = 15.0
    """The same where no process of the engine did anything either: it is stopped or locked, not slow."""
    drain_limit: Limit = 60.0
    """Seconds that running streams get when the daemon is stopped."""
    recover_limit: Limit = 300.0
    """Seconds that a stream waits for its model to come back after a fault; a load that moves has more."""


@dataclass(frozen=True, slots=True)
class LogSettings:
    """``[log]``: what is written to the journal or the terminal."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """How much is written."""


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings."""

    node: NodeSettings = field(default_factory=NodeSettings)
    http: HttpSettings = field(default_factory=HttpSettings)
    cluster: ClusterSettings = field(default_factory=ClusterSettings)
    llama: LlamaSettings = field(default_factory=LlamaSettings)
    models: ModelSettings = field(default_factory=ModelSettings)
    placement: PlacementSettings = field(default_factory=PlacementSettings)
    ollama: OllamaSettings = field(default_factory=OllamaSettings)
    serving: ServingSettings = field(default_factory=ServingSettings)
    log: LogSettings = field(default_factory=LogSettings)
