"""open_model: folders, manifests, classes, and faults that are told in words."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from tiny import TINY

from interlace.errors import BackendError, CheckpointError, ConfigError, FamilyError
from interlace.models import open_model
from interlace.models.handle import to_model
from interlace.records import PruneRecord

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    target = tmp_path / "clip"
    TINY["clip"](text=2, vision=2).save_pretrained(target)
    return target


@pytest.mark.parametrize("name", ["blip_caption", "blip_vqa", "blip2_t5"])
def test_a_saved_model_reopens_as_its_own_class(name: str, tmp_path: Path) -> None:
    model = TINY[name](text=2, vision=2)
    model.save_pretrained(tmp_path / "model")
    vlm = open_model(tmp_path / "model", dtype="float32", device="cpu")
    assert type(vlm.model) is type(model)
    assert vlm.fingerprint == open_model(model).fingerprint
    assert vlm.processor is None
    assert vlm.record is None
    assert vlm.name == str(tmp_path / "model")
    assert not vlm.model.training


def test_dtype(folder: Path) -> None:
    vlm = open_model(str(folder), dtype="bfloat16")
    assert vlm.dtype is torch.bfloat16
    assert vlm.shape().bytes_per_parameter == 2
    assert vlm.device == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"Unknown dtype 'float8'\. Did you mean"):
        open_model(folder, dtype="float8")
    with pytest.raises(ConfigError, match=r"Unknown dtype '\['float16'\]'"):
        open_model(folder, dtype=["float16"])  # type: ignore[arg-type]


def test_device(folder: Path) -> None:
    with pytest.raises(ConfigError, match="is no device"):
        open_model(folder, device="quantum")
    with pytest.raises(ConfigError, match="is no device"):
        open_model(folder, device={"": 0})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="'meta' holds shapes without values"):
        open_model(folder, device="meta")
    shapes = open_model(open_model(folder).model.to("meta"))
    with pytest.raises(ConfigError, match=r"'meta'.* cannot be run"):
        to_model({}, shapes)
    with pytest.raises(BackendError, match="device='maia' was asked for, but torch"):
        open_model(folder, device="maia")
    if not torch.cuda.is_available():
        with pytest.raises(BackendError, match="no CUDA device"):
            open_model(folder, device="cuda")


def test_manifest_gives_original_numbers(folder: Path) -> None:
    kept = {"text": (0, 3), "vision": (1, 4)}
    record = PruneRecord(plan_fingerprint="0" * 64, towers=kept, dropped={"text": (1, 2)})
    record.save(folder / "interlace.json")
    vlm = open_model(folder)
    assert vlm.record == record
    assert vlm.towers["text"].original == (0, 3)
    assert vlm.towers["text"].position(3) == 1
    assert list(vlm.towers["vision"].pinned) == [4]
    wrong = PruneRecord(plan_fingerprint="0" * 64, towers={"text": (0, 1, 2), "vision": (0, 1)})
    wrong.save(folder / "interlace.json")
    with pytest.raises(CheckpointError, match="keeps 3 layers, but the model has 2"):
        open_model(folder)


def test_tampered_manifest(folder: Path) -> None:
    record = PruneRecord(plan_fingerprint="0" * 64, towers={"text": (0, 3), "vision": (1, 4)})
    record.save(folder / "interlace.json")
    text = (folder / "interlace.json").read_text().replace("4", "5")
    (folder / "interlace.json").write_text(text)
    with pytest.raises(CheckpointError):
        open_model(folder)


def test_missing_and_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        open_model(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="is empty"):
        open_model(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="is a file"):
        open_model(tmp_path / "file")


def test_broken_config(folder: Path) -> None:
    for text in ('{"model_type": "clip"', "[" * 10**6, f'{{"hidden_size": {"9" * 5000}}}'):
        (folder / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match="not readable JSON"):
            open_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        open_model(folder)


@pytest.mark.parametrize("size", [0, 5, 1000, -1])
def test_truncated_weights(folder: Path, size: int) -> None:
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:size])
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*(cut off|damaged)"):
        open_model(folder)


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*pickles"):
        open_model(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match="has no weights"):
        open_model(folder)


def test_missing_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"logit_scale": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="is missing, but the checkpoint refers to it"):
        open_model(folder)
    index["weight_map"]["logit_scale"] = "../model.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="outside its folder"):
        open_model(folder)


def _edit(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_config_that_does_not_fit_the_weights(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"lacks 16 weights.*layers\.2"):
        open_model(folder)
    config["text_config"] |= {"num_hidden_layers": 2, "intermediate_size": 40}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"6 weights.*\[48\] instead of \[40\]"):
        open_model(folder)


def test_unknown_types_and_classes(folder: Path) -> None:
    _edit(folder, architectures=["LlavaLlamaForCausalLM"])
    with pytest.raises(FamilyError, match=r"LlavaLlamaForCausalLM.*Expected one of: CLIPModel"):
        open_model(folder)
    _edit(folder, model_type="llava_llama")
    with pytest.raises(FamilyError, match=r"does not know its model type .llava_llama.*qwen3_vl"):
        open_model(folder)
    _edit(folder, auto_map={"AutoConfig": "configuration_x.XConfig"})
    with pytest.raises(FamilyError, match="own model code, which is not run unless asked for"):
        open_model(folder)


def _change(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    for key, value in values.items():
        part, _, leaf = key.rpartition("__")
        (config[part] if part else config)[leaf] = value
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("values", "error", "words"),
    [
        ({"text_config__num_attention_heads": "two"}, CheckpointError, "num_attention_heads"),
        ({"architectures": ["LlamaForCausalLM"]}, FamilyError, "built from a LlamaConfig"),
        ({"architectures": ["BlipForConditionalGeneration"]}, FamilyError, "'clip'"),
    ],
)
def test_a_config_that_cannot_be_is_told(
    folder: Path, values: dict[str, object], error: type[Exception], words: str
) -> None:
    _change(folder, **values)
    with pytest.raises(error, match=words):
        open_model(folder)


def test_names() -> None:
    with pytest.raises(ConfigError, match="name of the model is empty"):
        open_model(" ")
    for wrong in (None, open_model(TINY["clip"](text=2, vision=2)), torch.nn.Linear(1, 1)):
        with pytest.raises(ConfigError, match=f"got a {type(wrong).__name__}; expected a"):
            open_model(wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="processor is a VLM; give a loaded processor"):
        open_model("bundled:clip", processor=open_model("bundled:clip"))
    model = open_model("bundled:clip").model
    assert type(open_model(model, processor="bundled:clip").processor).__name__ == "CLIPProcessor"
    # no path of this machine gets into records and cards
    assert open_model("bundled:clip").name == "bundled:clip"
