"""After a weight update the runner computes what transformers computes with the new weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine_core.model.checksum import weights_checksum
from engine_core.model.cpu_linear import PackedLinear
from engine_core.model.errors import ModelError
from engine_core.model.loader import load_runner
from engine_core.model.runner import TorchModelRunner
from ipc.engine_config import EngineConfig
from ipc.weights import WeightSource
from tests.support.scripted_batching import ScriptedBatching
from tests.support.tiny_models import CONFIGS, assert_greedy, load_reference, save_model

BLOCK_SIZE = 8
NUM_OUTPUTS = 24
PROMPT = [5, 80, 21, 190, 33, 7]
EMBEDDING = "model.embed_tokens.weight"
LAYER = "model.layers.1."
PLAIN, TIED = "llama, heads of 32, grouped", "llama, tied, heads of 48, all biases"


def make_runner(directory: Path, **changes: Any) -> TorchModelRunner:
    settings: dict[str, Any] = {
        "block_size": BLOCK_SIZE,
        "max_num_seqs": 4,
        "max_model_len": 64,
        "num_gpu_blocks_override": 64,
        "num_threads": 1,
        "device": "cpu",
    }
    runner, _ = load_runner(EngineConfig(model=str(directory), **settings | changes))
    return runner


def outputs_of(runner: TorchModelRunner) -> list[int]:
    runs = ScriptedBatching(runner, BLOCK_SIZE, 4)
    sequence = runs.join(PROMPT)
    runs.run(NUM_OUTPUTS)
    return sequence.outputs


def weights_of(directory: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = load_file(directory / "model.safetensors")
    return tensors


def file_source(path: Path, tensors: Mapping[str, Tensor], **changes: Any) -> WeightSource:
    save_file(dict(tensors), path)
    return WeightSource(kind="file", path=str(path), **changes)


def update(runner: TorchModelRunner, *sources: WeightSource) -> None:
    staged = None
    for source in sources:
        staged = runner.stage(source, staged)
    assert staged is not None
    runner.commit(staged)


class Models:
    """A model that is served, and one of the same shape with other weights."""

    def __init__(self, directory: Path, name: str) -> None:
        self.directory = directory
        self.old = save_model(directory / "old", CONFIGS[name](), seed=0)
        self.new = save_model(directory / "new", CONFIGS[name](), seed=1)

    def assert_outputs(self, runner: TorchModelRunner, changes: Mapping[str, Tensor]) -> None:
        """The runner answers as the old weights with some changes do, and not as the old ones."""
        mixed = self.directory / "mixed"
        mixed.mkdir(exist_ok=True)
        (mixed / "config.json").write_bytes((self.old / "config.json").read_bytes())
        tensors = weights_of(self.old) | dict(changes)
        save_file(tensors, mixed / "model.safetensors", metadata={"format": "pt"})
        outputs = outputs_of(runner)
        assert_greedy(load_reference(mixed), PROMPT, outputs)
        with pytest.raises(AssertionError):
            assert_greedy(load_reference(self.old), PROMPT, outputs)


@pytest.fixture
def models(tmp_path: Path) -> Models:
    return Models(tmp_path, PLAIN)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_directory_of_new_weights_replaces_all(
    name: str, deterministic: bool, tmp_path: Path
) -> None:
    models = Models(tmp_path, name)
    runner = make_runner(models.old, deterministic=deterministic)
    assert_greedy(load_reference(models.old), PROMPT, outputs_of(runner))
    update(runner, WeightSource(kind="disk", path=str(models.new)))
    models.assert_outputs(runner, weights_of(models.new))


@pytest.mark.parametrize("name", CONFIGS)
def test_parts_in_any_order_add_up_to_one_update(name: str, tmp_path: Path) -> None:
    """Each part has every third tensor, so stacked projections come one row block at a time."""
    models = Models(tmp_path, name)
    runner = make_runner(models.old)
    new = weights_of(models.new)
    sources = [
        file_source(tmp_path / f"part-{n}", dict(list(reversed(new.items()))[n::3]))
        for n in range(3)
    ]
    if "tied" in name:
        assert "lm_head.weight" not in new
    update(runner, *sources)
    models.assert_outputs(runner, new)


@pytest.mark.parametrize(
    "endings",
    [
        ("self_attn.k_proj.weight",),
        ("self_attn.v_proj.bias",),
        ("mlp.up_proj.weight", "mlp.gate_proj.bias"),
        ("embed_tokens.weight",),
        ("input_layernorm.weight", "model.norm.weight"),
    ],
    ids=lambda endings: endings[0],
)
def test_an_update_may_touch_a_few_tensors(endings: tuple[str, ...], tmp_path: Path) -> None:
    models = Models(tmp_path, TIED)
    runner = make_runner(models.old)
    changes = {name: t for name, t in weights_of(models.new).items() if name.endswith(endings)}
    changes = {name: 3 * tensor for name, tensor in changes.items()}
    update(runner, file_source(tmp_path / "some", changes))
    models.assert_outputs(runner, changes)


def test_updates_follow_one_another(models: Models, tmp_path: Path) -> None:
    runner = make_runner(models.old)
    new, names = weights_of(models.new), [f"{LAYER}self_attn.{which}_proj.weight" for which in "qk"]
    for name in names:
        update(runner, file_source(tmp_path / "one", {name: new[name]}))
    models.assert_outputs(runner, {name: new[name] for name in names})


def test_nothing_changes_before_the_commit_and_untouched_parts_are_shared(
    models: Models, tmp_path: Path
) -> None:
    runner = make_runner(models.old)
    before, parts = outputs_of(runner), runner.model.parts
    name = f"{LAYER}self_attn.k_proj.weight"
    staged = runner.stage(file_source(tmp_path / "k", {name: weights_of(models.new)[name]}), None)
    assert outputs_of(runner) == before
    assert list(staged.parts.linears) == [f"{LAYER}self_attn.qkv_proj"]
    assert staged.parts.tensors == {}
    runner.commit(staged)
    changed = [n for n, part in runner.model.parts.linears.items() if part is not parts.linears[n]]
    assert changed == [f"{LAYER}self_attn.qkv_proj"]
    assert outputs_of(runner) != before


def test_a_new_bias_leaves_the_weight_where_it_is(tmp_path: Path) -> None:
    models = Models(tmp_path, TIED)
    runner = make_runner(models.old)
    name = f"{LAYER}mlp.down_proj.bias"
    staged = runner.stage(file_source(tmp_path / "b", {name: weights_of(models.new)[name]}), None)
    old = runner.model.parts.linears[f"{LAYER}mlp.down_proj"]
    new = staged.parts.linears[f"{LAYER}mlp.down_proj"]
    assert isinstance(old, PackedLinear)
    assert isinstance(new, PackedLinear)
    assert new.packed is old.packed
    assert new.bias is not old.bias


def test_new_weights_are_converted_to_the_dtype_of_the_model(tmp_path: Path) -> None:
    config = CONFIGS[PLAIN]()
    old = save_model(tmp_path / "old", config, dtype=torch.bfloat16)
    wide = save_model(tmp_path / "wide", CONFIGS[PLAIN](), seed=1)
    narrow = save_model(tmp_path / "narrow", CONFIGS[PLAIN](), seed=1, dtype=torch.bfloat16)
    runner = make_runner(old)
    update(runner, WeightSource(kind="disk", path=str(wide)))
    assert outputs_of(runner) == outputs_of(make_runner(narrow))


def test_files_may_be_rewritten_once_they_are_staged(models: Models) -> None:
    runner = make_runner(models.old)
    new, path = weights_of(models.new), models.new / "model.safetensors"
    staged = runner.stage(WeightSource(kind="disk", path=str(models.new)), None)
    with open(path, "r+b") as file:
        file.seek(5_000)
        file.write(bytes(path.stat().st_size - 5_000))
    runner.commit(staged)
    models.assert_outputs(runner, new)


def test_what_is_staged_is_counted_and_summed(models: Models, tmp_path: Path) -> None:
    runner = make_runner(models.old)
    new = weights_of(models.new)
    parts = [{EMBEDDING: new[EMBEDDING]}, {"model.norm.weight": new["model.norm.weight"].half()}]
    staged = None
    for part in parts:
        checksum = weights_checksum(part)
        staged = runner.stage(file_source(tmp_path / "f", part, checksum=checksum), staged)
        assert staged.checksum == checksum
    assert staged is not None
    assert staged.num_tensors == 2
    assert staged.num_bytes == 211 * 128 * 4 + 128 * 2


# -- what does not fit ---------------------------------------------------------------------------

WRONG_PARTS: dict[str, tuple[dict[str, Tensor], str]] = {
    "an unknown name": (
        {f"{LAYER}self_attn.q_prj.weight": torch.zeros(128, 128)},
        r"q_prj\.weight.*nearest.*model\.layers\.1\.self_attn\.q_proj\.weight",
    ),
    "a wrong shape": (
        {EMBEDDING: torch.zeros(7, 128)},
        r"embed_tokens\.weight' has shape \[7, 128\].*\[211, 128\]",
    ),
    "a dtype that is no float": (
        {EMBEDDING: torch.zeros(211, 128, dtype=torch.int8)},
        r"embed_tokens\.weight' holds torch\.int8",
    ),
    "values that are not finite": (
        {EMBEDDING: torch.full((211, 128), torch.nan, dtype=torch.bfloat16)},
        r"embed_tokens\.weight' holds 27008 values of 27008 that are not finite in float32",
    ),
    "a bias that the model does not have": (
        {f"{LAYER}mlp.up_proj.bias": torch.zeros(160)},
        r"such as model\.layers\.1\.mlp\.up_proj\.bias",
    ),
}


@pytest.mark.parametrize("case", WRONG_PARTS)
def test_a_part_that_does_not_fit_is_refused_and_changes_nothing(
    case: str, models: Models, tmp_path: Path
) -> None:
    tensors, reason = WRONG_PARTS[case]
    runner = make_runner(models.old)
    before = outputs_of(runner)
    fitting = file_source(tmp_path / "good", {EMBEDDING: weights_of(models.new)[EMBEDDING]})
    staged = runner.stage(fitting, None)
    with pytest.raises(ModelError, match=reason):
        runner.stage(file_source(tmp_path / "bad", tensors), staged)
    assert outputs_of(runner) == before


def test_another_checksum_than_announced_is_refused(models: Models, tmp_path: Path) -> None:
    runner = make_runner(models.old)
    before = outputs_of(runner)
    tensors = {EMBEDDING: weights_of(models.new)[EMBEDDING]}
    wrong = weights_checksum({EMBEDDING: tensors[EMBEDDING] + 1})
    with pytest.raises(ModelError, match=f"checksum='{wrong}', but.*{weights_checksum(tensors)}"):
        runner.stage(file_source(tmp_path / "f", tensors, checksum=wrong), None)
    assert outputs_of(runner) == before


def test_a_directory_must_hold_every_tensor(models: Models) -> None:
    runner = make_runner(models.old)
    tensors = weights_of(models.new)
    del tensors[f"{LAYER}mlp.up_proj.weight"]
    save_file(tensors, models.new / "model.safetensors")
    with pytest.raises(ModelError, match=r"lack the tensor 'model\.layers\.1\.mlp\.up_proj"):
        runner.stage(WeightSource(kind="disk", path=str(models.new)), None)


@pytest.mark.parametrize("kind", ["disk", "file"])
def test_files_that_are_missing_or_torn_are_named(kind: Any, models: Models) -> None:
    runner = make_runner(models.old)
    with pytest.raises(ModelError, match=r"absent does not exist on the engine's machine$"):
        runner.stage(WeightSource(kind=kind, path=str(models.directory / "absent")), None)
    path = models.new / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ModelError, match="not a readable safetensors"):
        runner.stage(
            WeightSource(kind=kind, path=str(path if kind == "file" else models.new)), None
        )


def test_a_configuration_that_means_another_model_is_refused(models: Models) -> None:
    config = CONFIGS[PLAIN]()
    config.rms_norm_eps = 1e-3
    other = save_model(models.directory / "other", config)
    with pytest.raises(ModelError, match=r"rms_norm_eps=0\.001, but .* served has 1e-06"):
        make_runner(models.old).stage(WeightSource(kind="disk", path=str(other)), None)


def test_the_output_matrix_of_a_tied_model_comes_only_with_its_embedding(tmp_path: Path) -> None:
    models = Models(tmp_path, TIED)
    runner = make_runner(models.old)
    embedding = weights_of(models.new)[EMBEDDING]
    head = {"lm_head.weight": embedding.clone()}
    with pytest.raises(ModelError, match=r"send 'model\.embed_tokens\.weight' with it"):
        runner.stage(file_source(tmp_path / "head", head), None)
    both = file_source(tmp_path / "both", {EMBEDDING: embedding, **head})
    update(runner, both)
    models.assert_outputs(runner, {EMBEDDING: embedding})
