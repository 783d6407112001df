"""Tiny random models in Hugging Face's layout, and what transformers says they answer.

Every weight is random, norms and biases included: transformers would start them at one and zero,
where forgetting one does not show.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

VOCAB_SIZE = 211
TIE_TOLERANCE = 1e-4
"""Two candidates whose logits are nearer than this may be told apart either way."""

_SMALL: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "num_hidden_layers": 2,
    "hidden_size": 128,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

CONFIGS: dict[str, Any] = {
    "llama, heads of 32, grouped": lambda: LlamaConfig(**_SMALL),
    "llama, tied, heads of 48, all biases": lambda: LlamaConfig(
        **_SMALL | {"head_dim": 48, "tie_word_embeddings": True},
        attention_bias=True,
        mlp_bias=True,
    ),
    "llama 3 rope scaling, heads of 64": lambda: LlamaConfig(
        **_SMALL | {"head_dim": 64},
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "llama, linear rope scaling, one query head a key head": lambda: LlamaConfig(
        **_SMALL | {"num_key_value_heads": 4},
        rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    ),
    "mistral, four query heads a key head": lambda: MistralConfig(
        **_SMALL | {"num_key_value_heads": 1}, sliding_window=None
    ),
    "qwen2, tied": lambda: Qwen2Config(**_SMALL | {"tie_word_embeddings": True}),
    "qwen2, yarn": lambda: Qwen2Config(
        **_SMALL | {"max_position_embeddings": 256},
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "qwen3, heads of 128": lambda: Qwen3Config(**_SMALL | {"head_dim": 128}),
    "qwen3, tied": lambda: Qwen3Config(
        **_SMALL | {"head_dim": 32, "tie_word_embeddings": True}, attention_bias=True
    ),
}


def save_model(
    directory: Path, config: Any, seed: int = 0, dtype: torch.dtype = torch.float32, **save: Any
) -> Path:
    """Write a model with random weights; `save` goes to `save_pretrained`. Returns `directory`."""
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            # Queries and keys are large: sharp attention keeps greedy outputs from repeating.
            is_sharp = any(part in name for part in ("q_proj", "k_proj", "q_norm", "k_norm"))
            if "norm" in name:
                parameter.copy_((1 + 0.2 * noise) * (2.0 if is_sharp else 1.0))
            elif name.endswith(".bias"):
                parameter.copy_(0.3 * noise)
            else:
                gain = 3.0 if is_sharp else 1.5
                parameter.copy_(gain * noise / parameter.shape[-1] ** 0.5)
    model.to(dtype).save_pretrained(directory, **save)
    return directory


def load_reference(directory: Path) -> Any:
    """The model as transformers loads it, in float32."""
    config = AutoConfig.from_pretrained(directory)
    return AutoModelForCausalLM.from_pretrained(
        directory, config=config, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@torch.inference_mode()
def reference_logits(model: Any, token_ids: Sequence[int]) -> torch.Tensor:
    """Logits behind every token: [tokens, vocabulary] float32."""
    logits: torch.Tensor = model(torch.tensor([list(token_ids)])).logits[0].float()
    return logits


@torch.inference_mode()
def reference_tokens(model: Any, prompt: Sequence[int], num_tokens: int) -> list[int]:
    """What transformers' own greedy search answers."""
    output = model.generate(
        torch.tensor([list(prompt)]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        do_sample=False,
        max_new_tokens=num_tokens,
        eos_token_id=-1,
        pad_token_id=0,
    )
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens


def assert_greedy(model: Any, prompt: Sequence[int], outputs: Sequence[int]) -> None:
    """Every output is the reference's likeliest token behind what came before, up to a tie."""
    logits = reference_logits(model, [*prompt, *outputs])[len(prompt) - 1 : -1]
    chosen = logits.gather(1, torch.tensor([list(outputs)]).T)[:, 0]
    behind = logits.amax(dim=-1) - chosen
    worst = int(behind.argmax())
    assert behind[worst] < TIE_TOLERANCE, (
        f"output {worst} is token {outputs[worst]}, {behind[worst]:.6f} below the likeliest, "
        f"{int(logits[worst].argmax())}"
    )
