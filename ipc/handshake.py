"""How an engine and a front end find each other.

The engine dials the handshake socket and says HELLO; the front end answers with INIT, the addresses
to dial; the engine sends its registration on every input socket and READY on the handshake socket,
in either order. Each is one MessagePack map, whose unknown keys are ignored. On every socket the
engine's identity is its rank, two bytes little-endian.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ipc import expect
from ipc.codec import Frame, pack, unpack
from ipc.errors import WireError, mismatch

MAX_RANK = 2**16 - 1
CAESURA_PROTOCOL = 1
"""Version of Caesura's own utilities, in the registration of every Caesura engine."""


def engine_identity(rank: int) -> bytes:
    """The ZeroMQ identity of an engine."""
    return expect.integer(rank, "rank", 0, MAX_RANK).to_bytes(2, "little")


def rank_of(identity: bytes) -> int:
    """The rank behind an identity. Raises WireError for anything but two bytes."""
    if len(identity) != 2:
        raise mismatch("identity", identity, "two bytes, the engine's rank in little-endian order")
    return int.from_bytes(identity, "little")


@dataclass(frozen=True, slots=True)
class Hello:
    """Engine to front end, first of all. `local`: this front end started the engine; vLLM wants
    `headless` to be its opposite."""

    local: bool
    headless: bool

    def encode(self) -> bytes:
        return pack({"status": "HELLO", "local": self.local, "headless": self.headless})

    @classmethod
    def decode(cls, payload: Frame) -> Hello:
        message = decode_handshake(payload)
        if not isinstance(message, cls):
            raise mismatch("hello.status", "READY", "HELLO")
        return message


@dataclass(frozen=True, slots=True)
class Ready:
    """Engine to front end, when it can take requests."""

    local: bool
    headless: bool
    parallel_config_hash: str | None = None
    """vLLM's engines send it with data_parallel_size > 1; it matters for mixture-of-experts models
    only."""

    def encode(self) -> bytes:
        fields: dict[str, object] = {
            "status": "READY",
            "local": self.local,
            "headless": self.headless,
        }
        if self.parallel_config_hash is not None:
            fields["parallel_config_hash"] = self.parallel_config_hash
        return pack(fields)

    @classmethod
    def decode(cls, payload: Frame) -> Ready:
        message = decode_handshake(payload)
        if not isinstance(message, cls):
            raise mismatch("ready.status", "HELLO", "READY")
        return message


def decode_handshake(payload: Frame) -> Hello | Ready:
    """What an engine says on the handshake socket. Raises WireError."""
    fields = expect.mapping(unpack(payload), "handshake")
    local = expect.boolean(fields.get("local", True), "handshake.local")
    headless = expect.boolean(fields.get("headless", False), "handshake.headless")
    match fields.get("status"):
        case "HELLO":
            return Hello(local, headless)
        case "READY":
            config_hash = fields.get("parallel_config_hash")
            return Ready(
                local,
                headless,
                expect.optional(expect.text, config_hash, "handshake.parallel_config_hash"),
            )
        case status:
            raise mismatch("handshake.status", status, "HELLO or READY")


@dataclass(frozen=True, slots=True)
class Init:
    """Front end to engine: where to dial. Position in `inputs` and `outputs` is a front-end
    process's client index."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    coordinator_input: str | None = None
    coordinator_output: str | None = None
    frontend_stats_publish_address: str | None = None
    parallel_config: Mapping[object, object] = field(default_factory=dict)

    def encode(self) -> bytes:
        addresses = {name: getattr(self, name) for name in self.__slots__[:-1]}
        return pack({"addresses": addresses, "parallel_config": self.parallel_config})

    @classmethod
    def decode(cls, payload: Frame) -> Init:
        """Raises WireError, also when there is not exactly one output for each input."""
        fields = expect.mapping(unpack(payload), "init")
        addresses = expect.mapping(fields.get("addresses"), "init.addresses")
        init = cls(
            inputs=_addresses(addresses, "inputs"),
            outputs=_addresses(addresses, "outputs"),
            coordinator_input=_address(addresses, "coordinator_input"),
            coordinator_output=_address(addresses, "coordinator_output"),
            frontend_stats_publish_address=_address(addresses, "frontend_stats_publish_address"),
            parallel_config=expect.opaque_mapping(
                fields.get("parallel_config"), "init.parallel_config"
            ),
        )
        if not init.inputs or len(init.inputs) != len(init.outputs):
            raise WireError(
                f"init.addresses: expected as many outputs as inputs and at least one, "
                f"got {len(init.inputs)} inputs and {len(init.outputs)} outputs"
            )
        return init


def _addresses(fields: Mapping[object, object], name: str) -> tuple[str, ...]:
    return tuple(expect.texts(fields.get(name), f"init.addresses.{name}"))


def _address(fields: Mapping[object, object], name: str) -> str | None:
    return expect.optional(expect.text, fields.get(name), f"init.addresses.{name}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Registration:
    """Engine to front end, first on each input socket. The first 17 fields are required by every
    front end."""

    max_model_len: int
    num_gpu_blocks: int
    block_size: int
    dp_stats_address: str | None
    dtype: str
    """float32, float16 or bfloat16; vllm-rs refuses anything else."""
    vllm_version: str
    world_size: int
    data_parallel_size: int
    tensor_parallel_size: int
    pipeline_parallel_size: int
    decode_context_parallel_size: int
    data_parallel_rank: int
    max_num_seqs: int
    max_num_batched_tokens: int
    instance_id: str
    supports_lora: bool
    max_loras: int
    mamba_block_size: int | None = None
    kv_cache_size_tokens: int | None = None
    kv_cache_max_concurrency: float | None = None
    kv_events_config: Mapping[object, object] | None = None
    weight_transfer_backend: str | None = None
    enable_sleep_mode: bool = False
    supports_draft_weight_updates: bool = False
    effective_attention_block_size: int | None = None
    caesura_protocol: int | None = None
    """None: not a Caesura engine."""

    def encode(self) -> bytes:
        if self.dtype not in _DTYPES:
            raise mismatch("registration.dtype", self.dtype, f"one of {', '.join(_DTYPES)}")
        fields = {name: getattr(self, name) for name in self.__slots__[:-1]}
        if self.caesura_protocol is not None:
            fields["caesura"] = {"protocol": self.caesura_protocol}
        return pack(fields)

    @classmethod
    def decode(cls, payload: Frame) -> Registration:
        """Raises WireError naming the first required key that is missing."""
        entries = expect.mapping(unpack(payload), "registration")
        fields: dict[str, object] = {}
        for index, name in enumerate(cls.__slots__[:-1]):
            if name in entries:
                fields[name] = _CHECKS.get(name, expect.count)(
                    entries[name], f"registration.{name}"
                )
            elif index < _NUM_REQUIRED:
                raise WireError(f"registration: the required key {name!r} is missing")
        if "caesura" in entries:
            caesura = expect.mapping(entries["caesura"], "registration.caesura")
            fields["caesura_protocol"] = expect.count(
                caesura.get("protocol"), "registration.caesura.protocol"
            )
        return cls(**fields)  # type: ignore[arg-type]  # the checks return each field's type


_NUM_REQUIRED = 17
_DTYPES = ("float32", "float16", "bfloat16")
_CHECKS: dict[str, expect.Check] = {
    "dp_stats_address": expect.nullable(expect.text),
    "dtype": expect.text,
    "vllm_version": expect.text,
    "instance_id": expect.text,
    "supports_lora": expect.boolean,
    "mamba_block_size": expect.nullable(expect.count),
    "kv_cache_size_tokens": expect.nullable(expect.count),
    "kv_cache_max_concurrency": expect.nullable(expect.number),
    "kv_events_config": expect.nullable(expect.opaque_mapping),
    "weight_transfer_backend": expect.nullable(expect.text),
    "enable_sleep_mode": expect.boolean,
    "supports_draft_weight_updates": expect.boolean,
    "effective_attention_block_size": expect.nullable(expect.count),
}
