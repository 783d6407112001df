"""From an engine's configuration to a model runner that is ready for its first step.

Choices made here
- `device="auto"` is a GPU if PyTorch sees one, else the CPU.
- `dtype="auto"` is the checkpoint's, except that a float16 checkpoint runs in float32 on a CPU:
  CPUs do not compute in float16, float32 holds its values exactly, and bfloat16 would round them.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from engine_core.model.config import ModelConfig, read_eos_token_ids, read_model_config
from engine_core.model.decoder import Decoder
from engine_core.model.errors import ModelError
from engine_core.model.kv_cache import allocate_kv_cache, choose_num_blocks
from engine_core.model.parts import Parts, PartsBuilder, PartsForm, part_specs
from engine_core.model.rope import cos_sin_table
from engine_core.model.runner import TorchModelRunner
from engine_core.model.weights import (
    Checkpoint,
    TensorRules,
    model_directory,
    stored_dtype,
    weight_paths,
)
from ipc.engine_config import EngineConfig

_WARM_UP_ELEMENTS = 2**18
"""Tokens times hidden size of the first step: enough that its kernels are worth several threads."""
_MIN_WARM_UP_TOKENS = 64


logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedModel:
    """What the configuration left open, as the loaded model settled it."""

    max_model_len: int
    """Longest prompt plus output, in tokens."""
    dtype: str
    """'float32', 'float16' or 'bfloat16'."""
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    """End-of-sequence tokens that the model's own files name."""
    num_blocks: int
    """KV blocks."""


def load_runner(
    config: EngineConfig, num_local_engines: int = 1
) -> tuple[TorchModelRunner, ResolvedModel]:
    """Load the model and allocate its KV cache.

    `num_local_engines` engines share this host's cores and memory. Raises ModelError naming what is
    wrong with the model or with what is asked of it.
    """
    device = _choose_device(config.device)
    if config.deterministic and device.type != "cpu":
        raise ModelError("deterministic=True is supported on the CPU only; use device='cpu'")
    if device.type == "cpu":
        num_cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(config.num_threads or max(1, num_cores // num_local_engines))
    directory = model_directory(config.model)
    model_config = read_model_config(directory)
    max_model_len = _choose_max_model_len(config.max_model_len, model_config)
    dtype_name = _choose_dtype(config.dtype, device, directory, model_config)
    dtype: torch.dtype = getattr(torch, dtype_name)
    form = PartsForm(dtype=dtype, device=device, deterministic=config.deterministic)
    with torch.inference_mode():
        cos_sin = cos_sin_table(model_config.rope, model_config.head_size, max_model_len, device)
        model = Decoder(model_config, load_parts(model_config, directory, form), cos_sin)
        num_blocks = choose_num_blocks(
            config,
            model_config,
            max_model_len=max_model_len,
            dtype=dtype,
            device=device,
            num_local_engines=num_local_engines,
        )
        kv_cache = allocate_kv_cache(model_config, num_blocks, config.block_size, dtype, device)
    runner = TorchModelRunner(
        model,
        kv_cache,
        max_num_seqs=config.max_num_seqs,
        max_model_len=max_model_len,
        seed=config.seed,
        form=form,
    )
    logger.info("warming up (on its first start, a machine compiles the kernels: some seconds)")
    num_tokens = max(_MIN_WARM_UP_TOKENS, _WARM_UP_ELEMENTS // model_config.hidden_size)
    runner.warm_up(min(num_tokens, max_model_len - 1))
    resolved = ResolvedModel(
        max_model_len=max_model_len,
        dtype=dtype_name,
        vocab_size=model_config.vocab_size,
        eos_token_ids=read_eos_token_ids(directory),
        num_blocks=num_blocks,
    )
    return runner, resolved


def load_parts(config: ModelConfig, directory: Path, form: PartsForm) -> Parts:
    """All parts of a model, from its directory. Raises ModelError."""
    checkpoint, rules = Checkpoint(weight_paths(directory)), TensorRules(config)
    rules.check_all(checkpoint.infos)
    builder = PartsBuilder(part_specs(config), form)
    for name in rules.shapes:
        builder.add(name, checkpoint.read(name))
    return builder.finish()


def _choose_device(asked: str) -> torch.device:
    if asked != "cpu" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if asked == "cuda":
        raise ModelError("device='cuda', but PyTorch finds no CUDA device here; use device='cpu'")
    return torch.device("cpu")


def _choose_max_model_len(asked: int | None, model: ModelConfig) -> int:
    limit = model.max_model_len
    if asked == 1:
        raise ModelError("max_model_len=1 leaves no room for an output token; make it at least 2")
    if asked is None or asked <= limit:
        return asked or limit
    reason = (
        "longer contexts would need its sliding window, which is not supported"
        if limit == model.sliding_window
        else f"its positions end at {limit}"
    )
    raise ModelError(
        f"max_model_len={asked} exceeds the model's limit of {limit} tokens: {reason}; "
        f"lower max_model_len or leave it out"
    )


def _choose_dtype(asked: str, device: torch.device, directory: Path, model: ModelConfig) -> str:
    if asked == "float16" and device.type == "cpu":
        raise ModelError("dtype='float16' is not supported on a CPU; use 'bfloat16' or 'float32'")
    if asked != "auto":
        return asked
    stored = model.dtype or stored_dtype(directory, "model.embed_tokens.weight")
    return "float32" if stored == "float16" and device.type == "cpu" else stored
