"""From an engine's configuration to a model runner that is ready for its first step.

Choices made here
- `device="auto"` is a GPU if PyTorch sees one, else the CPU.
- `dtype="auto"` is the checkpoint's, except that a float16 checkpoint runs in float32 on a CPU:
  CPUs do not compute in float16, float32 holds its values exactly, and bfloat16 would round them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine_core.model.config import ModelConfig, read_eos_token_ids, read_model_config
from engine_core.model.decoder import Decoder
from engine_core.model.errors import ModelError
from engine_core.model.kv_cache import allocate_kv_cache, choose_num_blocks
from engine_core.model.parts import Parts, PartsBuilder, PartsForm, needed_specs
from engine_core.model.rope import cos_sin_table
from engine_core.model.runner import Model, TorchModelRunner
from engine_core.model.weights import (
    Checkpoint,
    TensorRules,
    model_directory,
    stored_dtype,
    weight_paths,
)
from ipc.engine_config import EngineConfig

_WARM_UP_TOKENS = {"cpu": (64,), "cuda": (2, 8, 32, 128)}
"""Lengths of prompts that meet every kernel of a device once: a GPU's attention is cut by them."""
_NEWS_INTERVAL_S = 5.0
"""Between two lines about kernels that are being compiled."""

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
    config: EngineConfig, num_local_engines: int = 1, local_rank: int = 0
) -> tuple[TorchModelRunner, ResolvedModel]:
    """Load the model and allocate its KV cache.

    `num_local_engines` engines, of which this is number `local_rank`, share this host's cores and
    memory. Raises ModelError naming what is wrong with the model or with what is asked of it.
    """
    device = _choose_device(config.device)
    if device.type != "cpu":
        _refuse_cpu_features(config)
    directory = model_directory(config.model)
    model_config = read_model_config(directory)
    max_model_len = _choose_max_model_len(config.max_model_len, model_config)
    dtype_name = _choose_dtype(config, device, directory, model_config)
    dtype: torch.dtype = getattr(torch, dtype_name)
    form = PartsForm(dtype=dtype, device=device, to_int8=config.quantization == "int8")
    with torch.inference_mode():
        cos_sin = cos_sin_table(model_config.rope, model_config.head_size, max_model_len, device)
        cores = _share_of_cores(num_local_engines, local_rank)
        at_start = dataclasses.replace(form, num_threads=max(1, len(cores)))
        parts = load_parts(model_config, directory, at_start)
        model: Model
        if device.type == "cpu":
            model = _make_cpu_model(config, model_config, parts, cos_sin, cores)
        else:
            model = Decoder(model_config, parts, cos_sin)
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
    for num_tokens in _WARM_UP_TOKENS[device.type]:
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
    builder = PartsBuilder(needed_specs(config, form), form)
    for name, tensor in _read_ahead(checkpoint, list(rules.shapes)):
        builder.add(name, tensor)
    return builder.finish()


def _read_ahead(checkpoint: Checkpoint, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """Each tensor, read while the one before it is made use of."""
    with ThreadPoolExecutor(1) as reader:
        pending = deque([reader.submit(checkpoint.read, names[0])])
        for index, name in enumerate(names):
            if index + 1 < len(names):
                pending.append(reader.submit(checkpoint.read, names[index + 1]))
            yield name, pending.popleft().result()


@contextlib.contextmanager
def _telling_of_slow_compilation() -> Iterator[None]:
    """The first start on a machine compiles the kernels, and should not look as if it hung."""
    done, start_s = threading.Event(), time.monotonic()

    def tell() -> None:
        while not done.wait(_NEWS_INTERVAL_S):
            logger.info(
                "compiling kernels for this machine, once: %.0f s so far",
                time.monotonic() - start_s,
            )

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        done.set()
        teller.join()


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


def _refuse_cpu_features(config: EngineConfig) -> None:
    if config.deterministic:
        raise ModelError("deterministic=True is supported on the CPU only; use device='cpu'")
    if config.quantization is not None:
        raise ModelError(
            f"quantization={config.quantization!r} is supported on the CPU only; use device='cpu'"
        )


def _share_of_cores(num_local_engines: int, local_rank: int) -> list[int]:
    """This engine's share of the cores that the process may use; none if they do not go round."""
    by_siblings: dict[str, int] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        # Of the hardware threads of a core, which share what computes, only the first.
        with contextlib.suppress(OSError):
            siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
            by_siblings.setdefault(siblings.read_text(), cpu)
            continue
        by_siblings[str(cpu)] = cpu
    cores = sorted(by_siblings.values())
    begin, end = (len(cores) * rank // num_local_engines for rank in (local_rank, local_rank + 1))
    return cores[begin:end]


def _make_cpu_model(
    config: EngineConfig, model: ModelConfig, parts: Parts, cos_sin: Tensor, cores: Sequence[int]
) -> Model:
    # Imported only here: it brings numba, which GPUs do without.
    from engine_core.model.cpu_decoder import CpuDecoder
    from kernels.cpu_kv_cache import check_block_size
    from kernels.cpu_team import Team

    check_block_size(config.block_size, parts.tensors["model.norm.weight"].dtype)
    num_threads = config.num_threads or max(1, len(cores))
    # One thread alone, or more threads than cores, are best left to the system.
    has_cores = 1 < num_threads <= len(cores)
    with _telling_of_slow_compilation():
        team = Team(num_threads, cores[:num_threads] if has_cores else ())
        return CpuDecoder(model, parts, cos_sin, team)


def _choose_dtype(
    config: EngineConfig, device: torch.device, directory: Path, model: ModelConfig
) -> str:
    asked = config.dtype
    if asked == "float16" and device.type == "cpu":
        raise ModelError("dtype='float16' is not supported on a CPU; use 'bfloat16' or 'float32'")
    if config.quantization == "int8":
        if asked not in ("auto", "bfloat16"):
            raise ModelError(
                f"quantization='int8' computes in bfloat16, not dtype={asked!r}; leave dtype out"
            )
        return "bfloat16"
    if asked != "auto":
        return asked
    stored = model.dtype or stored_dtype(directory, "model.embed_tokens.weight")
    return "float32" if stored == "float16" and device.type == "cpu" else stored
