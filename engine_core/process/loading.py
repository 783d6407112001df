"""From a configuration to a core that can step."""

from __future__ import annotations

import dataclasses

from engine_core.batch import ModelRunner
from engine_core.config import SchedulerConfig
from engine_core.core import EngineCore
from engine_core.fake_runner import FakeRunner
from ipc.engine_config import EngineConfig

_FAKE_MAX_MODEL_LEN = 4096
_FAKE_NUM_BLOCKS = 1024


def load_core(config: EngineConfig, *, rank: int, num_local_engines: int) -> tuple[EngineCore, str]:
    """Load the model, or make the fake one. Returns the core and the name of its dtype.

    Raises ValueError or OSError, in one line that names the value and the remedy, for what the user
    can mend.
    """
    runner: ModelRunner
    if config.runner == "fake":
        max_model_len, dtype = config.max_model_len or _FAKE_MAX_MODEL_LEN, "float32"
        runner = FakeRunner(
            num_blocks=config.num_gpu_blocks_override or _FAKE_NUM_BLOCKS,
            block_size=config.block_size,
            max_num_seqs=config.max_num_seqs,
            max_model_len=max_model_len,
            step_time_ms=config.fake_step_time_ms,
        )
    else:
        # Imported only here: it brings torch, which engines with a fake runner start without.
        from engine_core.model.loader import load_runner

        # Engines of one launcher share its seed; drawn alike, they would answer alike.
        config = dataclasses.replace(config, seed=config.seed + rank)
        runner, resolved = load_runner(config, num_local_engines, rank % num_local_engines)
        max_model_len, dtype = resolved.max_model_len, resolved.dtype
    limits = SchedulerConfig(
        max_model_len=max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        block_size=config.block_size,
        enable_prefix_caching=config.enable_prefix_caching,
    )
    return EngineCore(limits, runner, engine_index=rank), dtype
