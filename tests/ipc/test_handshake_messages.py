"""The handshake's maps: what is required, what is optional, what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from ipc import expect
from ipc.codec import pack, unpack
from ipc.errors import WireError
from ipc.handshake import (
    Hello,
    Init,
    Ready,
    Registration,
    decode_handshake,
    engine_identity,
    rank_of,
)
from tests.support.golden_frames import WHOLE_GOLDEN

REGISTRATION = expect.mapping(unpack(WHOLE_GOLDEN["READYRESP"][0]), "registration")
REQUIRED = list(REGISTRATION)[:17]


@pytest.mark.parametrize(("rank", "identity"), [(0, b"\0\0"), (1, b"\1\0"), (258, b"\2\1")])
def test_an_identity_is_the_rank_in_two_bytes(rank: int, identity: bytes) -> None:
    assert engine_identity(rank) == identity
    assert rank_of(identity) == rank


def test_ranks_and_identities_out_of_range_are_refused() -> None:
    for rank in (-1, 65536):
        with pytest.raises(WireError, match="rank"):
            engine_identity(rank)
    for identity in (b"", b"\0", b"\0\0\0", b"engine-0"):
        with pytest.raises(WireError, match="two bytes"):
            rank_of(identity)


def test_hello_and_ready_are_told_apart() -> None:
    assert decode_handshake(Hello(True, False).encode()) == Hello(True, False)
    assert decode_handshake(Ready(False, True).encode()) == Ready(False, True)
    with pytest.raises(WireError, match=r"hello\.status"):
        Hello.decode(Ready(True, False).encode())
    with pytest.raises(WireError, match=r"ready\.status"):
        Ready.decode(Hello(True, False).encode())


def test_a_ready_carries_the_hash_of_a_parallel_engine() -> None:
    ready = Ready(False, True, "abc")
    assert Ready.decode(ready.encode()) == ready
    assert unpack(ready.encode()) == {
        "status": "READY",
        "local": False,
        "headless": True,
        "parallel_config_hash": "abc",
    }


def test_flags_may_be_missing_and_keys_may_be_unknown() -> None:
    assert decode_handshake(pack({"status": "HELLO", "new": [1]})) == Hello(True, False)


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        {},
        {"status": "BYE"},
        {"status": ["HELLO"]},
        {"status": "HELLO", "local": 1},
        {"status": "READY", "headless": None},
        {"status": "READY", "parallel_config_hash": 5},
    ],
)
def test_other_handshakes_are_refused(value: object) -> None:
    with pytest.raises(WireError, match=r"^handshake"):
        decode_handshake(pack(value))


# ── INIT ──────────────────────────────────────────────────────────────────────────────────────────


def test_an_init_needs_inputs_and_outputs_only() -> None:
    payload = pack({"addresses": {"inputs": ["i"], "outputs": ["o"]}, "parallel_config": {}})
    assert Init.decode(payload) == Init(("i",), ("o",))


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ({"parallel_config": {}}, "init.addresses"),
        ({"addresses": {"inputs": ["i"], "outputs": ["o"]}}, "init.parallel_config"),
        ({"addresses": {"outputs": ["o"]}, "parallel_config": {}}, "init.addresses.inputs"),
        (
            {"addresses": {"inputs": ["i"], "outputs": [5]}, "parallel_config": {}},
            r"init.addresses.outputs\[0\]",
        ),
        ({"addresses": {"inputs": [], "outputs": []}, "parallel_config": {}}, "at least one"),
        (
            {"addresses": {"inputs": ["a", "b"], "outputs": ["c"]}, "parallel_config": {}},
            "as many outputs as inputs",
        ),
        (
            {
                "addresses": {"inputs": ["a"], "outputs": ["c"], "coordinator_input": 5},
                "parallel_config": {},
            },
            "init.addresses.coordinator_input",
        ),
    ],
)
def test_a_bad_init_is_refused_by_path(value: object, path: str) -> None:
    with pytest.raises(WireError, match=path):
        Init.decode(pack(value))


# ── registration ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", REQUIRED)
def test_each_of_the_17_keys_is_required(name: str) -> None:
    fields = {key: value for key, value in REGISTRATION.items() if key != name}
    with pytest.raises(WireError, match=f"required key '{name}' is missing"):
        Registration.decode(pack(fields))


def test_the_other_keys_are_optional_and_unknown_ones_are_ignored() -> None:
    fields: dict[Any, Any] = {name: REGISTRATION[name] for name in REQUIRED}
    assert Registration.decode(pack(fields | {"coord_store_port": 0, "new": [1]})) == (
        Registration(**fields)
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_model_len", None),
        ("max_model_len", True),
        ("block_size", -1),
        ("dtype", None),
        ("supports_lora", 0),
        ("instance_id", 5),
        ("dp_stats_address", 5),
        ("kv_cache_max_concurrency", "x"),
        ("enable_sleep_mode", None),
        ("caesura", 1),
        ("caesura", {"protocol": "1"}),
    ],
)
def test_a_bad_value_is_refused_by_path(name: str, value: object) -> None:
    with pytest.raises(WireError, match=f"registration.{name}"):
        Registration.decode(pack(REGISTRATION | {name: value}))


@pytest.mark.parametrize("dtype", ["auto", "half", "float64", "torch.bfloat16"])
def test_a_dtype_that_vllm_rs_refuses_is_never_sent(dtype: str) -> None:
    registration = Registration.decode(WHOLE_GOLDEN["READYRESP"][0])
    with pytest.raises(WireError, match=r"registration\.dtype"):
        dataclasses.replace(registration, dtype=dtype).encode()


def test_a_registration_must_not_be_empty() -> None:
    with pytest.raises(WireError):
        Registration.decode(b"")
