"""The module that is trained: the student, the teacher beside it, and the loss between them.

Legend: B batch, T tokens, D hidden size, V vocabulary, N tokens to predict.

The whole loss is computed inside `forward`, so that wrappers that watch a module's forward pass
(DistributedDataParallel, FSDP2, autocast) see everything that needs gradients.
"""

from __future__ import annotations

from itertools import repeat
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from interlace.errors import ConfigError
from interlace.heal.batches import (
    REDUCED_BY,
    count_items,
    label_weights,
    num_rows,
    token_masks,
)
from interlace.heal.losses import head_terms, normalised_error, similarity_divergence
from interlace.heal.reading import Reader
from interlace.heal.sparsity import Gates
from interlace.models.predictor import (
    IGNORED,
    aligned,
    is_encoder_decoder,
    model_inputs,
    targets_of,
)
from interlace.models.states import layer_input, layer_output

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import Tensor

    from interlace.config import HealSettings
    from interlace.heal.anchors import Anchor
    from interlace.heal.sparsity import Gated

TERMS = ("loss", "ce", "hidden", "kl", "gates")

CONTRASTIVE = "contrastive"


def _in_given_dtype(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    """Hand on the states of a layer in the dtype that it was given, as it does in use.

    One that trains in fp32 may give fp32 (a factor per channel, as InternVL has, multiplies what
    autocast leaves alone), which a frozen layer in half precision does not take on a CPU.
    """
    given = layer_input(args, kwargs, type(layer).__name__).dtype
    states = layer_output(output, type(layer).__name__)
    if states.dtype == given:
        return output
    return states.to(given) if output is states else (states.to(given), *output[1:])


class HealModel(nn.Module):
    """A student in training. Its forward pass gives the loss terms of a batch.

    Only the student is a submodule: the teacher is neither trained nor saved nor sharded.
    """

    # The Trainer asks: the loss is normalised over the accumulated batch in here.
    accepts_loss_kwargs = True

    def __init__(
        self,
        student: nn.Module,
        *,
        objective: str,
        settings: HealSettings,
        paths: Mapping[str, str],
        teacher: nn.Module | None = None,
        teacher_paths: Mapping[str, str] | None = None,
        anchors: Sequence[Anchor] = (),
        gated: Sequence[Gated] = (),
    ) -> None:
        """Set the hooks on both models.

        Args:
            student: shell of the student; exactly its trainable parameters require a gradient.
            objective: "chat", "caption", "vqa" (cross-entropy) or "contrastive".
            settings: weights, temperature and chunk size.
            paths: tower name -> dotted path of its layers in the student.
            teacher: shell of the teacher, if there is one.
            teacher_paths: the same as `paths` in the teacher.
            anchors: where the two are compared.
            gated: what gets gates, where the settings ask for them.

        Raises:
            ConfigError: student and teacher have different vocabularies.
        """
        super().__init__()
        self.student = student
        self.objective = objective
        self.settings = settings
        self.anchors = tuple(anchors) if settings.hidden_weight else ()
        with_head = objective != CONTRASTIVE
        for path in paths.values():
            for layer in student.get_submodule(path).children():
                layer.register_forward_hook(_in_given_dtype, with_kwargs=True)
        self.gates: Gates | None = None
        if settings.gates != "none" and gated:
            self.gates = Gates(gated, settings.gates)
            self.gates.attach(student)
        own = [(anchor.tower, anchor.position) for anchor in self.anchors]
        self._reader = Reader(student, own, paths, with_head=with_head)
        self._teacher: Reader | None = None
        if teacher is not None:
            other = [(anchor.tower, anchor.teacher_position) for anchor in self.anchors]
            self._teacher = Reader(teacher, other, teacher_paths or paths, with_head=with_head)
            _check_same_vocabulary(self._reader, self._teacher)
        self._has_decoder = is_encoder_decoder(self._reader.owner) or objective == "vqa"
        self._shift = not is_encoder_decoder(self._reader.owner)
        # FSDP makes one unit of every layer of these classes.
        layers = (student.get_submodule(f"{path}.0") for path in paths.values())
        self._no_split_modules = sorted({type(layer).__name__ for layer in layers})

    def get_input_embeddings(self) -> nn.Module | None:
        """Return the student's input embedding, which sharding treats apart."""
        found: nn.Module | None = getattr(self.student, "get_input_embeddings", lambda: None)()
        return found

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the student's head, which sharding treats apart."""
        found: nn.Module | None = getattr(self.student, "get_output_embeddings", lambda: None)()
        return found

    def tie_weights(self) -> None:
        """Tie the student's weights again after a wrapper has replaced them."""
        tie: Any = getattr(self.student, "tie_weights", None)
        if tie is not None:
            tie()

    def train(self, mode: bool = True) -> HealModel:
        """Switch the student; running statistics stay still, the teacher stays in eval mode."""
        super().train(mode)
        for module in self.student.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def count(self, batches: Iterable[Mapping[str, Any]]) -> dict[str, float]:
        """Count what the terms of batches are averaged over, all batches together."""
        counts: dict[str, float] = {}
        for batch in batches:
            found = count_items(batch, has_decoder=self._has_decoder, shift=self._shift)
            for key, value in found.items():
                counts[key] = counts.get(key, 0.0) + value
        return counts

    @property
    def has_teacher(self) -> bool:
        """Whether there is a teacher to compare with."""
        return self._teacher is not None

    def of_teacher(self, batch: Mapping[str, Any]) -> Tensor:
        """Return what the teacher says to a batch, which `forward` compares the student with.

        Args:
            batch: what the collator gave.

        Returns:
            What its head turns into the logits of the N tokens to predict, [N, D] or [N, V]; of a
            contrastive model the similarities [images, texts].
        """
        assert self._teacher is not None
        with torch.no_grad():
            if self.objective == CONTRASTIVE:
                similarities: Tensor = self._teacher.run(
                    {**batch, "return_loss": True}
                ).logits_per_image
                return similarities
            targets = self._targets(batch)
            inputs = model_inputs(batch, self._reader.owner, self.objective)
            read = self._teacher.predictions(inputs)
            said: Tensor = aligned(read, targets)[targets != IGNORED]
            return said

    def forward(
        self, counts: dict[str, float] | None = None, said: Tensor | None = None, **batch: Any
    ) -> dict[str, Tensor]:
        """Compute the loss terms of one batch.

        Args:
            counts: what the terms are averaged over, summed over all batches and processes of the
                optimiser step; default: this batch alone.
            said: what `of_teacher` gave for this batch, to spare the teacher another run; no hidden
                states are compared then.
            batch: what the collator gave.

        Returns:
            "loss", which carries the gradient, and detached "ce" (the task's own loss), "hidden",
            "kl" and "gates" (their penalty): the batch's SHARE of each average, so that shares of
            one step add up.
        """
        whole = counts if counts is not None else self.count([batch])
        penalty = self.gates.draw() if self.gates is not None else None
        if self._teacher is not None and said is None:
            said = self.of_teacher(batch)
        elif self._teacher is not None:
            # the states that it holds are those of another batch
            self._teacher.release()
        if self.objective == CONTRASTIVE:
            loss, terms = self._contrastive(batch, whole, said)
        else:
            loss, terms = self._predictive(batch, whole, said)
        hidden = self._hidden(batch, whole)
        if hidden is not None:
            loss = loss + self.settings.hidden_weight * hidden
            terms["hidden"] = hidden.detach()
        if penalty is not None:
            penalty = penalty * (num_rows(batch, "text") / max(whole["samples"], 1.0))
            loss = loss + self.settings.gate_penalty * penalty
            terms["gates"] = penalty.detach()
        if torch.is_grad_enabled() and not loss.requires_grad:
            # Nothing that trains took part, as where the vision tower trains and a batch has no
            # images: a step of zeros, made in here, where DistributedDataParallel sees it.
            loss = loss + 0.0 * sum(each.sum() for each in self.parameters() if each.requires_grad)
        self._reader.release()
        if self._teacher is not None:
            self._teacher.release()
        return {"loss": loss, **terms}

    def _targets(self, batch: Mapping[str, Any]) -> Tensor:
        if "labels" not in batch:
            raise ConfigError(
                f"A batch for the objective '{self.objective}' has no labels. The collator must "
                "give them; collate with answers."
            )
        return targets_of(batch["labels"], shift=self._shift)

    def _predictive(
        self, batch: Mapping[str, Any], counts: Mapping[str, float], said: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        settings, teacher = self.settings, self._teacher
        targets = self._targets(batch)
        inputs = model_inputs(batch, self._reader.owner, self.objective)
        counted = targets != IGNORED
        hidden = aligned(self._reader.predictions(inputs), targets)[counted]
        loss, entropy, apart = head_terms(
            hidden,
            targets[counted],
            self._reader.head,
            teacher_hidden=said,
            teacher_head=teacher.head if teacher is not None else None,
            token_weights=label_weights(counted, settings.loss_reduction),
            ce_weight=settings.ce_weight,
            kl_weight=settings.kl_weight,
            temperature=settings.temperature,
            chunk_tokens=settings.chunk_tokens,
        )
        share = 1.0 / max(counts[REDUCED_BY[settings.loss_reduction]], 1.0)
        terms = {"ce": entropy * share}
        if teacher is not None and settings.kl_weight:
            terms["kl"] = apart * share
        return loss * share, terms

    def _contrastive(
        self, batch: Mapping[str, Any], counts: Mapping[str, float], said: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        settings = self.settings
        output = self._reader.run({**batch, "return_loss": True})
        num_rows = output.logits_per_image.shape[0]
        own = output.loss * (num_rows / counts["samples"])
        loss = settings.ce_weight * own
        terms = {"ce": own.detach()}
        if said is not None and settings.kl_weight:
            apart = similarity_divergence(output.logits_per_image, said, settings.temperature)
            apart = apart / counts["samples"]
            loss = loss + settings.kl_weight * apart
            terms["kl"] = apart.detach()
        return loss, terms

    def _hidden(self, batch: Mapping[str, Any], counts: Mapping[str, float]) -> Tensor | None:
        if self._teacher is None or not self.anchors:
            return None
        masks = token_masks(batch, has_decoder=self._has_decoder)
        by_tower: dict[str, list[Tensor]] = {}
        for anchor in self.anchors:
            states = self._reader.state(anchor.tower, anchor.position, last=anchor.last)
            target = self._teacher.state(anchor.tower, anchor.teacher_position, last=anchor.last)
            # A batch without images runs no vision tower.
            if states is None or target is None:
                continue
            mask = masks.get(anchor.tower)
            if mask is not None and mask.shape != states.shape[:-1]:
                mask = None
            error = normalised_error(states, target, mask, chunk_tokens=self.settings.chunk_tokens)
            if mask is not None:
                share = 1.0 / max(counts[f"tower:{anchor.tower}"], 1.0)
            else:
                part = num_rows(batch, anchor.tower) / max(counts[_unit(anchor.tower)], 1.0)
                share = part / max(states[..., 0].numel(), 1)
            by_tower.setdefault(anchor.tower, []).append(error * share)
        if not by_tower:
            # of no share, but a term all the same: the first process logs those that it has
            return torch.zeros((), device=batch["input_ids"].device)
        towers = [torch.stack(errors).mean() for errors in by_tower.values()]
        # of the whole step, so that batches without images do not count the other towers more
        units = [_unit(tower) for tower in {each.tower for each in self.anchors}]
        present = sum(counts[unit] > 0 for unit in units)
        return torch.stack(towers).sum() / max(present, len(towers))


def mean_terms(
    model: Callable[..., dict[str, Tensor]],
    batches: Iterable[Mapping[str, Any]],
    counts: dict[str, float],
    said: Sequence[Tensor | None] = (),
) -> dict[str, float]:
    """Return the mean of every loss term over batches.

    Args:
        model: a `HealModel`, which may be wrapped.
        batches: on its device.
        counts: of all of them together.
        said: what the teacher says to each of them, on any device; None, or none at all, where it
            is to be asked.
    """
    sums: dict[str, float] = {}
    pairs = zip(batches, said, strict=True) if said else zip(batches, repeat(None), strict=False)
    for batch, told in pairs:
        own = None if told is None else told.to(batch["input_ids"].device)
        for name, share in model(counts=counts, said=own, **batch).items():
            sums[name] = sums.get(name, 0.0) + share.item()
    return sums


def _unit(tower: str) -> str:
    """Return what a tower without padding is counted in."""
    return "samples" if tower.startswith("text") else "rows"


def _check_same_vocabulary(student: Reader, teacher: Reader) -> None:
    if student.vocabulary != teacher.vocabulary:
        raise ConfigError(
            f"The student has a vocabulary of {student.vocabulary} tokens, the teacher of "
            f"{teacher.vocabulary}, so their predictions cannot be compared. Give the model that "
            "the student was pruned from as the teacher."
        )
