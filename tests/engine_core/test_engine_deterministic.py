"""With `deterministic` a request's tokens and log-probabilities are the same bits, whatever it is
batched or chunked with, preempted and recomputed or continued by another engine.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from engine_core.model.errors import ModelError
from engine_core.model.loader import load_runner
from engine_core.model.runner import TorchModelRunner
from engine_core.validation import NUM_RESUMED_TOKENS
from frontend.config import BUNDLED_MODEL_DIRECTORY
from ipc.engine_config import EngineConfig
from ipc.output import EventType
from kernels.cpu_linear import choose_block_rows
from kernels.cpu_team import Team
from kernels.cpu_tiles import TILE_ROWS
from kernels.cpu_weights import PackedWeight
from tests.support.core_driver import CoreDriver
from tests.support.linear_tasks import multiply, multiply_gated

NUM_OUTPUTS = 40
PROMPT_LENGTH = 45
MAX_MODEL_LEN = 192
BLOCK_SIZE = 8
PLACES = [
    ("float32", 2),
    ("bfloat16", 1),
    pytest.param(("float32", 1), marks=pytest.mark.slow),
    pytest.param(("bfloat16", 2), marks=pytest.mark.slow),
]
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "drawn": {
        "temperature": 1.0,
        "top_p": 0.95,
        "seed": 3,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.2,
        "repetition_penalty": 1.1,
    },
}


@functools.cache
def make_runner(dtype: Any, num_threads: int) -> TorchModelRunner:
    config = EngineConfig(
        model=str(BUNDLED_MODEL_DIRECTORY),
        dtype=dtype,
        device="cpu",
        num_threads=num_threads,
        block_size=BLOCK_SIZE,
        max_model_len=MAX_MODEL_LEN,
        num_gpu_blocks_override=1024,
        max_num_seqs=32,
        deterministic=True,
    )
    return load_runner(config)[0]


@dataclass
class Case:
    """One request, run in many ways."""

    runner: TorchModelRunner
    num_threads: int
    sampling: dict[str, Any]

    def driver(self, *, num_blocks: int = 1024, **limits: Any) -> CoreDriver:
        """A new engine; it uses the first `num_blocks` of the runner's cache."""
        torch.set_num_threads(self.num_threads)
        self.runner.num_blocks = num_blocks
        settings = {"max_num_seqs": 32, "max_num_batched_tokens": 512} | limits
        return CoreDriver(
            runner=self.runner, max_model_len=MAX_MODEL_LEN, block_size=BLOCK_SIZE, **settings
        )

    def add(self, driver: CoreDriver, *, resumed: Sequence[int] = (), **sampling: Any) -> None:
        extra_args = {NUM_RESUMED_TOKENS: len(resumed)} if resumed else None
        driver.add(
            "mine",
            [*self.prompt, *resumed],
            max_tokens=NUM_OUTPUTS,
            logprobs=4,
            extra_args=extra_args,
            **self.sampling | sampling,
        )

    @property
    def prompt(self) -> list[int]:
        rng = random.Random("mine")
        return [rng.randrange(3, self.runner.vocab_size) for _ in range(PROMPT_LENGTH)]

    def add_others(self, driver: CoreDriver, count: int) -> None:
        rng = random.Random(count)
        for index in range(count):
            prompt = [rng.randrange(3, self.runner.vocab_size) for _ in range(rng.randrange(1, 60))]
            driver.add(
                f"other-{index}",
                prompt,
                max_tokens=rng.randrange(20, 60),
                seed=index,
                top_k=rng.choice([0, 5]),
                top_p=rng.choice([0.9, 1.0]),
                logprobs=rng.choice([None, 2, 9]),
            )

    def alone(self) -> Answer:
        driver = self.driver()
        self.add(driver)
        return Answer.of(driver)


@dataclass
class Answer:
    """Tokens, and what is compared bit for bit."""

    token_ids: list[int]
    logprobs: list[tuple[list[Any], bytes, list[int]]]

    @classmethod
    def of(cls, driver: CoreDriver) -> Answer:
        """What the request was answered, once the engine has nothing left to do."""
        driver.run()
        logprobs = []
        for output in driver.outputs["mine"]:
            if output.new_logprobs is not None:
                ids, values, ranks = output.new_logprobs.arrays
                logprobs.append((ids.tolist(), values.tobytes(), ranks.tolist()))
        return cls(driver.tokens["mine"], logprobs)

    def since(self, start: int) -> Answer:
        return Answer(self.token_ids[start:], self.logprobs[start:])


@pytest.fixture(params=PLACES, ids=lambda place: f"{place[0]}, {place[1]} threads")
def place(request: pytest.FixtureRequest) -> tuple[str, int]:
    place: tuple[str, int] = request.param
    return place


@pytest.fixture(params=SAMPLINGS)
def case(request: pytest.FixtureRequest, place: tuple[str, int]) -> Case:
    return Case(make_runner(*place), place[1], SAMPLINGS[request.param])


def test_alone_twice(case: Case) -> None:
    answer = case.alone()
    assert len(answer.token_ids) == len(answer.logprobs) == NUM_OUTPUTS
    assert len(set(answer.token_ids)) > 10, "a model that repeats itself proves little"
    assert case.alone() == answer


@pytest.mark.parametrize("num_others", [1, 20])
def test_in_a_crowd(num_others: int, case: Case) -> None:
    driver = case.driver()
    case.add_others(driver, num_others)
    case.add(driver)
    assert Answer.of(driver) == case.alone()


@pytest.mark.parametrize("max_num_batched_tokens", [5, 17])
def test_in_chunks(max_num_batched_tokens: int, case: Case) -> None:
    driver = case.driver(max_num_seqs=4, max_num_batched_tokens=max_num_batched_tokens)
    case.add_others(driver, 2)
    case.add(driver)
    assert Answer.of(driver) == case.alone()


def test_from_the_prefix_cache(case: Case) -> None:
    driver = case.driver()
    driver.add("earlier", case.prompt, max_tokens=1)
    driver.run()
    case.add(driver)
    answer = Answer.of(driver)
    stats = driver.outputs["mine"][0].prefill_stats
    assert stats is not None
    assert stats.num_cached_tokens == PROMPT_LENGTH // BLOCK_SIZE * BLOCK_SIZE
    assert answer == case.alone()


def test_preempted_and_recomputed(case: Case) -> None:
    """A decoded position goes through the decode kernel, a recomputed one through prefill."""
    driver = case.driver(num_blocks=MAX_MODEL_LEN // BLOCK_SIZE + 1)
    case.add_others(driver, 4)
    case.add(driver)
    answer = Answer.of(driver)
    events = [event.type for output in driver.outputs["mine"] for event in output.events or ()]
    assert EventType.PREEMPTED in events
    assert answer == case.alone()


@pytest.mark.parametrize("num_resumed", [1, 3, 21, 39])
def test_continued_by_another_engine(num_resumed: int, case: Case) -> None:
    alone = case.alone()
    driver = case.driver(max_num_batched_tokens=33)
    case.add_others(driver, 3)
    case.add(driver, resumed=alone.token_ids[:num_resumed])
    assert Answer.of(driver) == alone.since(num_resumed)


def test_log_probabilities_of_the_prompt(place: tuple[str, int]) -> None:
    case = Case(make_runner(*place), place[1], SAMPLINGS["greedy"])
    chunks = {"max_num_seqs": 4, "max_num_batched_tokens": 9}
    found = []
    for limits, num_others in (({}, 0), (chunks, 2), ({}, 12)):
        driver = case.driver(**limits)
        case.add_others(driver, num_others)
        case.add(driver, prompt_logprobs=3)
        driver.run()
        logprobs = driver.outputs["mine"][0].prompt_logprobs
        assert logprobs is not None
        assert len(logprobs.ranks) == PROMPT_LENGTH - 1
        found.append([array.tobytes() for array in logprobs.arrays])
    assert found[0] == found[1] == found[2]


# -- what it rests on, in the shapes of a model with 0.6 billion parameters ----------------------


FORMS = {
    "float32": (torch.float32, False),
    "bfloat16": (torch.bfloat16, False),
    "int8": (torch.bfloat16, True),
}
SHAPES = [(4096, 1024), (1024, 2048), (1024, 3072)]
"""Of the projections of queries, keys and values, of attention's output, and down."""
NUM_ROWS = 3 * TILE_ROWS[-1] + 5

forms = pytest.mark.parametrize("form", FORMS)


def rows_of(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@functools.cache
def team(num_threads: int) -> Team:
    return Team(num_threads)


@functools.cache
def packed(form: str, shape: tuple[int, int], num_groups: int = 1) -> PackedWeight:
    dtype, to_int8 = FORMS[form]
    weight = rows_of(dtype, *shape) / 32
    return PackedWeight.pack([weight], num_groups=num_groups, to_int8=to_int8)


@forms
@pytest.mark.parametrize("shape", SHAPES)
def test_a_product_gives_a_row_the_same_bits_in_any_place_and_tile(
    shape: tuple[int, int], form: str
) -> None:
    dtype, _ = FORMS[form]
    weight, bias = packed(form, shape), rows_of(dtype, shape[0])
    x = rows_of(dtype, NUM_ROWS, shape[1])
    whole = multiply(team(2), weight, x, bias=bias)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    for num_threads in (1, 2, 3):
        assert torch.equal(multiply(team(num_threads), weight, x[order], bias=bias), whole[order])
    for block_rows in TILE_ROWS:
        for first, count in ((0, block_rows), (7, 2 * block_rows + 1), (NUM_ROWS - 1, 1)):
            at = slice(first, first + count)
            out = multiply(team(2), weight, x[at], bias=bias, block_rows=block_rows)
            assert torch.equal(out, whole[at])


@forms
def test_a_gated_product_gives_a_row_the_same_bits_in_any_batch(form: str) -> None:
    dtype, _ = FORMS[form]
    weight, x = packed(form, (6144, 1024), 2), rows_of(dtype, NUM_ROWS, 1024)
    whole = multiply_gated(team(2), weight, x, None)
    batches = (slice(first, last) for first in (0, 7) for last in (8, 9, 12, 24, 30, 60))
    seen = set()
    for at in batches:
        seen.add(choose_block_rows(len(x[at])))
        for num_threads in (1, 2):
            out = multiply_gated(team(num_threads), weight, x[at], None)
            assert torch.equal(out, whole[at])
    assert len(seen) >= 4, "batches of more sizes make more kinds of tiles"


def test_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    config = EngineConfig(model=str(BUNDLED_MODEL_DIRECTORY), deterministic=True)
    with pytest.raises(ModelError, match=r"deterministic=True.*use device='cpu'"):
        load_runner(config)
