"""The folder is whole, says what is in it, and is not left behind when something fails."""

from __future__ import annotations

import dataclasses
import errno
import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml
from tiny import TINY

import interlace as il
from interlace.errors import CheckpointError, ConfigError
from interlace.export import _reload, export, model_card, verify
from interlace.models import open_model
from interlace.records import EvalReport, HealReport, Plan, PruneRecord, TowerPlan

if TYPE_CHECKING:
    from pathlib import Path

    from interlace.models import VLM

HEALED = HealReport(
    steps=120,
    num_samples=3840,
    tokens=123456,
    trainable_parameters=1000,
    total_parameters=5000,
    final={"loss": 0.321},
    seconds=33.2,
    validation=({"share": 0.75, "loss": 0.3}, {"share": 1.0, "loss": 0.4}),
)
MEASURED = EvalReport(
    metrics={"vqa": {"accuracy": 0.875}},
    baseline={"vqa": {"accuracy": 0.9375}},
    retention={"vqa": {"accuracy": 0.9333}},
    num_samples={"vqa": 256},
    model_name="/home/someone/models/tiny",
)


class _Packed(torch.nn.Linear):
    """Stands for layers of torch's dynamic quantisation, which keep more than tensors."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}_packed_params.dtype"] = self.weight.dtype


def test_a_quantised_model_is_refused_in_words(tmp_path: Path) -> None:
    model = TINY["clip"](text=4, vision=4)
    whole = model.text_projection
    model.text_projection = _Packed(whole.in_features, whole.out_features, bias=False)
    with pytest.raises(ConfigError, match=r"_packed_params.dtype is a dtype, not a tensor.*Export"):
        export(open_model(model), tmp_path / "out", verify=False)
    assert not (tmp_path / "out").exists()


class _Adapted(torch.nn.Module):
    """A projection with a low-rank one beside it, as adapters put it."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = torch.nn.Linear(base.in_features, 1, bias=False)
        self.up = torch.nn.Linear(1, base.out_features, bias=False)


def test_adapters_that_are_not_merged_are_refused_before_anything_is_written(
    tmp_path: Path,
) -> None:
    vlm = open_model(TINY["clip"](text=4, vision=4))
    plan = Plan({"text": TowerPlan(4, parts={"self_attn": (1,)})}, standard=False)
    student = il.prune(vlm, plan)
    whole = student.model.text_projection
    student.model.text_projection = _Adapted(whole)
    with pytest.raises(
        ConfigError,
        match=r"lacks 1 weights of a CLIPModel, such as 'weight' of text_projection, where a "
        r"_Adapted stands. Merge adapters",
    ):
        export(student, tmp_path / "out", verify=False)
    assert list(tmp_path.iterdir()) == []
    student.model.text_projection = whole
    assert export(student, tmp_path / "out", verify=False).exists()


def test_the_folder_holds_everything_and_is_verified(student: VLM, tmp_path: Path) -> None:
    records = (None, HEALED, MEASURED, student.record, dataclasses.replace(MEASURED, baseline=None))
    folder = export(student, tmp_path / "out", records=records)
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "config.json",
        "eval.json",
        "eval_2.json",
        "heal.json",
        "interlace.json",
        "model.safetensors",
        "plan.json",
    ]
    assert PruneRecord.load(folder / "interlace.json") == student.record
    assert Plan.load(folder / "plan.json") == student.plan
    assert HealReport.load(folder / "heal.json") == HEALED
    card = (folder / "README.md").read_text()
    assert "largest difference of any output value 0 " in card
    assert "towers that took part: text, vision" in card
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    for path in folder.glob("*.json"):
        assert str(tmp_path) not in path.read_text()


def test_an_existing_folder_is_kept_unless_overwriting(student: VLM, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "precious").write_text("mine")
    with pytest.raises(ConfigError, match="exists already"):
        export(student, target, verify=False)
    with pytest.raises(ConfigError, match=r"holds precious and no config\.json"):
        export(student, target, verify=False, overwrite=True)
    assert (target / "precious").read_text() == "mine"
    (target / "precious").rename(target / "config.json")
    export(student, target, verify=False, overwrite=True)
    assert (target / "config.json").read_text() != "mine"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "The disk is full"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "The disk is full"),
        (PermissionError(errno.EACCES, "Permission denied"), "Cannot write the checkpoint"),
        (ValueError("bad:\n- more"), "cannot save CLIPModel .ValueError: bad: - more"),
    ],
)
def test_a_failed_write_is_told_in_words_and_leaves_nothing(
    student: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    def fail(folder: Path, **_: Any) -> None:
        (folder / "model.safetensors").write_text("half")
        raise error

    monkeypatch.setattr(student.model, "save_pretrained", fail)
    with pytest.raises(CheckpointError, match=words):
        export(student, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_computes_something_else_is_not_kept(
    student: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the fresh process is replaced by this one: what is tested is the judgement
    def in_this_process(requests: Any, workspace: Path) -> None:
        for request in requests:
            _reload.answer(request)
            report = json.loads((workspace / "0/report").read_text())
            (workspace / "0/report").write_text(json.dumps(report | {"package_loaded": False}))

    real = student.model.save_pretrained

    def damaged(folder: Path, **settings: Any) -> None:
        scale = student.model.logit_scale
        with torch.no_grad():
            scale.add_(0.01)
            real(folder, **settings)
            scale.sub_(0.01)

    monkeypatch.setattr(verify, "_fresh_process", in_this_process)
    export(student, tmp_path / "good")
    monkeypatch.setattr(student.model, "save_pretrained", damaged)
    with pytest.raises(CheckpointError, match="logits_per_image differs by up to"):
        export(student, tmp_path / "bad")
    assert [path.name for path in tmp_path.iterdir()] == ["good"]


def test_a_checkpoint_that_does_not_load_is_not_kept(
    student: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = verify.subprocess.CompletedProcess((), 1, "", "Traceback\n\nOSError: no config here\n")
    monkeypatch.setattr(verify.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(CheckpointError, match=r"exit code 1.: Traceback \| OSError: no config"):
        export(student, tmp_path / "out")
    with pytest.raises(CheckpointError, match="could not be run for verification"):
        export(student, tmp_path / "out", inputs={"input_ids": torch.zeros(1, 2).long()})
    assert list(tmp_path.iterdir()) == []


def test_a_fused_model_is_exported_without_a_comparison_alone(tmp_path: Path) -> None:
    vlm = open_model(TINY["clip"](text=2, vision=2))
    il.fuse(vlm)
    with pytest.raises(CheckpointError, match=r"attends by 'interlace'.*unfused"):
        export(vlm, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    weights = export(vlm, tmp_path / "fused", verify=False) / "model.safetensors"
    il.unfuse(vlm)
    again = export(vlm, tmp_path / "out") / "model.safetensors"
    assert again.read_bytes() == weights.read_bytes()


def test_records_of_another_cut_are_refused(student: VLM, tmp_path: Path) -> None:
    other = Plan({"text": TowerPlan(4, drop=(0,))})
    with pytest.raises(ConfigError, match="not the one that the model was pruned by"):
        export(student, tmp_path / "out", records=(other,))
    manifest = dataclasses.replace(student.record, notes=("another",))
    with pytest.raises(ConfigError, match="of another cut"):
        export(student, tmp_path / "out", records=(manifest,))
    with pytest.raises(ConfigError, match="got str"):
        export(student, tmp_path / "out", records=("plan.json",))  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_records_of_another_model_are_refused(student: VLM, tmp_path: Path) -> None:
    dense = student.record.inputs["model"]
    shared = {"metrics": {"vqa": {"accuracy": 0.5}}}
    raw = EvalReport(**shared, inputs={"model": "raw", "baseline": "earlier"})
    healed = dataclasses.replace(HEALED, inputs={"student": "raw", "teacher": dense})
    alien = EvalReport(**shared, inputs={"model": "alien"})
    with pytest.raises(ConfigError, match=r"records for eval\.json are of another model"):
        export(student, tmp_path / "out", records=(alien, healed), verify=False)
    # by itself nothing ties it to this model; the report of healing does
    with pytest.raises(ConfigError, match="of another model"):
        export(student, tmp_path / "out", records=(raw,), verify=False)
    assert list(tmp_path.iterdir()) == []
    own = EvalReport(**shared, inputs={"model": student.fingerprint})
    folder = export(student, tmp_path / "out", records=(raw, own, healed), verify=False)
    assert {"eval.json", "eval_2.json", "heal.json"} <= {path.name for path in folder.iterdir()}


def test_a_model_that_computes_nan_is_told(tmp_path: Path) -> None:
    model = TINY["clip"](text=2, vision=2)
    with torch.no_grad():
        model.visual_projection.weight[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match="The model in memory computes NaN in logits_per"):
        export(open_model(model), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_card_states_what_the_records_say(student: VLM) -> None:
    card = model_card(student, (student.plan, HEALED, MEASURED))
    front = yaml.safe_load(card.split("---")[1])
    assert front == {
        "library_name": "transformers",
        "pipeline_tag": "zero-shot-image-classification",
        "base_model": "acme/tiny-vlm",
        "tags": ["interlace", "layer-pruning"],
    }
    assert "# acme/tiny-vlm, pruned" in card
    assert "| text | 4 | 3 | 1 |" in card
    assert "text    |.xT.|" in card
    assert "vision  |.xT.|" in card
    assert f"{student.record.parameters_after:,} now" in card
    assert "| vqa | 256 | accuracy | 0.875 | 0.9375 | 93.3% |" in card
    assert "| final loss | 0.321 |" in card
    assert "| kept of the way | 75% |" in card
    assert "| trained parameters | 1,000 of 5,000 |" in card
    assert "CLIPModel.from_pretrained" in card
    # no path of a machine, no claim without a record
    assert "/home/someone" not in card
    bare = model_card(student)
    for word in ("Healing", "Results", "accuracy", "Reloaded"):
        assert word not in bare
