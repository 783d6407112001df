"""The CPU's implementation of `kernels.ops`, in one namespace."""

from kernels.cpu_attention import paged_decode_attention, paged_prefill_attention
from kernels.cpu_pointwise import (
    add_rms_norm,
    rms_norm,
    rotary_embedding,
    silu_and_mul,
    write_kv_cache,
)

__all__ = [
    "add_rms_norm",
    "paged_decode_attention",
    "paged_prefill_attention",
    "rms_norm",
    "rotary_embedding",
    "silu_and_mul",
    "write_kv_cache",
]
