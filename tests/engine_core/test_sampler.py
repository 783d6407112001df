"""Every sampling feature against a slow reference: alone, mixed, and over a sequence's steps."""

from __future__ import annotations

import os
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.utils._python_dispatch import TorchDispatchMode

from engine_core.batch import NO_TOKEN
from engine_core.model import sampler as sampler_module
from engine_core.model import sampling_ops
from engine_core.model.choosers import CompiledChooser, SlotParameters, TritonChooser
from engine_core.model.sampler import Sampler
from engine_core.model.sampling_ops import uniform_draws
from ipc.request import SamplingParams
from kernels import ops
from tests.support.sampler_cases import join, make_logits, random_params, sample
from tests.support.slow_sampler import chi_square_limit, edited_logits, pick, probabilities
from tests.support.tensor_chooser import TensorChooser

CPU = torch.device("cpu")
IS_INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(autouse=True, params=["triton"] if IS_INTERPRETING else ["compiled", "tensors"])
def chooser(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs with the compiled code of a CPU, and with the tensor operations that Triton's
    kernels are compared with; in Triton's interpreter (tests/kernels/test_triton_interpreted.py),
    with the kernels of a GPU."""
    if request.param == "tensors":
        monkeypatch.setattr(sampler_module, "make_chooser", lambda *_: TensorChooser())
    elif request.param == "triton":
        from kernels import triton_kernels

        monkeypatch.setattr(sampler_module, "make_chooser", TritonChooser)
        monkeypatch.setattr(ops, "implementation", lambda _: triton_kernels)
        monkeypatch.setattr(sampling_ops, "_rank_on_cpu", triton_kernels.rank)


GREEDY = SamplingParams(temperature=0.0)


def draw_counts(logits: torch.Tensor, params: SamplingParams, num_draws: int) -> NDArray[np.int64]:
    """How often each token of one row of logits is drawn, at `num_draws` positions of one seed."""
    sampler = Sampler(num_draws, logits.shape[1], CPU, seed=0)
    for slot in range(num_draws):
        join(sampler, slot, params)
    rows = logits.expand(num_draws, -1)
    tokens, _ = sample(sampler, rows, range(num_draws), range(1, num_draws + 1))
    return np.bincount(tokens, minlength=logits.shape[1])


DISTRIBUTIONS = {
    "temperature 1": SamplingParams(),
    "temperature 0.5": SamplingParams(temperature=0.5),
    "temperature 3": SamplingParams(temperature=3.0),
    "top-k 1": SamplingParams(top_k=1),
    "top-k 7": SamplingParams(top_k=7),
    "top-k beyond the vocabulary": SamplingParams(top_k=10**15),
    "top-k -1 is all": SamplingParams(top_k=-1),
    "top-p 0.5": SamplingParams(top_p=0.5),
    "top-p 0.97, hot": SamplingParams(top_p=0.97, temperature=5.0),
    "top-p almost 0": SamplingParams(top_p=1e-6),
    "min-p 0.2": SamplingParams(min_p=0.2),
    "min-p 1": SamplingParams(min_p=1.0),
    "all truncations": SamplingParams(temperature=2.0, min_p=0.05, top_k=12, top_p=0.8),
    "logit bias": SamplingParams(logit_bias={3: 4.0, 5: -100.0}),
    "allowed tokens": SamplingParams(allowed_token_ids=(1, 2, 30), temperature=1.5),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("seed", [1, 2])
def test_draws_follow_the_distribution(name: str, seed: int) -> None:
    params = DISTRIBUTIONS[name]
    values = {slot: getattr(params, slot) for slot in params.__slots__} | {"seed": seed}
    num_draws, logits = 3000, make_logits(1, 40)
    counts = draw_counts(logits, SamplingParams(**values), num_draws)
    expected = np.array(probabilities(edited_logits(logits[0].tolist(), params), params))
    assert counts[expected == 0].sum() == 0, "a token was drawn that is left out"
    expected *= num_draws
    rare = (expected < 5) & (expected > 0)  # pooled, for chi-square needs a handful of each
    cells = [(counts[i], expected[i]) for i in range(40) if expected[i] > 0 and not rare[i]]
    if rare.any():
        cells.append((counts[rare].sum(), expected[rare].sum()))
    statistic = sum((seen - wanted) ** 2 / wanted for seen, wanted in cells)
    assert statistic < chi_square_limit(len(cells) - 1) if len(cells) > 1 else statistic < 1e-9


def test_random_mixtures_of_features_match_the_reference_over_many_steps() -> None:
    """40 sequences of random parameters; some are preempted and rejoin in another slot."""
    vocab_size, num_slots, choose = 64, 40, random.Random(5)
    sampler = Sampler(2 * num_slots, vocab_size, CPU, seed=0)
    params = [random_params(choose, vocab_size) for _ in range(num_slots)]
    prompts = [[choose.randrange(vocab_size) for _ in range(6)] for _ in range(num_slots)]
    outputs: list[list[int]] = [[] for _ in range(num_slots)]
    slots = list(range(num_slots))
    for index in range(num_slots):
        join(sampler, slots[index], params[index], prompts[index])
    num_drawn = 0
    for step in range(16):
        chosen = sorted(choose.sample(range(num_slots), choose.randrange(1, num_slots)))
        logits = make_logits(len(chosen), vocab_size, seed=step)
        positions = [len(prompts[i]) + len(outputs[i]) for i in chosen]
        tokens, _ = sample(sampler, logits, [slots[i] for i in chosen], positions)
        for row, index in enumerate(chosen):
            edited = edited_logits(
                logits[row].tolist(), params[index], prompts[index], outputs[index]
            )
            seed = np.array([(params[index].seed or 0) % 2**64], np.uint64)
            uniform = uniform_draws(seed, np.array([positions[row]]))[0]
            expected, margin = pick(probabilities(edited, params[index]), uniform)
            num_drawn += params[index].temperature > 0
            assert tokens[row] == expected or margin < 1e-5
            outputs[index].append(tokens[row])
        moved = choose.randrange(num_slots)
        slots[moved] = (slots[moved] + num_slots) % (2 * num_slots)
        join(sampler, slots[moved], params[moved], prompts[moved], outputs[moved])
    assert num_drawn > 100


def test_a_nucleus_wider_than_the_first_look_is_found() -> None:
    """Of a nearly flat distribution over 1,700 tokens, the nucleus of 0.9 has some 1,500."""
    logits = torch.zeros(1, 2000)
    logits[0, :300] = -20.0
    logits[0] += 1e-4 * torch.arange(2000)  # no ties, which would be kept together
    counts = draw_counts(logits, SamplingParams(top_p=0.9, seed=3), 3000)
    distribution = np.array(probabilities(logits[0].tolist(), SamplingParams(top_p=0.9)))
    first_kept = int(np.flatnonzero(distribution)[0])
    assert counts[: first_kept - 1].sum() == 0
    assert first_kept > 400
    assert counts[first_kept + 1 :].sum() >= 2990
    assert (counts > 0).sum() > 1000


def test_tokens_of_equal_weight_at_the_edge_are_all_kept() -> None:
    """So a row's candidates cannot depend on how a sort happened to order ties."""
    logits = torch.tensor([[3.0, 1.0, 2.0, 2.0, 2.0]])
    assert (draw_counts(logits, SamplingParams(top_k=2, seed=1), 1000) > 0).tolist() == [
        True,
        False,
        True,
        True,
        True,
    ]


def test_a_tiny_temperature_is_greedy_and_a_small_one_nearly_so() -> None:
    logits = make_logits(1, 40)
    best = int(logits.argmax())
    for temperature in (0.0, 9e-6, 1e-4):
        assert draw_counts(logits, SamplingParams(temperature=temperature), 50)[best] == 50


def test_penalties_count_every_output_and_repetition_the_prompt_too() -> None:
    sampler = Sampler(3, 6, CPU, seed=0)
    logits = torch.tensor([[5.0, 4.9, 4.8, 1.0, -1.0, 0.0]]).repeat(3, 1)
    join(sampler, 0, SamplingParams(temperature=0.0, presence_penalty=1.0), [0], [])
    join(sampler, 1, SamplingParams(temperature=0.0, frequency_penalty=0.03), [0], [0, 0])
    join(sampler, 2, SamplingParams(temperature=0.0, repetition_penalty=1.05), [0], [])
    rows = [sample(sampler, logits, [0, 1, 2], [n, n + 2, n])[0] for n in range(1, 9)]
    # Presence: each of the first three once, then none has an advantage left and the first leads.
    assert [row[0] for row in rows[:4]] == [0, 1, 2, 0]
    # Frequency: two outputs at the join already put token 0 at 4.94, and it falls 0.03 a use.
    assert [row[1] for row in rows[:5]] == [0, 0, 1, 0, 1]
    # Repetition: the prompt's token 0 is at 4.76 from the start, so 1 (4.9) and 2 (4.8) go first.
    assert [row[2] for row in rows[:3]] == [1, 2, 0]


def test_stop_tokens_are_held_back_until_min_tokens() -> None:
    sampler = Sampler(1, 5, CPU, seed=0)
    params = SamplingParams(temperature=0.0, min_tokens=3, all_stop_token_ids=frozenset({0, 1}))
    join(sampler, 0, params, prompt=[4, 4])
    logits = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0]])
    tokens = [sample(sampler, logits, [0], [position])[0][0] for position in range(2, 7)]
    assert tokens == [2, 2, 2, 0, 0]


def test_ids_outside_the_vocabulary_change_nothing() -> None:
    sampler = Sampler(1, 5, CPU, seed=0)
    params = SamplingParams(
        temperature=0.0,
        logit_bias={7: 100.0},
        allowed_token_ids=(2, 3, 99),
        min_tokens=1,
        all_stop_token_ids=frozenset({1000}),
    )
    join(sampler, 0, params)
    assert sample(sampler, torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0]]), [0], [1])[0] == [2]


@pytest.mark.parametrize(
    "extreme",
    [
        {"temperature": 1e300},
        {"repetition_penalty": 1e300},
        {"repetition_penalty": 1e-300},
        {"logit_bias": {2: 1e300}},
        {"logit_bias": {2: -1e300}},
    ],
)
def test_numbers_that_float32_cannot_hold_let_no_forbidden_token_through(
    extreme: dict[str, Any],
) -> None:
    sampler = Sampler(1, 5, CPU, seed=0)
    join(sampler, 0, SamplingParams(allowed_token_ids=(2, 3), seed=1, **extreme), prompt=[0, 2, 3])
    logits = torch.tensor([[5.0, 4.0, 3.0, -2.0, 1.0]])
    tokens = {sample(sampler, logits, [0], [position])[0][0] for position in range(3, 40)}
    assert tokens <= {2, 3}
    if extreme.get("logit_bias") == {2: 1e300}:
        assert tokens == {2}


def test_logprobs_are_the_models_own_before_any_edit() -> None:
    vocab_size = 30
    sampler = Sampler(4, vocab_size, CPU, seed=0)
    logits = make_logits(4, vocab_size)
    best = logits[0].argsort(descending=True).tolist()
    edits = SamplingParams(
        temperature=0.0,
        logit_bias={best[7]: 100.0},
        presence_penalty=2.0,
        repetition_penalty=2.0,
        logprobs=3,
    )
    join(sampler, 0, edits, prompt=[best[0]])
    join(sampler, 1, SamplingParams(temperature=0.0, logprobs=0))
    join(sampler, 2, SamplingParams(temperature=0.7, seed=5, top_k=3, logprobs=-1))
    join(sampler, 3, GREEDY)
    tokens, logprobs = sample(sampler, logits, [0, 1, 2, 3], [1] * 4)
    assert tokens[0] == best[7]
    assert sorted(logprobs) == [0, 1, 2]
    for slot, num_columns in ((0, 4), (1, 1), (2, vocab_size + 1)):
        lists, expected = logprobs[slot], logits[slot].log_softmax(dim=-1).numpy()
        assert lists.token_ids.shape == lists.logprobs.shape == (1, num_columns)
        assert lists.token_ids.dtype == np.int32
        assert lists.logprobs.dtype == np.float32
        assert lists.token_ids[0, 0] == tokens[slot]
        np.testing.assert_allclose(lists.logprobs[0], expected[lists.token_ids[0]], atol=1e-6)
        alternatives = lists.logprobs[0, 1:]
        assert (np.diff(alternatives) <= 0).all()
        assert lists.ranks.tolist() == [(expected >= expected[tokens[slot]]).sum()]
    assert logprobs[0].token_ids[0].tolist() == [best[7], *best[:3]]
    assert logprobs[0].ranks.tolist() == [8]


def test_a_slot_forgets_its_former_sequence() -> None:
    sampler = Sampler(1, 5, CPU, seed=0)
    logits = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0]])
    everything = SamplingParams(
        temperature=0.0,
        logit_bias={0: -100.0},
        allowed_token_ids=(3, 4),
        frequency_penalty=2.0,
        min_tokens=9,
        all_stop_token_ids=frozenset({1}),
        logprobs=2,
    )
    join(sampler, 0, everything, prompt=[1], outputs=[3] * 5)
    assert sample(sampler, logits, [0], [6])[0] == [4]
    join(sampler, 0, GREEDY)
    assert sample(sampler, logits, [0], [1]) == ([0], {})
    join(sampler, 0, SamplingParams(temperature=0.0, frequency_penalty=0.4), outputs=[0])
    assert sample(sampler, logits, [0], [2])[0] == [0]
    repetition = SamplingParams(temperature=0.0, repetition_penalty=1.5)
    join(sampler, 0, repetition, prompt=[0])
    assert sample(sampler, logits, [0], [1])[0] == [1]
    join(sampler, 0, repetition, prompt=[4])
    assert sample(sampler, logits, [0], [1])[0] == [0]


class RecordedOps(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Names of the tensor operations that ran inside the `with` block."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


BROKEN_ROWS = {
    "all NaN": [torch.nan] * 100,
    "one NaN": [*[0.5] * 99, torch.nan],
    "one infinity": [0.5, torch.inf, *[0.5] * 98],
    "nothing but minus infinities": [-torch.inf] * 100,
}


@pytest.mark.parametrize("row", BROKEN_ROWS.values(), ids=BROKEN_ROWS)
@pytest.mark.parametrize(
    "params",
    [
        GREEDY,
        SamplingParams(),
        SamplingParams(min_p=0.1, top_k=7, top_p=0.5),
        SamplingParams(top_k=90, top_p=0.999),
        SamplingParams(presence_penalty=1.0, repetition_penalty=1.2, logprobs=3),
        SamplingParams(temperature=0.0, logit_bias={3: 5.0}, logprobs=0),
    ],
    ids=range(6),
)
def test_L2_a_row_that_is_not_finite_gets_no_token_and_its_neighbours_get_theirs(
    row: list[float], params: SamplingParams
) -> None:
    logits = make_logits(3, 100)
    for among in ([GREEDY, params, GREEDY], [params] * 3):
        sampler = Sampler(3, 100, CPU, seed=0)
        for slot, each in enumerate(among):
            join(sampler, slot, replace(each, seed=7))
        expected, of_expected = sample(sampler, logits[[0, 2]], [0, 2], [1, 1])
        for slot, each in enumerate(among):
            join(sampler, slot, replace(each, seed=7))
        broken = logits.clone()
        broken[1] = torch.tensor(row)
        tokens, of_rows = sample(sampler, broken, [0, 1, 2], [1, 1, 1])
        assert tokens == [expected[0], NO_TOKEN, expected[1]]
        assert min(expected) >= 0
        for slot, of_row in of_expected.items():
            assert np.array_equal(of_rows[slot].logprobs, of_row.logprobs)


def test_nobody_pays_for_features_that_no_row_uses(request: pytest.FixtureRequest) -> None:
    sampler = Sampler(8, 100, CPU, seed=0)
    for slot in range(4):
        join(sampler, slot, GREEDY)
        join(sampler, slot + 4, SamplingParams(temperature=0.8, min_p=0.1))
    logits = make_logits(8, 100)
    with RecordedOps() as greedy:
        sample(sampler, logits[:4], range(4), [1] * 4)
    with RecordedOps() as drawn:
        sample(sampler, logits, range(8), [1] * 8)
    if "compiled" in request.node.name:
        views = {"slice", "clone", "detach", "alias", "unbind", "lift_fresh"}  # one clone is ours
        assert greedy.names <= views | {"empty"}
        assert drawn.names <= views | {"empty"}


def test_no_operation_of_a_step_waits_for_the_device_but_the_copy_at_its_end() -> None:
    """These are the operations that must know a tensor's values to go on."""
    sampler, logits = Sampler(2, 100, CPU, seed=0), make_logits(2, 100)
    everything = SamplingParams(
        top_k=5,
        top_p=0.9,
        min_p=0.01,
        frequency_penalty=1.0,
        logit_bias={1: 2.0},
        allowed_token_ids=tuple(range(50)),
        min_tokens=3,
        all_stop_token_ids=frozenset({2}),
        logprobs=3,
    )
    join(sampler, 0, everything)
    join(sampler, 1, GREEDY)
    with RecordedOps() as recorded:
        sample(sampler, logits, [0, 1], [1, 1])
    assert "topk" in recorded.names
    waiting = {"_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal"}
    assert not recorded.names & waiting


def test_what_rows_use_is_looked_up_again_when_other_rows_come_or_a_slot_changes_hands() -> None:
    sampler = Sampler(3, 5, CPU, seed=0)
    logits = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0]]).repeat(2, 1)
    join(sampler, 0, GREEDY)
    join(sampler, 1, SamplingParams(temperature=0.0, logit_bias={0: -9.0}))
    join(sampler, 2, SamplingParams(temperature=0.0, logit_bias={4: 9.0}, logprobs=0))
    assert sample(sampler, logits, [0, 1], [1, 1]) == ([0, 1], {})
    assert sample(sampler, logits, [1, 0], [1, 1]) == ([1, 0], {})
    tokens, logprobs = sample(sampler, logits, [1, 2], [1, 1])
    assert (tokens, list(logprobs)) == ([1, 4], [2])
    join(sampler, 2, GREEDY)
    assert sample(sampler, logits, [1, 2], [1, 1]) == ([1, 0], {})


@pytest.mark.parametrize("vocab_size", [1, 2, 255, 256, 257, 5000, 150_000])
def test_compiled_code_and_tensor_operations_choose_alike(vocab_size: int) -> None:
    num_rows, choose = 50, np.random.default_rng(vocab_size)
    parameters = SlotParameters(num_rows)
    parameters.temperature[:] = choose.choice([0, 0.5, 1, 3], num_rows)
    parameters.min_p[:] = choose.choice([0, 0, 0.01, 0.5], num_rows)
    parameters.top_k[:] = np.minimum(choose.choice([1, 20, 400, 3000, 10**6], num_rows), vocab_size)
    parameters.top_p[:] = choose.choice([1, 1, 0.5, 0.95], num_rows)
    parameters.seeds[:] = choose.integers(2**63, size=num_rows)
    rows = parameters.of(np.arange(num_rows), CPU)
    num_different, num_rounds = 0, 4
    for position in range(num_rounds):
        logits = make_logits(num_rows, vocab_size, position)
        positions = torch.full((num_rows,), position)
        compiled = CompiledChooser(vocab_size).choose(logits.clone(), rows, positions)
        tensors = TensorChooser().choose(logits.clone(), rows, positions)
        num_different += int((compiled != tensors).sum())
        assert compiled.min() >= 0
        assert (compiled == tensors)[rows.temperature == 0].all()
    # A draw within rounding of the edge between two tokens may fall on either side.
    assert num_different <= 0.02 * num_rounds * num_rows


@pytest.mark.parametrize("vocab_size", [40, 5000])
def test_a_row_is_the_same_bits_whatever_stands_beside_it(
    vocab_size: int, request: pytest.FixtureRequest
) -> None:
    """Of tokens and of log-probabilities; tensor operations promise it of tokens alone."""
    choose, num_rows = random.Random(3), 30
    everyone = [replace(random_params(choose, vocab_size), logprobs=3) for _ in range(num_rows)]
    logits = make_logits(num_rows, vocab_size)
    together, alone = Sampler(num_rows, vocab_size, CPU, 0), Sampler(1, vocab_size, CPU, 0)
    for slot, params in enumerate(everyone):
        join(together, slot, replace(params, logprobs=choose.choice([2, 7])))
    tokens, reports = sample(together, logits, range(num_rows), [5] * num_rows)
    for slot in range(num_rows):
        num_logprobs = reports[slot].token_ids.shape[1] - 1
        join(alone, 0, replace(everyone[slot], logprobs=num_logprobs))
        (token,), report = sample(alone, logits[slot : slot + 1], [0], [5])
        assert token == tokens[slot]
        if "compiled" in request.node.name:
            assert report[0] == reports[slot]
