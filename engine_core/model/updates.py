"""Weight updates: loading and checking new tensors beside the weights that serve.

Invariants
- Staging changes nothing that a step reads: it makes new parts, and shares or copies present ones.
  It runs on a thread of its own and computes nothing, but copies, changes layouts and looks for
  values that are not finite.
- What an update needs in memory is one copy of the parts it changes, and for a while the tensors of
  one part more. The old parts are let go by the commit.
- A part of an update fits wholly or fails: names, shapes and dtypes are checked before a tensor is
  read, the values and the checksum before what was read can take effect.
- A broadcast that does not fit is received to its end, as far as that can be: the trainer and the
  other engines would wait for this one.
"""

from __future__ import annotations

import collections
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from engine_core.model.checksum import WeightsChecksum
from engine_core.model.config import ModelConfig, read_model_config
from engine_core.model.errors import ModelError
from engine_core.model.parts import EMBEDDING, LM_HEAD, Parts, PartsBuilder, PartsForm, needed_specs
from engine_core.model.safetensors_file import TensorInfo
from engine_core.model.weights import (
    FLOATING,
    Checkpoint,
    TensorRules,
    local_model_directory,
    weight_paths,
)
from engine_core.model.weights_group import TrainerGroups
from ipc.weights import WeightSource

_HARMLESS_CHANGES = ("dtype", "num_positions")
"""What another checkpoint's configuration may say otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StagedParts:
    """Implements `StagedWeights`: the parts that an update changes."""

    parts: Parts = field(default_factory=Parts)
    names: frozenset[str] = frozenset()
    """Of all tensors that came."""
    num_tensors: int = 0
    num_bytes: int = 0
    """Of the tensors as they came."""
    checksum: str = ""


class UpdateStager:
    """Stages the parts of updates of one model."""

    def __init__(self, config: ModelConfig, form: PartsForm) -> None:
        self.groups = TrainerGroups()
        self._config = config
        self._form = form
        self._specs = needed_specs(config, form)
        self._rules = TensorRules(config)

    def stage(self, source: WeightSource, earlier: StagedParts, present: Parts) -> StagedParts:
        """Add a part to what an update staged `earlier`; `present` are the parts that serve.
        Raises ValueError.
        """
        checksum = WeightsChecksum()
        builder = PartsBuilder(self._specs, self._form, present.with_parts(earlier.parts))
        names, num_bytes = set(), 0
        tensors = self._open(source, earlier)
        try:
            for name, tensor in tensors:
                checksum.add(name, tensor)
                names.add(name)
                num_bytes += tensor.nbytes
                if name in self._rules.shapes:
                    builder.add(name, tensor)
        except ModelError:
            if source.kind == "broadcast":
                collections.deque(tensors, maxlen=0)
            raise
        staged = StagedParts(
            parts=earlier.parts.with_parts(builder.finish()),
            names=earlier.names | names,
            num_tensors=earlier.num_tensors + len(names),
            num_bytes=earlier.num_bytes + num_bytes,
            checksum=checksum.hexdigest(),
        )
        if source.checksum not in (None, staged.checksum):
            raise ModelError(
                f"checksum={source.checksum!r}, but that of the {len(names)} tensors is "
                f"{staged.checksum!r}; they changed on the way, or it was computed otherwise"
            )
        return staged

    def _open(self, source: WeightSource, earlier: StagedParts) -> Iterator[tuple[str, Tensor]]:
        """Check the tensors of a source, and give them out."""
        if source.kind == "broadcast":
            return self._receive(source, earlier)
        if source.kind == "disk":
            directory = local_model_directory(source.path)
            self._check_config(directory)
            checkpoint = Checkpoint(weight_paths(directory))
            self._rules.check_all(checkpoint.infos)
        else:
            path = Path(source.path).expanduser()
            if not path.exists():
                raise ModelError(f"{source.path} does not exist on the engine's machine")
            checkpoint = Checkpoint([path])
            self._check(checkpoint.infos, earlier)
        return self._read(checkpoint)

    def _read(self, checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
        names = list(checkpoint.infos)
        place = {name: index for index, name in enumerate(self._rules.shapes)}
        for name in sorted(names, key=lambda name: place.get(name, len(place))):
            yield name, checkpoint.read(name)
        checkpoint.check_unchanged()

    def _receive(self, source: WeightSource, earlier: StagedParts) -> Iterator[tuple[str, Tensor]]:
        infos = [
            TensorInfo(_dtype(name, dtype), shape)
            for name, dtype, shape in zip(source.names, source.dtypes, source.shapes, strict=True)
        ]
        deadline_s = time.monotonic() + source.timeout_s
        error: ModelError | None = None
        try:
            self._check(dict(zip(source.names, infos, strict=True)), earlier)
        except ModelError as misfit:
            error = misfit
        for name, info in zip(source.names, infos, strict=True):
            left_s = deadline_s - time.monotonic()
            tensor = self.groups.receive(source.group_name, name, info, left_s)
            if error is None:
                yield name, tensor
        if error is not None:
            raise error

    def _check(self, infos: Mapping[str, TensorInfo], earlier: StagedParts) -> None:
        self._rules.check(infos)
        has_embedding = EMBEDDING in infos or EMBEDDING in earlier.names
        if LM_HEAD in infos and LM_HEAD not in self._rules.shapes and not has_embedding:
            raise ModelError(
                f"tensor {LM_HEAD!r} is the embedding in this model, whose configuration ties "
                f"them; send {EMBEDDING!r} with it or before it"
            )

    def _check_config(self, directory: Path) -> None:
        """A configuration that comes with new weights must mean the model that is served."""
        if not (directory / "config.json").exists():
            return
        theirs = read_model_config(directory)
        for name in ModelConfig.__slots__:
            old, new = getattr(self._config, name), getattr(theirs, name)
            if old != new and name not in _HARMLESS_CHANGES:
                raise ModelError(
                    f"{directory / 'config.json'} says {name}={new!r}, but the model that is "
                    f"served has {old!r}; start an engine with it instead"
                )


def _dtype(name: str, text: str) -> torch.dtype:
    for dtype in FLOATING:
        if str(dtype).removeprefix("torch.") == text.removeprefix("torch."):
            return dtype
    raise ModelError(
        f"tensor {name!r} is announced as {text!r}; supported: float32, float16, bfloat16"
    )
