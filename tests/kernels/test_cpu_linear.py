"""Packed weights: the layout, the rounding to int8, and products against float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.cpu_linear import MAX_TILE_ROWS, choose_block_rows
from kernels.cpu_team import Team
from kernels.cpu_tiles import TILE_ROWS
from kernels.cpu_weights import PackedWeight
from tests.support.linear_tasks import multiply, multiply_gated

FORMS = {
    "float32": (torch.float32, False),
    "bfloat16": (torch.bfloat16, False),
    "int8": (torch.bfloat16, True),
}
SHAPES = [(1, 2), (15, 4), (16, 32), (100, 2), (211, 38), (130, 300)]
"""Outputs, which rarely fill panels, and inputs."""
ROW_COUNTS = [*range(1, 30), 47, 64, 97, 100]

forms = pytest.mark.parametrize("form", FORMS)


@pytest.fixture(scope="module")
def team() -> Iterator[Team]:
    team = Team(2)
    yield team
    team.close()


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def levels_of(packed: PackedWeight) -> Tensor:
    """[outputs, inputs] as they are stored: integers if int8."""
    rows = packed.numbers.transpose(2, 3).flatten(3).flatten(1, 2)
    return rows[:, : packed.num_outputs].flatten(0, 1)


def scales_of(packed: PackedWeight) -> Tensor:
    """[outputs, 1] float32."""
    assert packed.scales is not None
    return packed.scales[:, : packed.num_outputs].reshape(-1, 1)


def exact_weight(packed: PackedWeight) -> Tensor:
    """[outputs, inputs] float64: what is multiplied by, without a rounding."""
    levels = levels_of(packed).double()
    return levels if packed.scales is None else levels * scales_of(packed).double()


# -- packing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_groups", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (17, 6)])
def test_unpacking_gives_back_what_was_packed(
    shape: tuple[int, int], dtype: torch.dtype, num_groups: int
) -> None:
    num_outputs, num_inputs = shape
    weight = numbers(0, num_groups * num_outputs, num_inputs).to(dtype)
    packed = PackedWeight.pack([weight], num_groups=num_groups)
    assert torch.equal(packed.unpack(), weight)
    assert packed.num_outputs == num_outputs
    filled = packed.numbers.transpose(2, 3).flatten(3).flatten(1, 2)[:, num_outputs:]
    assert not filled.any()


@forms
@pytest.mark.parametrize("num_groups", [1, 2, 5])
def test_tensors_one_below_the_other_pack_as_one(num_groups: int, form: str) -> None:
    """Wherever one ends and the next begins: in a panel, in a group, over several groups."""
    dtype, to_int8 = FORMS[form]
    weight = numbers(0, 170, 6).to(dtype)
    whole = PackedWeight.pack([weight], num_groups=num_groups, to_int8=to_int8)
    for sizes in ([100, 35, 35], [1, 168, 1], [34] * 5, [85, 85]):
        pieces = torch.split(weight, sizes)
        packed = PackedWeight.pack(pieces, num_groups=num_groups, to_int8=to_int8)
        assert torch.equal(packed.numbers, whole.numbers)
        if to_int8:
            assert torch.equal(scales_of(packed), scales_of(whole))


@forms
def test_threads_that_share_the_packing_pack_as_one(form: str) -> None:
    """Pieces of a thread end within tensors, at their ends and at those of groups."""
    dtype, to_int8 = FORMS[form]
    pieces = torch.split(numbers(0, 2 * 2060, 6).to(dtype), [1500, 700, 1920])
    alone, shared = (
        PackedWeight.pack(pieces, num_groups=2, to_int8=to_int8, num_threads=number)
        for number in (1, 4)
    )
    assert torch.equal(alone.unpack(), torch.cat(pieces)) or to_int8
    assert torch.equal(alone.numbers, shared.numbers)
    if to_int8:
        assert torch.equal(scales_of(alone), scales_of(shared))


def test_float32_takes_an_odd_number_of_inputs_and_a_view_of_a_wider_tensor() -> None:
    for weight in (numbers(0, 33, 7), numbers(0, 33, 20)[:, 4:11], numbers(0, 7, 33).T):
        assert torch.equal(PackedWeight.pack([weight]).unpack(), weight)


@pytest.mark.parametrize("to_int8", [False, True])
def test_an_odd_number_of_inputs_is_refused_in_bfloat16(to_int8: bool) -> None:
    with pytest.raises(ValueError, match="a bfloat16 weight has 7 inputs; an even number"):
        PackedWeight.pack([numbers(0, 16, 7).bfloat16()], to_int8=to_int8)


def test_int8_is_refused_with_float32() -> None:
    with pytest.raises(ValueError, match=r"multiply bfloat16 activations, not torch\.float32"):
        PackedWeight.pack([numbers(0, 16, 8)], to_int8=True)


# -- int8 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_groups", [1, 2])
def test_int8_moves_no_weight_by_more_than_half_a_step_of_its_output(num_groups: int) -> None:
    weight = numbers(0, num_groups * 100, 300) * numbers(1, num_groups * 100, 1).exp()
    weight = weight.bfloat16()
    packed = PackedWeight.pack([weight], num_groups=num_groups, to_int8=True)
    error = (exact_weight(packed) - weight.double()).abs()
    assert (error <= scales_of(packed) * (0.5 + 1e-5)).all()
    levels = levels_of(packed)
    assert levels.amin() >= -127
    assert (levels.int().abs().amax(dim=1) == 127).all()
    expected = scales_of(packed) * 127
    assert torch.allclose(expected, weight.float().abs().amax(dim=1, keepdim=True), rtol=1e-6)


def test_int8_keeps_outputs_of_zeros() -> None:
    weight = numbers(0, 20, 8).bfloat16()
    weight[[0, 7, 19]] = 0
    packed = PackedWeight.pack([weight], to_int8=True)
    zeros = ~packed.unpack().any(dim=1)
    assert zeros.nonzero().flatten().tolist() == [0, 7, 19]


def test_rounding_an_unpacked_int8_weight_again_changes_nothing() -> None:
    """All integers, with every mantissa that an output's greatest weight may have; so updates of
    some rows of a stacked weight leave the others alone."""
    largest = 1 + torch.arange(128) / 128
    weight = torch.arange(-127, 127) * (largest / 127)[:, None]
    weight[:, 0] = largest
    packed = PackedWeight.pack([weight.bfloat16()], to_int8=True)
    assert set(levels_of(packed).flatten().tolist()) == set(range(-126, 128))
    again = PackedWeight.pack([packed.unpack()], to_int8=True)
    assert torch.equal(again.numbers, packed.numbers)
    assert torch.equal(scales_of(again), scales_of(packed))


# -- multiplying ---------------------------------------------------------------------------------


def assert_near(out: Tensor, expected: Tensor, magnitude: Tensor, roundoff: float = 1e-5) -> None:
    """`magnitude`: the sum of what is added up, without signs."""
    assert ((out.double() - expected).abs() <= roundoff * magnitude + 1e-30).all()


@forms
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_those_of_float64(shape: tuple[int, int], form: str, team: Team) -> None:
    dtype, to_int8 = FORMS[form]
    packed = PackedWeight.pack([numbers(0, *shape).to(dtype)], to_int8=to_int8)
    weight, bias = exact_weight(packed), numbers(2, shape[0]).to(dtype)
    for num_rows in ROW_COUNTS:
        x = numbers(num_rows, num_rows, shape[1]).to(dtype)
        before = numbers(3, num_rows, shape[0])
        expected = x.double() @ weight.T
        magnitude = x.double().abs() @ weight.T.abs() + before.abs() + bias.double().abs()
        assert_near(multiply(team, packed, x), expected, magnitude)
        with_bias = multiply(team, packed, x, bias=bias)
        assert_near(with_bias, expected + bias.double(), magnitude)
        added = multiply(team, packed, x, bias=bias, add_to=before)
        assert torch.equal(added, before + with_bias)


@forms
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", [(2, 2), (16, 32), (106, 38), (704, 64)])
def test_gated_products_are_those_of_float64(
    shape: tuple[int, int], has_bias: bool, form: str, team: Team
) -> None:
    dtype, to_int8 = FORMS[form]
    num_outputs, num_inputs = shape
    packed = PackedWeight.pack(
        [numbers(0, 2 * num_outputs, num_inputs).to(dtype)], num_groups=2, to_int8=to_int8
    )
    bias = numbers(1, 2 * num_outputs).to(dtype) if has_bias else None
    for num_rows in ROW_COUNTS:
        x = numbers(num_rows, num_rows, num_inputs).to(dtype)
        both = x.double() @ exact_weight(packed).T + (0 if bias is None else bias.double())
        gate, up = both.chunk(2, dim=1)
        expected = F.silu(gate) * up
        out = multiply_gated(team, packed, x, bias)
        assert out.dtype == dtype
        roundoff = 1e-5 if dtype is torch.float32 else 2**-8
        gate_size, up_size = (x.double().abs() @ exact_weight(packed).abs().T).chunk(2, dim=1)
        # A sum that cancels is off by its terms' roundings, which the other factor multiplies.
        slack = 1e-5 * (gate_size * up.abs() + gate.abs() * up_size + gate_size)
        assert ((out.double() - expected).abs() <= roundoff * expected.abs() + slack).all()


@forms
def test_the_activation_is_right_far_out(form: str, team: Team) -> None:
    """silu of -1e4 is 0, of 1e4 itself; neither is NaN."""
    dtype, to_int8 = FORMS[form]
    weight = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0], [0.0, 0.0]]).to(dtype)
    packed = PackedWeight.pack([weight], num_groups=2, to_int8=to_int8)
    gates = torch.tensor([-1e4, -200.0, -88.0, -1.0, 0.0, 1.0, 1e4])
    x = torch.stack([gates, torch.ones(7)], dim=1).to(dtype)
    out = multiply_gated(team, packed, x, None)
    assert torch.allclose(out[:, 0].float(), F.silu(x[:, 0].float()), rtol=2**-7, atol=1e-30)


@pytest.mark.parametrize("num_rows", ROW_COUNTS)
def test_blocks_have_the_rows_of_a_tile_and_few_of_them_empty(num_rows: int) -> None:
    block_rows = choose_block_rows(num_rows)
    assert block_rows in TILE_ROWS
    filled = -(-num_rows // block_rows) * block_rows
    assert filled - num_rows < max(num_rows, 8)
    if num_rows <= MAX_TILE_ROWS:
        assert block_rows >= num_rows
