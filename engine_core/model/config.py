"""A model's shape, read from the `config.json` of a directory in Hugging Face's layout.

One `ModelConfig` describes every supported family (Llama 2 and 3, Mistral, Qwen2 and 2.5, Qwen3
dense): they are the same pre-norm decoder and differ in the switches below.

Invariants
- A configuration that asks for something this engine would compute wrongly (another activation,
  quantised weights, an unknown rotary scaling) is refused with the value and what is supported.
- A sliding window is never applied, so a model that has one is served only up to the window's
  length, where it has no effect (`ModelConfig.max_model_len`).
- Code that a checkpoint brings along (`auto_map`) is never run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine_core.model.errors import ModelError
from engine_core.model.files import read_json
from engine_core.model.rope import RopeConfig, context_limit, parse_rope

_MODEL_TYPES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_DTYPES = ("float32", "float16", "bfloat16")
_QWEN3_HEAD_SIZE = 128
_DEFAULT_WINDOW = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The shape of one decoder; sizes in elements, lengths in tokens."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    """The output projection is the embedding matrix."""
    qkv_bias: bool
    output_bias: bool
    """Bias of the attention's output projection."""
    mlp_bias: bool
    qk_norm: bool
    """Each query and key head passes an RMS norm before the rotation (Qwen3)."""
    rope: RopeConfig
    num_positions: int
    """Positions the rotary embedding is meant for, scaling included."""
    sliding_window: int | None
    """Reach of the attention of some or all layers, None for unlimited."""
    dtype: str | None
    """Of the checkpoint, as far as the configuration tells."""

    @property
    def max_model_len(self) -> int:
        """The longest sequence that is computed exactly."""
        return min(self.num_positions, self.sliding_window or self.num_positions)


def read_model_config(directory: Path) -> ModelConfig:
    """Read `directory/config.json`. Raises ModelError."""
    return parse_model_config(_read_json(directory / "config.json"))


def read_eos_token_ids(directory: Path) -> tuple[int, ...]:
    """End-of-sequence ids of `config.json`, then further ones of `generation_config.json`."""
    found: list[int] = []
    for name in ("config.json", "generation_config.json"):
        if name == "generation_config.json" and not (directory / name).exists():
            continue
        value = _read_json(directory / name).get("eos_token_id")
        found += value if isinstance(value, list) else [] if value is None else [value]
    return tuple(dict.fromkeys(found))


def parse_model_config(raw: Mapping[str, Any]) -> ModelConfig:
    """Turn the contents of a `config.json` into a ModelConfig. Raises ModelError."""
    architecture = _architecture(raw)
    _refuse_unsupported(raw)
    num_positions = _integer(raw, "max_position_embeddings")
    num_heads = _integer(raw, "num_attention_heads")
    num_kv_heads = _integer(raw, "num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise ModelError(
            f"num_attention_heads={num_heads} is not a multiple of "
            f"num_key_value_heads={num_kv_heads}"
        )
    hidden_size = _integer(raw, "hidden_size")
    is_qwen3 = architecture == "Qwen3ForCausalLM"
    attention_bias = bool(raw.get("attention_bias", False))
    rope = parse_rope(raw, num_positions)
    return ModelConfig(
        architecture=architecture,
        vocab_size=_integer(raw, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_integer(raw, "intermediate_size"),
        num_layers=_integer(raw, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=_integer(
            raw, "head_dim", _QWEN3_HEAD_SIZE if is_qwen3 else hidden_size // num_heads
        ),
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        # Qwen2's projections always have biases; no key of its configuration says so.
        qkv_bias=architecture == "Qwen2ForCausalLM" or attention_bias,
        output_bias=architecture != "Qwen2ForCausalLM" and attention_bias,
        mlp_bias=bool(raw.get("mlp_bias", False)),
        qk_norm=is_qwen3,
        rope=rope,
        num_positions=context_limit(rope, num_positions),
        sliding_window=_sliding_window(raw, architecture),
        dtype=_dtype(raw),
    )


def _architecture(raw: Mapping[str, Any]) -> str:
    named = raw.get("architectures") or [_MODEL_TYPES.get(raw.get("model_type", ""))]
    if named[0] not in _MODEL_TYPES.values():
        value = raw.get("architectures") or raw.get("model_type")
        raise ModelError(
            f"architecture {value!r} is not supported; "
            f"supported: {', '.join(sorted(_MODEL_TYPES.values()))}"
        )
    return str(named[0])


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    quantization = raw.get("quantization_config") or raw.get("compression_config")
    if quantization:
        method = quantization.get("quant_method", "unknown")
        raise ModelError(
            f"quantised checkpoints are not supported (quant_method={method!r}); "
            f"use one with {', '.join(_DTYPES)} weights"
        )
    activation = raw.get("hidden_act", "silu")
    if activation != "silu":
        raise ModelError(f"hidden_act={activation!r} is not supported; supported: 'silu'")
    for kind in raw.get("layer_types") or ():
        if kind not in ("full_attention", "sliding_attention"):
            raise ModelError(
                f"layer type {kind!r} is not supported; "
                f"supported: full_attention, sliding_attention"
            )


def _sliding_window(raw: Mapping[str, Any], architecture: str) -> int | None:
    """The window if any layer has one. Qwen's configurations name one that is switched off."""
    if architecture == "MistralForCausalLM":
        window = raw.get("sliding_window", _DEFAULT_WINDOW)
    elif architecture.startswith("Qwen") and raw.get("use_sliding_window"):
        in_use = (
            "sliding_attention" in raw["layer_types"]
            if raw.get("layer_types")
            else raw.get("max_window_layers", 28) < _integer(raw, "num_hidden_layers")
        )
        window = raw.get("sliding_window", _DEFAULT_WINDOW) if in_use else None
    else:
        window = None
    return None if window is None else int(window)


def _dtype(raw: Mapping[str, Any]) -> str | None:
    dtype = raw.get("dtype") or raw.get("torch_dtype")
    if dtype is None:
        return None
    dtype = str(dtype).removeprefix("torch.")
    if dtype not in _DTYPES:
        raise ModelError(f"dtype={dtype!r} is not supported; supported: {', '.join(_DTYPES)}")
    return dtype


def _integer(raw: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A positive integer of the configuration; absent or null means the default."""
    value = raw.get(key)
    if value is None:
        value = default
    if value is None:
        raise ModelError(f"config.json lacks {key!r}")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(f"{key}={value!r} in config.json must be a positive integer")
    return value


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
    except FileNotFoundError:
        raise ModelError(
            f"{path} does not exist; a model directory needs config.json and safetensors weights"
        ) from None
    except ModelError:
        raise
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path} must hold a JSON object")
    return content
