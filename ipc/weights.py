"""The payloads of Caesura's own weight update utilities.

An update has an id of its sender's choice. Its tensors arrive in one or more parts, each loaded and
checked beside the weights that serve (`stage`); then they take effect together, between two steps
(`commit`), or not at all (`discard`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast, get_args

from ipc import expect
from ipc.errors import mismatch

CAESURA_STAGE_WEIGHTS = "caesura_stage_weights"
"""Arguments: update id, WeightSource. Result, late: StagedReceipt."""
CAESURA_COMMIT_WEIGHTS = "caesura_commit_weights"
"""Arguments: update id, version (or nil: the label stays). Result: the version from now on."""
CAESURA_DISCARD_WEIGHTS = "caesura_discard_weights"
"""Argument: update id. Result: whether anything was staged under it."""
CAESURA_JOIN_WEIGHTS_GROUP = "caesura_join_weights_group"
"""Argument: WeightsGroup. Result, late: nil."""
CAESURA_LEAVE_WEIGHTS_GROUP = "caesura_leave_weights_group"
"""Argument: the group's name. Result: nil."""

SourceKind = Literal["disk", "file", "broadcast"]

TRAINER_TIMEOUT_S = 300.0
"""How long an engine waits for a trainer that says nothing, unless it is told otherwise."""
_MAX_TIMEOUT_S = 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSource:
    """Where tensors of an update come from."""

    kind: SourceKind
    """`disk`: a model directory with every tensor of the model; `file`: one safetensors file with
    some tensors, as in shared memory; `broadcast`: tensors that a trainer sends to a group."""
    path: str = ""
    """Of the directory or file, on the engine's machine."""
    checksum: str | None = None
    """What the tensors must sum up to, if their sender says; see `engine_core`'s checksum."""
    group_name: str = ""
    names: tuple[str, ...] = ()
    """Of a broadcast, the tensors in the order in which they are sent; so `dtypes`, `shapes`."""
    dtypes: tuple[str, ...] = ()
    """Such as bfloat16."""
    shapes: tuple[tuple[int, ...], ...] = ()
    timeout_s: float = TRAINER_TIMEOUT_S
    """Of a broadcast: all its tensors must have come by then."""

    def to_wire(self) -> dict[str, object]:
        return {
            "kind": self.kind,
            "path": self.path,
            "checksum": self.checksum,
            "group_name": self.group_name,
            "names": list(self.names),
            "dtypes": list(self.dtypes),
            "shapes": [list(shape) for shape in self.shapes],
            "timeout_s": self.timeout_s,
        }

    @classmethod
    def from_wire(cls, value: object, path: str = "weight_source") -> WeightSource:
        fields = expect.mapping(value, path)
        kind = fields.get("kind")
        if kind not in get_args(SourceKind):
            raise mismatch(f"{path}.kind", kind, f"one of {', '.join(get_args(SourceKind))}")
        names = expect.texts(fields.get("names", []), f"{path}.names")
        dtypes = expect.texts(fields.get("dtypes", []), f"{path}.dtypes")
        shapes = [
            tuple(
                expect.count(size, f"{path}.shapes")
                for size in expect.array(shape, f"{path}.shapes", 0)
            )
            for shape in expect.array(fields.get("shapes", []), f"{path}.shapes", 0)
        ]
        if not len(names) == len(dtypes) == len(shapes):
            raise mismatch(
                path, [len(names), len(dtypes), len(shapes)], "as many names as dtypes and shapes"
            )
        return cls(
            kind=cast(SourceKind, kind),
            path=expect.text(fields.get("path", ""), f"{path}.path"),
            checksum=expect.optional(expect.text, fields.get("checksum"), f"{path}.checksum"),
            group_name=expect.text(fields.get("group_name", ""), f"{path}.group_name"),
            names=tuple(names),
            dtypes=tuple(dtypes),
            shapes=tuple(shapes),
            timeout_s=_timeout_s(fields, path),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsGroup:
    """A process group of `torch.distributed` over which a trainer (rank 0) broadcasts."""

    master_address: str
    master_port: int
    rank: int
    """This engine's."""
    world_size: int
    """The trainer and all engines."""
    group_name: str
    backend: str
    """gloo or nccl."""
    timeout_s: float = TRAINER_TIMEOUT_S
    """All members must have come by then."""

    def to_wire(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in self.__slots__}

    @classmethod
    def from_wire(cls, value: object, path: str = "weights_group") -> WeightsGroup:
        fields = expect.mapping(value, path)
        return cls(
            master_address=expect.text(fields.get("master_address"), f"{path}.master_address"),
            master_port=expect.count(fields.get("master_port"), f"{path}.master_port"),
            rank=expect.count(fields.get("rank"), f"{path}.rank"),
            world_size=expect.count(fields.get("world_size"), f"{path}.world_size"),
            group_name=expect.text(fields.get("group_name"), f"{path}.group_name"),
            backend=expect.text(fields.get("backend"), f"{path}.backend"),
            timeout_s=_timeout_s(fields, path),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StagedReceipt:
    """What lies ready in an engine after a part of an update, all its parts together."""

    num_tensors: int
    num_bytes: int
    checksum: str
    """Of the last part's tensors."""

    def to_wire(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in self.__slots__}

    @classmethod
    def from_wire(cls, value: object, path: str = "staged_receipt") -> StagedReceipt:
        fields = expect.mapping(value, path)
        return cls(
            num_tensors=expect.count(fields.get("num_tensors"), f"{path}.num_tensors"),
            num_bytes=expect.count(fields.get("num_bytes"), f"{path}.num_bytes"),
            checksum=expect.text(fields.get("checksum"), f"{path}.checksum"),
        )


def _timeout_s(fields: Mapping[object, object], path: str) -> float:
    """Positive, and at most what every clock can count."""
    value = expect.number(fields.get("timeout_s", TRAINER_TIMEOUT_S), f"{path}.timeout_s")
    if not 0 < value <= _MAX_TIMEOUT_S:
        raise mismatch(f"{path}.timeout_s", value, f"a time above 0, at most {_MAX_TIMEOUT_S:g} s")
    return value
