"""The paged KV cache: how many blocks an engine gets, and their tensors.

A block holds the keys and values of `block_size` tokens in every layer. Each layer has two tensors
[num_blocks, num_kv_heads, block_size, head_size]; a block's id is its first index in all of them.
Within a block and head, the CPU's kernels arrange it their own way (`kernels.cpu_kv_cache`).
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from engine_core.model.config import ModelConfig
from engine_core.model.errors import ModelError
from ipc.engine_config import EngineConfig

_CUDA_SHARE = 0.9
"""Share of a GPU's free memory that the cache may take; the rest is for activations."""
_CPU_SHARE = 0.5
"""Share of the host's available memory for the caches of all engines together."""


def block_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block over all layers, keys and values."""
    elements = config.num_layers * config.num_kv_heads * block_size * config.head_size
    return 2 * elements * dtype.itemsize


def choose_num_blocks(
    config: EngineConfig,
    model: ModelConfig,
    *,
    max_model_len: int,
    dtype: torch.dtype,
    device: torch.device,
    num_local_engines: int,
) -> int:
    """Number of blocks: the configured number, else what the configured bytes hold, else what the
    free memory holds and `max_num_seqs` longest sequences could use. Raises ModelError if not even
    one sequence of `max_model_len` fits.
    """
    blocks_per_sequence = -(-max_model_len // config.block_size)
    bytes_per_block = block_bytes(model, config.block_size, dtype)
    if config.num_gpu_blocks_override is not None:
        num_blocks = config.num_gpu_blocks_override
        origin = f"num_gpu_blocks_override={num_blocks}"
    elif config.kv_cache_memory_bytes is not None:
        num_blocks = config.kv_cache_memory_bytes // bytes_per_block
        origin = f"kv_cache_memory_bytes={config.kv_cache_memory_bytes}"
    else:
        budget_bytes = _memory_budget_bytes(device, num_local_engines)
        num_blocks = min(budget_bytes // bytes_per_block, config.max_num_seqs * blocks_per_sequence)
        origin = f"the free memory ({budget_bytes} bytes of it for the cache)"
    if num_blocks < blocks_per_sequence:
        raise ModelError(
            f"{origin} gives {num_blocks} KV blocks of {bytes_per_block} bytes, but one sequence "
            f"of max_model_len={max_model_len} tokens needs {blocks_per_sequence}; "
            f"lower max_model_len or give the cache more memory"
        )
    return num_blocks


def allocate_kv_cache(
    model: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """Key and value cache of each layer.

    Zeroed, so that a kernel may load the unused end of a block and mask it (garbage times zero
    could be NaN). On a CPU the system maps zeroed pages only as they are first written, so the
    cache takes the memory that it uses and no time to allocate. Raises ModelError if the system
    does not give that much.
    """
    shape = (num_blocks, model.num_kv_heads, block_size, model.head_size)

    def zeros() -> Tensor:
        if device.type != "cpu":
            return torch.zeros(shape, dtype=dtype, device=device)
        # Imported only here: it brings numba, which GPUs do without.
        from kernels import cpu_memory

        return cpu_memory.zeros(shape, dtype)

    try:
        return [(zeros(), zeros()) for _ in range(model.num_layers)]
    except (MemoryError, torch.OutOfMemoryError) as error:
        num_bytes = num_blocks * block_bytes(model, block_size, dtype)
        raise ModelError(
            f"a KV cache of {num_blocks} blocks takes {num_bytes} bytes, more than can be "
            f"allocated; lower kv_cache_memory_bytes or num_gpu_blocks_override"
        ) from error


def _memory_budget_bytes(device: torch.device, num_local_engines: int) -> int:
    """Bytes that this engine's cache may take now that the weights are loaded."""
    if device.type == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info(device)
        return int(free_bytes * _CUDA_SHARE)
    return int(_available_host_bytes() * _CPU_SHARE) // num_local_engines


def _available_host_bytes() -> int:
    """What the host has available, or the container if its limit is nearer."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    fields = {name: value for name, _, value in (line.partition(":") for line in lines)}
    available = int(fields["MemAvailable"].split()[0]) * 1024
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii"))
    except OSError:
        return available
    return available if limit == "max" else min(available, max(int(limit) - used, 0))
