"""What an engine is told of new weights crosses the wire as plain data."""

from __future__ import annotations

from typing import Any

import pytest

from ipc.codec import pack, unpack
from ipc.errors import WireError
from ipc.weights import TRAINER_TIMEOUT_S, WeightsGroup, WeightSource

SOURCE = WeightSource(
    kind="broadcast",
    group_name="trainer",
    names=("a", "b"),
    dtypes=("bfloat16", "float32"),
    shapes=((2, 3), ()),
    timeout_s=2.5,
)
GROUP = WeightsGroup(
    master_address="10.0.0.1",
    master_port=29_500,
    rank=1,
    world_size=3,
    group_name="trainer",
    backend="gloo",
    timeout_s=2.5,
)


def test_L10_sources_and_groups_survive_the_wire() -> None:
    assert WeightSource.from_wire(unpack(pack(SOURCE.to_wire()))) == SOURCE
    assert WeightsGroup.from_wire(unpack(pack(GROUP.to_wire()))) == GROUP


def test_L10_a_sender_that_gives_no_time_gets_the_default() -> None:
    for cls, sent in ((WeightSource, SOURCE.to_wire()), (WeightsGroup, GROUP.to_wire())):
        del sent["timeout_s"]
        assert cls.from_wire(sent).timeout_s == TRAINER_TIMEOUT_S


@pytest.mark.parametrize("timeout_s", [0, -1.0, 1e9, float("nan"), float("inf"), "5", None, True])
def test_L12_a_time_that_no_clock_counts_is_refused(timeout_s: Any) -> None:
    for cls, sent in ((WeightSource, SOURCE.to_wire()), (WeightsGroup, GROUP.to_wire())):
        with pytest.raises(WireError, match=r"timeout_s"):
            cls.from_wire(sent | {"timeout_s": timeout_s})
