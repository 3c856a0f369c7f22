from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from interlace.data.collate import Collator
from interlace.data.samples import samples
from interlace.errors import DataError, FamilyError
from interlace.evaluate import fidelity, fidelity_pairs
from interlace.evaluate._common import Options
from interlace.evaluate.answer_states import answer_states, output_head
from interlace.evaluate.divergence import token_divergence

if TYPE_CHECKING:
    from collections.abc import Callable

    from interlace.models import VLM


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def in_fp64(student: np.ndarray, teacher: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The definitions written out."""
    s, t = log_softmax(student.astype(np.float64)), log_softmax(teacher.astype(np.float64))
    rows = np.arange(len(labels))
    return {
        "divergence": float((np.exp(t) * (t - s)).sum()),
        "agreeing": float((student.argmax(-1) == teacher.argmax(-1)).sum()),
        "student_loss": float(-s[rows, labels].sum()),
        "teacher_loss": float(-t[rows, labels].sum()),
    }


def test_divergence_equals_plain_fp64() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(40, 17, generator=generator) for _ in range(2))
    teacher[:20] = student[:20] + 0.01
    labels = torch.randint(0, 17, (40,), generator=generator)
    found = token_divergence(student, teacher, labels)
    expected = in_fp64(student.numpy(), teacher.numpy(), labels.numpy())
    assert found == pytest.approx(expected, rel=1e-5)
    assert found["agreeing"] >= 20
    # one hand-made row: KL(t || s) of (1/2, 1/2) against (1/4, 3/4)
    row = token_divergence(
        torch.tensor([[0.25, 0.75]]).log(), torch.tensor([[0.5, 0.5]]).log(), torch.tensor([0])
    )
    assert row["divergence"] == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), abs=1e-6)
    assert row["student_loss"] == pytest.approx(math.log(4), abs=1e-6)


def full_logits(vlm: VLM, batch: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Logits [N, V] and labels [N] of answer tokens, from the model's own full forward pass."""
    seen: list[torch.Tensor] = []
    handle = output_head(vlm)[0].register_forward_hook(lambda *args: seen.append(args[2]))
    with torch.no_grad():
        vlm.model(**batch)
    handle.remove()
    logits, labels = seen[-1], batch["labels"]
    if vlm.family.name != "blip2" or not vlm.model.language_model.config.is_encoder_decoder:
        logits, labels = logits[:, :-1], labels[:, 1:]
    kept = labels != -100
    return logits[kept].numpy(), labels[kept].numpy()


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("qwen3_vl", "vqa"),
        ("blip_caption", "caption"),
        ("blip_vqa", "vqa"),
        ("blip2_opt", "caption"),
        ("blip2_t5", "caption"),
    ],
)
def test_model_metrics_equal_those_of_full_logits(
    tiny_vlm: Callable[..., VLM], monkeypatch: pytest.MonkeyPatch, name: str, task: str
) -> None:
    student, teacher = tiny_vlm(name, 1), tiny_vlm(name, 0)
    data = samples("scenes", count=3, tasks=(task,), split="test")
    batch = Collator.for_model(student)(data)
    ours, labels = full_logits(student, batch)
    theirs, _ = full_logits(teacher, batch)
    expected = in_fp64(ours, theirs, labels)
    # several chunks per batch, several batches
    monkeypatch.setattr(fidelity, "CHUNK_TOKENS", 2)
    result, base = fidelity.compare(student, teacher, data, Options(batch_size=2))
    number = len(labels)
    assert result.details["num_answer_tokens"] == number
    assert result.metrics["kl"] == pytest.approx(expected["divergence"] / number, rel=1e-4)
    assert result.metrics["top1_agreement"] == pytest.approx(expected["agreeing"] / number)
    assert result.metrics["perplexity"] == pytest.approx(
        math.exp(expected["student_loss"] / number), rel=1e-4
    )
    assert base.metrics["perplexity"] == pytest.approx(
        math.exp(expected["teacher_loss"] / number), rel=1e-4
    )
    alone = fidelity.perplexity(student, data, Options(batch_size=3))
    assert alone.metrics["perplexity"] == pytest.approx(result.metrics["perplexity"], rel=1e-5)


def test_model_equals_itself(tiny_vlm: Callable[..., VLM]) -> None:
    data = samples("scenes", count=2, tasks=("vqa",), split="test")
    vlm = tiny_vlm("qwen3_vl")
    result, _ = fidelity.compare(vlm, vlm, data, Options())
    assert result.metrics["kl"] == pytest.approx(0.0, abs=1e-6)
    assert result.metrics["top1_agreement"] == 1.0


def test_logits_changed_after_the_head_are_noticed(
    tiny_vlm: Callable[..., VLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm = tiny_vlm("qwen3_vl")
    batch = Collator.for_model(vlm)(samples("scenes", count=1, tasks=("vqa",)))
    plain = vlm.model.forward

    def capped(**arguments: Any) -> Any:
        output = plain(**arguments)
        output.logits = output.logits.tanh()
        return output

    monkeypatch.setattr(vlm.model, "forward", capped)
    with torch.no_grad(), pytest.raises(FamilyError, match="after the output head"):
        answer_states(vlm, batch)


def test_values_that_are_not_finite_are_named(tiny_vlm: Callable[..., VLM]) -> None:
    vlm = tiny_vlm("blip_caption", 7)
    data = samples("scenes", count=1, tasks=("caption",), split="test")
    vlm.towers["text"].layers[0].intermediate.dense.weight.data.fill_(float("nan"))
    with pytest.raises(DataError, match=r"student .* not finite"):
        fidelity.compare(vlm, tiny_vlm("blip_caption"), data, Options())


def test_pairs_equal_plain_fp64(
    tiny_vlm: Callable[..., VLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = tiny_vlm("clip", 1), tiny_vlm("clip", 0)
    data = samples("scenes", count=4, tasks=("retrieval",), split="test")
    monkeypatch.setattr(fidelity_pairs, "CHUNK_ROWS", 3)
    found = fidelity_pairs.compare_embeddings(student, teacher, data, Options(batch_size=3)).metrics
    texts = [text for sample in data for text in sample.references]
    images = [sample.images[0].open() for sample in data]
    inputs = student.processor(text=texts, images=images, padding=True, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        ours, theirs = student.model(**inputs), teacher.model(**inputs)
    for direction, name in (
        ("image_to_text", "logits_per_image"),
        ("text_to_image", "logits_per_text"),
    ):
        s, t = (each[name].numpy() for each in (ours, theirs))
        expected = in_fp64(s, t, np.zeros(len(s), dtype=int))
        assert found[f"{direction}_kl"] == pytest.approx(expected["divergence"] / len(s), rel=1e-3)
        assert found[f"{direction}_agreement"] == pytest.approx(expected["agreeing"] / len(s))
    cosine = (ours.image_embeds * theirs.image_embeds).sum(-1).mean().item()
    assert found["image_cosine"] == pytest.approx(cosine, abs=1e-5)
