"""The models whose shapes kernels are compiled for."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

ELEMENT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True, slots=True)
class Model:
    """The shapes of a model that kernels are compiled for."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    element: str
    block_size: int
    hidden_size: int = 4096
    intermediate_size: int = 14336
    vocab_size: int = 128256

    @property
    def group(self) -> int:
        """Query heads that share a key/value head."""
        return self.num_heads // self.num_kv_heads


SAMPLE = [
    Model(32, 8, 128, "bf16", 16),
    Model(64, 8, 128, "bf16", 64, 8192, 28672),
    Model(14, 2, 64, "fp16", 32, 896, 4864, 151936),
    Model(8, 4, 32, "fp32", 16, 256, 768, 4096),
    Model(32, 32, 96, "bf16", 128, 3072, 8192, 32064),
    Model(8, 1, 256, "bf16", 64, 2048, 16384, 256000),
]


def sweep() -> list[Model]:
    """Every head size, group, page size and type the kernels support, at one size of model."""
    return [
        Model(group, 1, head_size, element, block_size, 1024, 4096)
        for head_size, group, block_size, element in product(
            (32, 48, 64, 80, 96, 128, 192, 256), (1, 3, 8, 16), (16, 128), ELEMENT_BYTES
        )
    ]
