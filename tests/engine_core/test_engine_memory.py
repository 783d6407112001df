"""An engine process that serves a real model does not grow with the requests that hang up.

Hang-ups leave steps of every size behind: whatever is kept for each size (compiled kernels, buffers
between them) has to come to an end.
"""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path

from frontend.config import BUNDLED_MODEL_DIRECTORY
from ipc.engine_config import EngineConfig
from tests.support.scripted_frontend import ScriptedFrontend

CONFIG = EngineConfig(
    model=str(BUNDLED_MODEL_DIRECTORY),
    device="cpu",
    num_threads=1,
    max_model_len=2048,
    max_num_seqs=256,
    max_num_batched_tokens=1024,
    num_gpu_blocks_override=256,
)
NUM_HANG_UPS_A_ROUND = 250
ROUNDS_TO_WARM_UP = 6
ROUNDS_MEASURED = 12
MAX_GROWTH_BYTES = 130 * 2**20
"""Measured: 60 MiB, and 200 when each row count had a kernel of its own."""


def resident_bytes(process_id: int) -> int:
    statm = Path(f"/proc/{process_id}/statm").read_text(encoding="ascii")
    return int(statm.split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def hang_up_round(frontend: ScriptedFrontend, rng: random.Random, name: str) -> None:
    """Requests that would run for long, with prompts of many lengths, leave in groups."""
    live = [f"{name}-{number}" for number in range(NUM_HANG_UPS_A_ROUND)]
    for request_id in live:
        prompt = [rng.randrange(3, 500) for _ in range(rng.randint(5, 40))]
        await frontend.add(request_id, prompt, max_tokens=2000, temperature=rng.choice([0.0, 0.8]))
    await frontend.next_output(live[0])
    while live:
        num_gone = rng.randint(1, 40)
        gone, live = live[:num_gone], live[num_gone:]
        await frontend.abort(gone)
        if live:
            frontend.unread(live[0])
            await frontend.next_output(live[0])


async def test_L11_thousands_of_hang_ups_leave_an_engine_as_large_as_hundreds() -> None:
    rng = random.Random(1)
    async with ScriptedFrontend() as frontend:
        await frontend.start(CONFIG)
        process_id = frontend.processes[0].pid
        sizes = []
        async with asyncio.timeout(90):
            for number in range(ROUNDS_TO_WARM_UP + ROUNDS_MEASURED):
                await hang_up_round(frontend, rng, f"round{number}")
                sizes.append(resident_bytes(process_id))
        status = await frontend.status()
    print("MiB:", [size >> 20 for size in sizes])
    assert (status.num_running, status.num_waiting) == (0, 0)
    assert status.num_free_blocks + status.num_cached_blocks == status.num_blocks
    assert sizes[-1] - sizes[ROUNDS_TO_WARM_UP - 1] < MAX_GROWTH_BYTES
