"""Finding and reading a model's files: where it looks, and what it says when something is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine_core.model.config import read_model_config
from engine_core.model.errors import ModelError
from engine_core.model.loader import load_parts
from engine_core.model.parts import Parts, PartsForm
from engine_core.model.weights import (
    Checkpoint,
    local_model_directory,
    model_directory,
    stored_dtype,
    weight_paths,
)
from tests.support.tiny_models import CONFIGS, save_model

CPU = torch.device("cpu")
EMBEDDING = "model.embed_tokens.weight"
LAYER = "model.layers.1."


def load(directory: Path, dtype: torch.dtype = torch.float32) -> Parts:
    return load_parts(read_model_config(directory), directory, PartsForm(dtype=dtype, device=CPU))


def edit_weights(directory: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors")


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return save_model(tmp_path, CONFIGS["llama, heads of 32, grouped"]())


@pytest.fixture
def tied_llama(tmp_path: Path) -> Path:
    return save_model(tmp_path, CONFIGS["llama, tied, heads of 48, all biases"]())


def test_shards_named_by_an_index_are_all_read(tmp_path: Path) -> None:
    config = CONFIGS["llama, heads of 32, grouped"]
    whole = save_model(tmp_path / "whole", config())
    sharded = save_model(tmp_path / "sharded", config(), max_shard_size="200KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 1
    for name, tensor in load_file(whole / "model.safetensors").items():
        assert torch.equal(Checkpoint(weight_paths(sharded)).read(name), tensor)
    load(sharded)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    config = CONFIGS["llama, heads of 32, grouped"]()
    directory = save_model(tmp_path, config, max_shard_size="200KB")
    shard = min(directory.glob("model-*.safetensors"))
    shard.unlink()
    with pytest.raises(ModelError, match=f"{shard.name} is missing"):
        load(directory)


def test_tensors_are_converted_and_stacked(llama: Path) -> None:
    names = [f"{LAYER}self_attn.{name}_proj.weight" for name in "qkv"]
    stacked = load(llama, torch.bfloat16).linears[f"{LAYER}self_attn.qkv_proj"].weight
    tensors = load_file(llama / "model.safetensors")
    expected = torch.cat([tensors[name] for name in names]).bfloat16()
    assert torch.equal(stacked, expected)


def test_a_checkpoint_rewritten_in_place_does_not_change_what_was_read(llama: Path) -> None:
    """It is memory of its own, no view of the file."""
    tensor = load(llama).tensors["model.norm.weight"]
    before = tensor.clone()
    with open(llama / "model.safetensors", "r+b") as file:
        size = file.seek(0, 2)
        file.seek(size // 2)
        file.write(bytes(size - size // 2))
        file.seek(size // 4)
        file.write(bytes(size // 4))
    assert torch.equal(tensor, before)


def test_a_missing_tensor_is_named(llama: Path) -> None:
    edit_weights(llama, lambda tensors: tensors.pop(f"{LAYER}mlp.up_proj.weight"))
    with pytest.raises(ModelError, match=r"lack the tensor 'model\.layers\.1\.mlp\.up_proj"):
        load(llama)


def test_an_unexpected_tensor_is_named(llama: Path) -> None:
    edit_weights(llama, lambda t: t.update({f"{LAYER}self_attn.q_proj.bias": torch.zeros(128)}))
    with pytest.raises(ModelError, match=r"such as model\.layers\.1\.self_attn\.q_proj\.bias"):
        load(llama)


def test_a_wrong_shape_is_named_with_both_shapes(llama: Path) -> None:
    edit_weights(llama, lambda tensors: tensors.update({EMBEDDING: torch.zeros(7, 128)}))
    with pytest.raises(ModelError, match=r"\[7, 128\], but config\.json implies \[211, 128\]"):
        load(llama)


def test_integer_weights_are_refused(llama: Path) -> None:
    edit_weights(llama, lambda t: t.update({EMBEDDING: torch.zeros(211, 128, dtype=torch.int8)}))
    with pytest.raises(ModelError, match="int8; quantised"):
        load(llama)


def test_L12_a_name_without_end_is_cut_in_the_message(llama: Path) -> None:
    edit_weights(llama, lambda tensors: tensors.update({"x" * 900: torch.zeros(1)}))
    with pytest.raises(ModelError, match=r"such as x{100} \(the nearest"):
        load(llama)


def test_a_tied_checkpoint_may_store_the_shared_matrix_twice(tied_llama: Path) -> None:
    load(tied_llama)
    edit_weights(tied_llama, lambda t: t.update({"lm_head.weight": t[EMBEDDING].clone()}))
    load(tied_llama)


def test_rotary_tables_of_old_checkpoints_are_passed_over(llama: Path) -> None:
    name = f"{LAYER}self_attn.rotary_emb.inv_freq"
    edit_weights(llama, lambda tensors: tensors.update({name: torch.zeros(16)}))
    load(llama)


@pytest.mark.parametrize("shape", [(2**16 + 1,), (4, 4), ()])
def test_L12_what_can_be_no_rotary_table_is_not_passed_over(
    shape: tuple[int, ...], llama: Path
) -> None:
    name = f"{LAYER}self_attn.rotary_emb.inv_freq"
    edit_weights(llama, lambda tensors: tensors.update({name: torch.zeros(shape)}))
    with pytest.raises(ModelError, match="a rotary table has one dimension, of at most 65536"):
        load(llama)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_L10_a_model_with_values_that_are_not_finite_is_not_loaded(
    value: float, llama: Path
) -> None:
    name = f"{LAYER}mlp.up_proj.weight"

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][3, 5] = tensors[name][7, 1] = value

    edit_weights(llama, spoil)
    with pytest.raises(ModelError, match=rf"'{name}' holds 2 values of \d+ that are not finite"):
        load(llama)


def test_L10_values_that_the_models_dtype_cannot_hold_are_not_finite_either(llama: Path) -> None:
    edit_weights(llama, lambda tensors: tensors["model.norm.weight"].fill_(1e6))
    load(llama)
    with pytest.raises(ModelError, match=r"'model\.norm\.weight' holds 128 .* finite in float16"):
        load(llama, torch.float16)


def test_infinities_that_are_no_weights_harm_nobody(llama: Path) -> None:
    name = f"{LAYER}self_attn.rotary_emb.inv_freq"
    edit_weights(llama, lambda tensors: tensors.update({name: torch.full((16,), torch.inf)}))
    load(llama)


def test_the_stored_dtype_is_read_from_the_file(llama: Path) -> None:
    assert stored_dtype(llama, EMBEDDING) == "float32"
    with pytest.raises(ModelError, match="lack the tensor 'other'"):
        stored_dtype(llama, "other")


def test_pickled_weights_are_not_read(llama: Path) -> None:
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"neither model\.safetensors nor.*convert"):
        load(llama)


def test_a_torn_file_is_named(llama: Path) -> None:
    path = llama / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"model\.safetensors is not a readable safetensors"):
        load(llama)


def test_a_broken_index_is_named(llama: Path) -> None:
    for content in ("{", json.dumps({"no": "map"}), json.dumps({"weight_map": [1]})):
        (llama / "model.safetensors.index.json").write_text(content)
        with pytest.raises(ModelError, match="is not an index"):
            load(llama)


def test_paths_that_are_no_directory_are_not_looked_up_on_the_hub(tmp_path: Path) -> None:
    for path in (str(tmp_path / "absent"), "./absent", "~/absent", "a/b/c"):
        for find in (model_directory, local_model_directory):
            with pytest.raises(ModelError, match=f"{path} does not exist on the engine's machine"):
                find(path)
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match="is a file"):
        model_directory(str(tmp_path / "file"))
    assert model_directory(str(tmp_path)) == tmp_path


def test_a_hub_id_of_an_update_is_looked_up_among_downloads_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelError, match=r"^some/model does not exist.*neither as a directory nor"):
        local_model_directory("some/model")
    repository = tmp_path / "models--some--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    assert local_model_directory("some/model") == snapshot


def test_a_home_directory_may_be_meant(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert local_model_directory("~/model") == tmp_path / "model"


def test_an_unknown_hub_id_is_refused_without_network_when_offline(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="'nobody/nothing' is not a directory"):
        model_directory("nobody/nothing")
    with pytest.raises(ModelError, match="not a directory"):
        model_directory("not a valid id!")
