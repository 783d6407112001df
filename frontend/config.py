"""The configuration of a front end: its engines, how they are reached, and how its HTTP server
listens.

Field names follow vLLM's flags where vLLM has them. Values out of range are refused with the value
and the remedy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from ipc.engine_config import EngineConfig

BUNDLED_MODEL_DIRECTORY = Path(__file__).parent / "bundled_model"
"""The small trained model that ships with Caesura."""
BUNDLED_MODEL_NAME = "caesura-bundled"


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontendConfig:
    """Everything an `AsyncEngine` needs to know."""

    engine: EngineConfig = field(
        default_factory=lambda: EngineConfig(model=str(BUNDLED_MODEL_DIRECTORY))
    )
    """Handed to each engine this front end starts; its `model` also names the tokenizer."""
    served_model_name: str = ""
    """The `model` of API requests; empty takes `engine.model`, for the bundled one its name."""
    data_parallel_size: int = 1
    """Engines in all."""
    data_parallel_size_local: int | None = None
    """How many of them this front end starts itself, the lowest ranks first; None means all."""
    data_parallel_address: str = "127.0.0.1"
    """Where engines that others start find the handshake; loopback unless told otherwise."""
    data_parallel_rpc_port: int = 29550
    """The handshake's TCP port, used as soon as others start engines (vLLM's default)."""
    data_parallel_start_rank: int = 0
    """The first rank that is started here; above 0 only without a front end (`--headless`)."""
    stream_interval: int = 1
    """Tokens between two deliveries of a stream; the first and the last always come at once."""
    max_num_queued_requests: int | None = None
    """How many requests may wait for their first token, over all engines; None is no limit."""
    max_num_queued_tokens: int | None = None
    """How many prompt tokens these may have together; None is no limit."""
    startup_timeout_s: float = 600.0
    """How long engines may take from their start until they are ready."""

    def __post_init__(self) -> None:
        if not self.served_model_name:
            bundled = self.engine.model == str(BUNDLED_MODEL_DIRECTORY)
            name = BUNDLED_MODEL_NAME if bundled else self.engine.model
            object.__setattr__(self, "served_model_name", name)
        _check_positive(self, "data_parallel_size", "stream_interval")
        _check_positive(self, "max_num_queued_requests", "max_num_queued_tokens")
        if self.startup_timeout_s <= 0:
            raise ValueError(f"startup_timeout_s={self.startup_timeout_s!r} must be positive")
        if not 0 <= self.data_parallel_start_rank < self.data_parallel_size:
            raise ValueError(
                f"data_parallel_start_rank={self.data_parallel_start_rank!r} must be a rank below "
                f"data_parallel_size={self.data_parallel_size}"
            )
        most = self.data_parallel_size - self.data_parallel_start_rank
        if not 0 <= self.num_local_engines <= most:
            raise ValueError(
                f"data_parallel_size_local={self.data_parallel_size_local!r} must lie between 0 "
                f"and {most}, the number of ranks from {self.data_parallel_start_rank} on"
            )
        if not 1 <= (port := self.data_parallel_rpc_port) <= 65535:
            raise ValueError(f"data_parallel_rpc_port={port!r} is no TCP port; choose 1 to 65535")

    @property
    def num_local_engines(self) -> int:
        """Engines that are started here."""
        if self.data_parallel_size_local is None:
            return self.data_parallel_size - self.data_parallel_start_rank
        return self.data_parallel_size_local

    @property
    def local_ranks(self) -> range:
        """Ranks of the engines that are started here."""
        start = self.data_parallel_start_rank
        return range(start, start + self.num_local_engines)

    @property
    def handshake_tcp_address(self) -> str:
        """Where engines that others start dial."""
        host = self.data_parallel_address
        host = f"[{host}]" if ":" in host else host
        return f"tcp://{host}:{self.data_parallel_rpc_port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpConfig:
    """How the HTTP server listens and whom it serves."""

    host: str = "127.0.0.1"
    port: int = 8000
    uds: str | None = None
    """A Unix socket's path; takes the place of host and port."""
    api_key: str | None = field(default=None, repr=False)
    """If set, all but probes and metrics must carry it as `Authorization: Bearer KEY`."""
    admin_api_key: str | None = field(default=None, repr=False)
    """If set, control routes need this key. If not, they need `api_key`; without any key they serve
    this machine alone."""
    max_body_bytes: int = 64 * 1024 * 1024
    """Longer bodies are refused with 413."""
    max_connections: int = 16384
    """Open connections; further ones are turned away."""
    max_unread_tokens: int = 4096
    """A stream with more tokens than this that its client did not take ends as a slow reader."""
    shutdown_timeout_s: float = 30.0
    """How long running requests may take to end by themselves at a shutdown; 0 ends them at once.
    """
    strict_selectors: bool = False
    """Refuse an empty selector also where vLLM's API takes it for all requests."""
    hold_while_paused: bool = False
    """Hold newcomers also where vLLM's API refuses them: during a pause that aborts or waits."""
    log_requests: bool = False
    """Log the end of each request."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(
                f"port={self.port!r} is no TCP port; choose 1 to 65535, or 0 for any free one"
            )
        for name in ("api_key", "admin_api_key"):
            _check_key(name, getattr(self, name))
        _check_positive(self, "max_body_bytes", "max_connections", "max_unread_tokens")
        if not 0 <= self.shutdown_timeout_s < math.inf:
            raise ValueError(
                f"shutdown_timeout_s={self.shutdown_timeout_s!r} is no number of seconds; "
                f"choose 0 or more"
            )


def _check_positive(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}={value!r} must be at least 1")


def _check_key(name: str, key: str | None) -> None:
    """The message does not tell the key: it may end up in a log."""
    if key == "":
        raise ValueError(f"{name}='' would let nobody in; give a key or leave the flag out")
    if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
        raise ValueError(f"{name} cannot be sent in a header; use printable ASCII without spaces")
