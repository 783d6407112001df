"""The GPU's implementation of `kernels.ops`, in one namespace."""

from kernels.triton_decode import paged_decode_attention
from kernels.triton_logits import penalize, rank
from kernels.triton_plan import decode_plan, prefill_plan
from kernels.triton_pointwise import add_rms_norm, rms_norm, silu_and_mul
from kernels.triton_prefill import paged_prefill_attention
from kernels.triton_rotary import rotate_and_cache

__all__ = [
    "add_rms_norm",
    "decode_plan",
    "paged_decode_attention",
    "paged_prefill_attention",
    "penalize",
    "prefill_plan",
    "rank",
    "rms_norm",
    "rotate_and_cache",
    "silu_and_mul",
]
