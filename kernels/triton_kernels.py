"""The GPU's implementation of `kernels.ops`, in one namespace."""

from kernels.triton_decode import paged_decode_attention
from kernels.triton_plan import decode_plan, prefill_plan
from kernels.triton_pointwise import (
    add_rms_norm,
    rms_norm,
    rotary_embedding,
    silu_and_mul,
    write_kv_cache,
)
from kernels.triton_prefill import paged_prefill_attention

__all__ = [
    "add_rms_norm",
    "decode_plan",
    "paged_decode_attention",
    "paged_prefill_attention",
    "prefill_plan",
    "rms_norm",
    "rotary_embedding",
    "silu_and_mul",
    "write_kv_cache",
]
