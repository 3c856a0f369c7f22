"""Fidelity: how close a model stays to its teacher on the tokens of the right answers.

Only the hidden states in front of the output head are kept whole; logits exist for one chunk of
answer tokens at a time, for teacher and student together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from interlace._progress import track
from interlace.data.collate import Collator
from interlace.errors import ConfigError, DataError, ShapeError
from interlace.evaluate._common import TaskResult, batches, held_still
from interlace.evaluate.answer_states import answer_states, output_head
from interlace.evaluate.divergence import token_divergence
from interlace.evaluate.fidelity_pairs import compare_embeddings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from interlace.data.samples import Sample
    from interlace.evaluate._common import Options
    from interlace.models.handle import VLM

__all__ = ["compare", "perplexity"]

CHUNK_TOKENS = 512
# exp of this is near the largest float; a model this lost has no meaningful perplexity anyway
_LARGEST_EXPONENT = 700.0


@dataclass
class _Sums:
    """Running sums over answer tokens, in fp64."""

    tokens: int = 0
    divergence: float = 0.0
    agreeing: float = 0.0
    student_loss: float = 0.0
    teacher_loss: float = 0.0


def _add_batch(sums: _Sums, vlm: VLM, teacher: VLM, batch: dict[str, Any]) -> None:
    states, labels = answer_states(vlm, batch)
    teacher_states, _ = (states, labels) if teacher is vlm else answer_states(teacher, batch)
    (head, _), (teacher_head, _) = output_head(vlm), output_head(teacher)
    for start in range(0, len(labels), CHUNK_TOKENS):
        part = slice(start, start + CHUNK_TOKENS)
        logits = head(states[part])
        teacher_logits = logits if teacher is vlm else teacher_head(teacher_states[part])
        if logits.shape != teacher_logits.shape:
            raise ShapeError(
                f"{vlm.name} has a vocabulary of {logits.shape[-1]} tokens, the baseline "
                f"{teacher.name} one of {teacher_logits.shape[-1]}. Fidelity compares models of "
                "one vocabulary; give the model the student was pruned from."
            )
        found = token_divergence(
            logits, teacher_logits.to(logits.device), labels[part].to(logits.device)
        )
        sums.divergence += found["divergence"]
        sums.agreeing += found["agreeing"]
        sums.student_loss += found["student_loss"]
        sums.teacher_loss += found["teacher_loss"]
    sums.tokens += len(labels)
    for name, loss, of in (
        ("student", sums.student_loss, vlm),
        ("teacher", sums.teacher_loss, teacher),
    ):
        if not math.isfinite(loss):
            raise DataError(
                f"The {name} {of.name} gives logits that are not finite (NaN or infinite). "
                "Use a wider dtype, or check the checkpoint."
            )


def _sum_tokens(vlm: VLM, teacher: VLM, samples: Sequence[Sample], options: Options) -> _Sums:
    collator = Collator.for_model(vlm)
    sums = _Sums()
    description = "comparing tokens" if teacher is not vlm else f"perplexity{options.whose}"
    with held_still(vlm.model, teacher.model):
        for chunk in track(batches(samples, options.batch_size), description=description):
            _add_batch(sums, vlm, teacher, collator(chunk))
    return sums


def _exp(mean_loss: float) -> float:
    return math.exp(min(mean_loss, _LARGEST_EXPONENT))


def perplexity(vlm: VLM, samples: Sequence[Sample], options: Options) -> TaskResult:
    """Perplexity of the right answers: exp of the mean negative log likelihood per token.

    Raises:
        ConfigError: the model predicts no tokens (it compares images and texts).
    """
    if vlm.family.objective == "contrastive":
        raise ConfigError(f"{vlm.name} compares images and texts; it has no perplexity.")
    sums = _sum_tokens(vlm, vlm, samples, options)
    value = _exp(sums.student_loss / sums.tokens)
    return TaskResult({"perplexity": value}, {"num_answer_tokens": sums.tokens})


def compare(
    vlm: VLM, teacher: VLM, samples: Sequence[Sample], options: Options
) -> tuple[TaskResult, TaskResult]:
    """Compare a model with its teacher.

    Models that predict tokens: "kl" mean KL(teacher || student) per answer token in nats,
    "top1_agreement" fraction of answer tokens with the same most likely prediction, and
    "perplexity". Models that embed images and texts: see `compare_embeddings`.

    Args:
        vlm: the model.
        teacher: the model it should equal, of the same family and vocabulary.
        samples: questions with answers, or images with captions.
        options: batch size.

    Returns:
        The result of the model, and that of the teacher (its own perplexity, or no metric).

    Raises:
        ConfigError: the two models are of different kinds.
    """
    if vlm.family.objective != teacher.family.objective:
        raise ConfigError(
            f"{vlm.name} is a {vlm.family.objective} model and the baseline {teacher.name} a "
            f"{teacher.family.objective} model. Fidelity compares models of one kind."
        )
    if vlm.family.objective == "contrastive":
        return compare_embeddings(vlm, teacher, samples, options), TaskResult({})
    sums = _sum_tokens(vlm, teacher, samples, options)
    metrics = {
        "kl": sums.divergence / sums.tokens,
        "top1_agreement": sums.agreeing / sums.tokens,
        "perplexity": _exp(sums.student_loss / sums.tokens),
    }
    details = {"num_answer_tokens": sums.tokens, "unit_of_kl": "nats per answer token"}
    return TaskResult(metrics, details), TaskResult(
        {"perplexity": _exp(sums.teacher_loss / sums.tokens)}, details
    )
