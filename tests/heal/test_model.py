"""The loss terms of HealModel against the models' own losses and plain formulas, in fp64."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from heal.toys import IGNORED, heal_model, toy, toy_collate, toy_samples
from tiny import VOCAB

if TYPE_CHECKING:
    from interlace.models import VLM

PREDICTIVE = ("qwen3_vl", "llava_next", "blip_caption", "blip_vqa", "blip2_opt", "blip2_t5")


def _double(name: str, towers: tuple[str, ...] = ("text",)) -> tuple[VLM, VLM, dict[str, Any]]:
    teacher, student = toy(name, towers, dtype=torch.float64)
    batch = toy_collate(name, teacher.model)(toy_samples(3))
    for key, value in batch.items():
        batch[key] = value.double() if value.is_floating_point() else value
    return teacher, student, batch


class _Kept:
    """The output of one layer in a plain forward pass."""

    def __init__(self, vlm: VLM, tower: str, layer: int) -> None:
        module = vlm.towers[tower].layers[vlm.towers[tower].original.index(layer)]
        module.register_forward_hook(self._keep)
        self.value = torch.empty(0)

    def _keep(self, _module: Any, _inputs: Any, output: Any) -> None:
        self.value = output[0] if isinstance(output, tuple) else output


def _error(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return (student - teacher).square().sum(-1) / teacher.square().sum(-1)


@pytest.mark.parametrize("name", PREDICTIVE)
def test_cross_entropy_is_the_models_own_loss(name: str) -> None:
    _, student, batch = _double(name)
    terms = heal_model(student, None, chunk_tokens=2)(**batch)
    with torch.no_grad():
        own = student.model(**batch).loss
    torch.testing.assert_close(terms["ce"], own.to(terms["ce"].dtype), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(terms["loss"].detach(), terms["ce"])
    assert set(terms) == {"loss", "ce"}


def test_terms_and_gradients_equal_the_unchunked_computation() -> None:
    teacher, student, batch = _double("qwen3_vl")
    settings = {"ce_weight": 0.7, "hidden_weight": 1.3, "kl_weight": 0.4, "temperature": 2.0}
    model = heal_model(student, teacher, chunk_tokens=3, **settings)
    terms = model(**batch)
    terms["loss"].backward()
    trained = {n: p.grad for n, p in model.student.named_parameters() if p.requires_grad}

    anchors = [_Kept(vlm, "text", 3) for vlm in (student, teacher)]
    heads: list[torch.Tensor] = []
    for vlm in (student, teacher):
        vlm.model.lm_head.register_forward_pre_hook(lambda _, inputs: heads.append(inputs[0]))
    output = student.model(**batch)
    with torch.no_grad():
        target = teacher.model(**batch)
    counted = batch["labels"][:, 1:] != -100
    mine, other = (each.logits[:, :-1][counted] / 2.0 for each in (output, target))
    p = torch.softmax(other, -1)
    apart = (p * (p.log() - torch.log_softmax(mine, -1))).sum(-1).mean() * 4.0
    seen = batch["attention_mask"].bool()
    hidden = _error(anchors[0].value, anchors[1].value)[seen].mean()
    hidden = (hidden + _error(heads[0], heads[1])[seen].mean()) / 2
    plain = 0.7 * output.loss + 1.3 * hidden + 0.4 * apart
    plain.backward()

    for key, value in (("ce", output.loss), ("hidden", hidden), ("kl", apart), ("loss", plain)):
        torch.testing.assert_close(terms[key].detach(), value.detach().double(), msg=key)
    for name, gradient in trained.items():
        torch.testing.assert_close(gradient, student.model.get_parameter(name).grad, msg=name)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_contrastive_terms_equal_the_plain_computation(name: str) -> None:
    teacher, student, batch = _double(name, ("text", "vision"))
    terms = heal_model(student, teacher)(**batch)
    kept = {
        (tower, layer): [_Kept(vlm, tower, layer) for vlm in (student, teacher)]
        for tower in ("text", "vision")
        for layer in (3, 4)
    }
    output, target = (v.model(**batch, return_loss=True) for v in (student, teacher))
    seen = batch["attention_mask"].bool() if name == "clip" else None
    towers = []
    for tower in ("text", "vision"):
        errors = [_error(*(each.value for each in kept[tower, layer])) for layer in (3, 4)]
        mask = seen if tower == "text" and seen is not None else torch.ones_like(errors[0]).bool()
        towers.append(sum(error[mask].mean() for error in errors) / 2)
    torch.testing.assert_close(terms["ce"], output.loss.detach())
    torch.testing.assert_close(terms["hidden"], (sum(towers) / 2).detach())
    rows = [torch.log_softmax(each.logits_per_image, -1) for each in (output, target)]
    columns = [torch.log_softmax(each.logits_per_image, 0) for each in (output, target)]
    apart = sum((t.exp() * (t - s)).sum() / 3 for s, t in (rows, columns)) / 2
    torch.testing.assert_close(terms["kl"], apart.detach())


@pytest.mark.parametrize("name", ["qwen3_vl", "blip_caption"])
def test_logits_exist_for_one_chunk_at_a_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, student = toy(name)
    batch = toy_collate(name, teacher.model)(toy_samples(4))
    model = heal_model(student, teacher, chunk_tokens=5)
    rows: list[int] = []
    plain = torch.nn.Linear.forward

    def forward(self: torch.nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
        # Only the heads are this wide and as narrow at their input.
        if (self.in_features, self.out_features) == (32, VOCAB):
            rows.append(hidden.numel() // 32)
        return plain(self, hidden)

    monkeypatch.setattr(torch.nn.Linear, "forward", forward)
    model(**batch)["loss"].backward()
    labels = int((batch["labels"][:, 1:] != -100).sum())
    assert labels > 10
    assert max(rows) == 5
    # One token of each of 4 samples in the models' own passes and in the check, the rest in chunks.
    assert sum(rows) == 2 * (labels + 4 + 4)


def test_a_model_that_changes_its_logits_is_read_from_its_logits() -> None:
    teacher, student, batch = _double("llava")
    for vlm in (student, teacher):
        vlm.model.register_forward_hook(_capped)
    model = heal_model(student, teacher, chunk_tokens=2)
    terms = model(**batch)
    output = student.model(**{**batch, "labels": None})
    counted = batch["labels"][:, 1:] != -100
    own = torch.nn.functional.cross_entropy(
        output.logits[:, :-1][counted], batch["labels"][:, 1:][counted]
    )
    torch.testing.assert_close(terms["ce"], own.detach())


def _capped(_module: Any, _inputs: Any, output: Any) -> Any:
    output.logits = 2.0 * torch.tanh(output.logits / 2.0)
    return output


def test_averaging_over_samples_first_makes_short_answers_count() -> None:
    teacher, student = toy("llava")
    collate, samples = toy_collate("llava", teacher.model), toy_samples(2)
    model = heal_model(student, teacher, loss_reduction="sample")
    alone = [model(**collate([each])) for each in samples]
    whole, plain = model(**collate(samples)), heal_model(student, teacher)(**collate(samples))
    for term in ("ce", "kl"):
        mean = torch.stack([each[term] for each in alone]).mean()
        torch.testing.assert_close(whole[term], mean)
        assert plain[term] != pytest.approx(mean.item(), rel=1e-3)


def test_shares_of_a_split_batch_add_up() -> None:
    teacher, student = toy("qwen3_vl", ("text", "vision"))
    collate = toy_collate("qwen3_vl", teacher.model)
    model = heal_model(student, teacher)
    samples = toy_samples(6)
    whole, parts = collate(samples), [collate(samples[:2]), collate(samples[2:])]
    counts: dict[str, float] = {}
    for part in parts:
        for key, value in model.count([part]).items():
            counts[key] = counts.get(key, 0.0) + value
    split = [model(counts=counts, **part) for part in parts]
    for key, value in model(**whole).items():
        torch.testing.assert_close(sum(each[key] for each in split), value, msg=key)


def test_shares_add_up_where_a_part_holds_no_image() -> None:
    teacher, student = toy("llava", ("text", "vision"))
    collate = toy_collate("llava", teacher.model)
    model = heal_model(student, teacher, ce_weight=1.0)
    with_image, without = collate(toy_samples(1)), collate(toy_samples(2)[1:])
    del without["pixel_values"]
    image = teacher.family.image_token_id(teacher.model)
    without["input_ids"][without["input_ids"] == image] = 5
    width = max(each["input_ids"].shape[1] for each in (with_image, without))
    whole = {"pixel_values": with_image["pixel_values"]}
    for key in ("input_ids", "attention_mask", "labels"):
        rows = [each[key] for each in (with_image, without)]
        fill = IGNORED if key == "labels" else 0
        whole[key] = torch.cat(
            [torch.nn.functional.pad(row, (0, width - row.shape[1]), value=fill) for row in rows]
        )
    counts = model.count([with_image, without])
    split = [model(counts=counts, **part) for part in (with_image, without)]
    for key, value in model(**whole).items():
        torch.testing.assert_close(sum(each[key] for each in split), value, msg=key)
