"""One case measured: our kernel, what it is compared with, and whether it computed it right."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels import reference
from kernels.triton_plan import DecodePlan, PrefillPlan
from kernels.triton_tuning import Tuning
from scripts.kernel_bench.cases import Case, Tensors
from scripts.kernel_bench.clocks import Clock, Launch

MOST_CHECKED_QUERIES = 64


@dataclass(frozen=True, slots=True)
class Measurement:
    """Of one case."""

    case: Case
    us: float
    """One layer."""
    plan_us: float
    """The work list, once a step."""
    largest_error: float
    """Of the first row's last queries, beside the reference in float32."""
    rivals_us: dict[str, float | str] = field(default_factory=dict)
    """Microseconds, or why there are none."""

    @property
    def bytes_per_s(self) -> float:
        """Of what must be read and written."""
        return self.case.cost.num_bytes / (self.us * 1e-6)

    @property
    def flop_per_s(self) -> float:
        """Of what must be computed."""
        return self.case.cost.flop / (self.us * 1e-6)


def measure(
    case: Case,
    clock: Clock,
    dtype: torch.dtype,
    rivals: Mapping[str, Callable[[Tensors], list[Launch]]],
) -> Measurement:
    """Everything about one case. A rival that fails is reported, never raised."""
    tensors = Tensors(case, dtype, clock.device)
    plan = make_plan(case, clock.device)
    tensors.update(plan)
    launches = tensors.launches(plan)
    us = clock.time_us(launches)
    plan_us = clock.time_us([lambda: tensors.update(plan)] * 8)
    launches[0]()
    error = largest_error(tensors)
    rivals_us: dict[str, float | str] = {}
    for name, make in rivals.items():
        try:
            rivals_us[name] = clock.time_us(make(tensors))
        except ImportError:
            rivals_us[name] = "not installed"
        except Exception as raised:  # whatever it is, it is this rival's result
            text = " ".join(str(raised).split())[:80]
            rivals_us[name] = f"failed: {type(raised).__name__}: {text}"
    return Measurement(case, us, plan_us, error, rivals_us)


def make_plan(
    case: Case,
    device: torch.device,
    tuning: Tuning | None = None,
    *,
    deterministic: bool = False,
) -> DecodePlan | PrefillPlan:
    """For a case; the table's tuning unless told otherwise."""
    kind = DecodePlan if case.is_decode else PrefillPlan
    return kind(case.shape, device, deterministic=deterministic, tuning=tuning)


def largest_error(tensors: Tensors) -> float:
    """Of what the first copy's launch left in `out`, as far as it is checked."""
    case = tensors.case
    first = max(0, case.num_queries - MOST_CHECKED_QUERIES)
    num_checked = case.num_queries - first
    starts = torch.tensor([0, num_checked], dtype=torch.int32, device=tensors.query.device)
    table = tensors.block_tables[0, :1]
    blocks = table[0].long()
    local = torch.arange(len(blocks), dtype=torch.int32, device=table.device)[None]

    def float32(cache: Tensor) -> Tensor:
        return cache[blocks].float()

    expected = reference.paged_prefill_attention(
        tensors.query[first : case.num_queries].float(),
        float32(tensors.key_cache),
        float32(tensors.value_cache),
        local,
        tensors.context_lens[:1],
        starts,
        num_checked,
        tensors.scale,
    )
    return float((tensors.out[first : case.num_queries].float() - expected).abs().max())
