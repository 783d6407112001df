"""Models to measure with: the bundled one, and well-known shapes with random weights.

    python -m scripts.perf_bench.models qwen3-0.6b [--model-dir /tmp/models/qwen3-0.6b]

How fast a model runs depends on its shape and not on what its weights are, so nothing has to be
downloaded. Weights are drawn like those of a model before its training (normal, with the shape's
`initializer_range`; norms are 1), which keeps logits finite.

Invariant: a checkpoint's directory appears under its name when it is whole, never before.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from frontend.config import BUNDLED_MODEL_DIRECTORY

BUNDLED_SHAPE = "llama-4m"
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 1024,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 3072,
        "max_position_embeddings": 40960,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }
}
"""By name, each as a config.json; `BUNDLED_SHAPE` needs none."""
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
_SEED = 0


def model_directory(model: str, directory: Path | None = None) -> Path:
    """The directory of `model`: a shape's name, or a directory itself.

    A shape's checkpoint is written to `directory` (/tmp/models/NAME by default) unless it is there.
    Raises ValueError for what is neither.
    """
    if model == BUNDLED_SHAPE:
        return BUNDLED_MODEL_DIRECTORY
    if model not in SHAPES:
        if not (Path(model) / "config.json").is_file():
            known = ", ".join((BUNDLED_SHAPE, *SHAPES))
            raise ValueError(f"{model!r} is neither a model's directory nor one of: {known}")
        return Path(model)
    directory = directory or Path("/tmp/models") / model
    if not directory.exists():
        print(f"writing random weights to {directory}", file=sys.stderr)
        write_checkpoint(SHAPES[model], directory)
    return directory


def vocabulary_size(directory: Path) -> int:
    """Token ids of the model lie below this."""
    size: int = json.loads((directory / "config.json").read_text())["vocab_size"]
    return size


def write_checkpoint(config: dict[str, Any], directory: Path) -> None:
    """Random bfloat16 weights in Hugging Face's layout, with the bundled model's tokenizer.

    That tokenizer knows the first few thousand ids only: prompts are given as token ids.
    """
    import torch  # here, so that measuring what needs no new weights starts at once
    from safetensors.torch import save_file

    unfinished = directory.with_name(f"{directory.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    (unfinished / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in _TOKENIZER_FILES:
        shutil.copy(BUNDLED_MODEL_DIRECTORY / name, unfinished / name)
    generator = torch.Generator().manual_seed(_SEED)
    weights = {}
    for name, shape in weight_shapes(config):
        weight = torch.ones(shape)
        if len(shape) == 2:
            weight.normal_(std=config["initializer_range"], generator=generator)
        weights[name] = weight.bfloat16()
    save_file(weights, unfinished / "model.safetensors", metadata={"format": "pt"})
    unfinished.rename(directory)


def weight_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of each tensor of a Qwen3 checkpoint with tied embeddings."""
    hidden, head, intermediate = (
        config[key] for key in ("hidden_size", "head_dim", "intermediate_size")
    )
    queries = config["num_attention_heads"] * head
    keys = config["num_key_value_heads"] * head
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.self_attn.q_proj.weight", (queries, hidden)
        yield f"{layer}.self_attn.k_proj.weight", (keys, hidden)
        yield f"{layer}.self_attn.v_proj.weight", (keys, hidden)
        yield f"{layer}.self_attn.q_norm.weight", (head,)
        yield f"{layer}.self_attn.k_norm.weight", (head,)
        yield f"{layer}.self_attn.o_proj.weight", (hidden, queries)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
        yield f"{layer}.mlp.gate_proj.weight", (intermediate, hidden)
        yield f"{layer}.mlp.up_proj.weight", (intermediate, hidden)
        yield f"{layer}.mlp.down_proj.weight", (hidden, intermediate)
    yield "model.norm.weight", (hidden,)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--model-dir", type=Path, help="default: /tmp/models/SHAPE")
    arguments = parser.parse_args()
    print(model_directory(arguments.shape, arguments.model_dir))
    return 0


if __name__ == "__main__":
    sys.exit(main())
