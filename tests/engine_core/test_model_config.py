"""Reading config.json: every supported spelling, and a clear refusal of everything else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engine_core.model.config import (
    parse_model_config,
    read_eos_token_ids,
    read_model_config,
)
from engine_core.model.errors import ModelError
from engine_core.model.rope import RopeConfig, cos_sin_table
from tests.support.tiny_models import CONFIGS

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def test_absent_keys_take_the_defaults_of_transformers() -> None:
    config = parse_model_config(LLAMA)
    assert config.num_kv_heads == 4
    assert config.head_size == 16
    assert config.rms_norm_eps == 1e-6
    assert config.rope == RopeConfig(original_max_positions=128)
    assert config.max_model_len == 128
    assert config.dtype is None
    assert not config.tie_word_embeddings
    assert not config.qkv_bias
    assert not config.qk_norm


def test_qwen2_has_biases_that_no_key_mentions_and_qwen3_norms_its_heads() -> None:
    qwen2 = parse_model_config(LLAMA | {"architectures": ["Qwen2ForCausalLM"]})
    assert qwen2.qkv_bias
    assert not qwen2.output_bias
    assert not qwen2.qk_norm
    qwen3 = parse_model_config(LLAMA | {"architectures": ["Qwen3ForCausalLM"]})
    assert qwen3.qk_norm
    assert qwen3.head_size == 128
    assert not qwen3.qkv_bias


def test_the_model_type_stands_in_for_a_missing_architecture() -> None:
    raw = {key: value for key, value in LLAMA.items() if key != "architectures"}
    assert parse_model_config(raw | {"model_type": "mistral"}).architecture == "MistralForCausalLM"


def test_the_old_and_the_new_spelling_of_rope_mean_the_same() -> None:
    old = parse_model_config(LLAMA | {"rope_theta": 500.0, "rope_scaling": LLAMA3_SCALING})
    new = parse_model_config(LLAMA | {"rope_parameters": {"rope_theta": 500.0, **LLAMA3_SCALING}})
    oldest = parse_model_config(
        LLAMA | {"rope_theta": 500.0, "rope_scaling": {"type": "llama3", **LLAMA3_SCALING}}
    )
    assert old == new == oldest
    assert old.rope.theta == 500.0
    assert old.rope.kind == "llama3"


def test_no_rope_scaling_is_the_default_rope() -> None:
    config = parse_model_config(LLAMA | {"rope_theta": 1e6, "rope_scaling": None})
    assert config.rope.kind == "default"
    assert config.rope.theta == 1e6


@pytest.mark.parametrize(
    ("scaling", "limit"),
    [
        ({"rope_type": "linear", "factor": 4.0}, 512),
        ({"rope_type": "yarn", "factor": 4.0}, 512),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128),
        (LLAMA3_SCALING, 128),
    ],
)
def test_scaled_positions_set_the_context_limit(scaling: dict[str, Any], limit: int) -> None:
    assert parse_model_config(LLAMA | {"rope_scaling": scaling}).max_model_len == limit


@pytest.mark.parametrize(
    ("changes", "limit"),
    [
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 40}, 40),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": None}, 128),
        ({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 40}, 128),
        (
            {
                "architectures": ["Qwen2ForCausalLM"],
                "use_sliding_window": True,
                "sliding_window": 40,
                "max_window_layers": 2,
            },
            128,
        ),
        (
            {
                "architectures": ["Qwen2ForCausalLM"],
                "use_sliding_window": True,
                "sliding_window": 40,
                "max_window_layers": 1,
            },
            40,
        ),
        (
            {
                "architectures": ["Qwen3ForCausalLM"],
                "use_sliding_window": True,
                "sliding_window": 40,
                "layer_types": ["full_attention", "sliding_attention"],
            },
            40,
        ),
    ],
)
def test_a_sliding_window_in_effect_limits_the_context(changes: dict[str, Any], limit: int) -> None:
    assert parse_model_config(LLAMA | changes).max_model_len == limit


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel.*supported.*LlamaForCausalLM"),
        ({"architectures": None, "model_type": "mamba"}, "mamba"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq.*bfloat16"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'.*silu"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'.*linear, llama3"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "mscale": 1.0}}, "mscale=1.0"),
        ({"rope_scaling": {"rope_type": "linear"}}, "needs 'factor'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"rope_parameters": [1]}, r"rope_parameters=\[1\]"),
        ({"num_key_value_heads": 3}, "4 is not a multiple of num_key_value_heads=3"),
        ({"hidden_size": "64"}, "hidden_size='64'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"vocab_size": None}, "lacks 'vocab_size'"),
        ({"torch_dtype": "float8_e4m3fn"}, "float8_e4m3fn.*bfloat16"),
        ({"layer_types": ["chunked_attention"]}, "chunked_attention"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused_with_its_value(
    changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ModelError, match=words):
        parse_model_config(LLAMA | changes)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_transformers_writes_is_read_back(name: str, tmp_path: Path) -> None:
    reference = CONFIGS[name]()
    reference.architectures = [f"{type(reference).__name__.removesuffix('Config')}ForCausalLM"]
    reference.save_pretrained(tmp_path)
    config = read_model_config(tmp_path)
    assert config.head_size == (getattr(reference, "head_dim", None) or 32)
    assert config.num_kv_heads == reference.num_key_value_heads
    assert config.tie_word_embeddings == reference.tie_word_embeddings
    assert config.rope.kind == reference.rope_parameters["rope_type"]
    assert config.rope.theta == reference.rope_parameters["rope_theta"]


def test_the_table_holds_cosines_then_sines_of_position_times_frequency() -> None:
    table = cos_sin_table(RopeConfig(theta=100.0), 4, 3, torch.device("cpu"))
    angles = torch.tensor([[0.0, 0.0], [1.0, 0.1], [2.0, 0.2]])
    torch.testing.assert_close(table, torch.cat((angles.cos(), angles.sin()), dim=1))


def test_eos_ids_of_both_files_are_joined(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 5}))
    assert read_eos_token_ids(tmp_path) == (5,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 5]}))
    assert read_eos_token_ids(tmp_path) == (5, 7)
    (tmp_path / "config.json").write_text("{}")
    assert read_eos_token_ids(tmp_path) == (7, 5)


def test_a_missing_or_broken_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json does not exist"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json is not JSON"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="must hold a JSON object"):
        read_model_config(tmp_path)
