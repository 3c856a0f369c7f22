"""HealSettings, the longest section of a recipe: how to train what a cut left."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from interlace._coerce import within
from interlace._settings import Settings
from interlace.errors import ConfigError


@dataclass(frozen=True)
class HealSettings(Settings):
    """How to heal.

    Attributes:
        epochs: passes over the data; 0 together with no max_steps skips healing.
        max_steps: optimiser steps, instead of epochs.
        learning_rate: peak learning rate of AdamW.
        warmup_fraction: share of the steps with rising learning rate.
        weight_decay: of AdamW.
        max_grad_norm: gradients are clipped to this norm.
        batch_size: samples per forward pass and process.
        accumulation: forward passes per optimiser step.
        ce_weight: weight of the task's own loss (cross-entropy, or contrastive).
        hidden_weight: weight of the hidden-state distillation.
        kl_weight: weight of the logit distillation.
        loss_reduction: how cross-entropy and divergence are averaged: over all answer "token"s,
            over those of a "sample" first, so that short answers count as much as long ones, or
            "square" between the two (a token of an answer of n counts 1 / sqrt n).
        temperature: of the logit distillation.
        chunk_tokens: tokens whose teacher and student logits exist at once.
        bf16: compute in bfloat16 (autocast).
        gradient_checkpointing: recompute activations to save memory.
        save_steps: steps between checkpoints; default: only at the end.
        validation_fraction: share of the samples, 0..0.5, that is not trained on and says how far
            to go: of a few points on the straight way from the student before healing to the one
            after it, the one is kept where the loss of their predictions (`ce_weight` and
            `kl_weight`) is smallest. 0: to the end.
        seed: seed of the order of samples, and of which validate.
        num_workers: processes that prepare batches.
        schedule: course of the learning rate after warm-up.
        gates: sparse regularisation: learn factors in every layer of the pruned towers, under an
            "l1" or a "hard_concrete" (L0) penalty. The factors end in the weights, and the report
            holds them. "none": no gates.
        gate_units: what each factor stands on, one or more: attention and feed-forward "branches",
            query "heads", or "neurons", 8 at a time. `Scores.with_gates` makes the latter two
            importance of heads and neurons.
        gate_penalty: weight of the mean penalty of the gates, of each of the `gate_units`.
        gate_learning_rate: peak learning rate of the gates.
    """

    epochs: float = within(1.0, 0.0)
    max_steps: int | None = within(None, 0)
    learning_rate: float = within(1e-5, 0.0, 1.0, above=True)
    warmup_fraction: float = within(0.03, 0.0, 1.0)
    weight_decay: float = within(0.0, 0.0, 1.0)
    max_grad_norm: float = within(1.0, 0.0, above=True)
    batch_size: int = within(16, 1)
    accumulation: int = within(1, 1)
    ce_weight: float = within(1.0, 0.0)
    hidden_weight: float = within(1.0, 0.0)
    kl_weight: float = within(1.0, 0.0)
    loss_reduction: Literal["token", "sample", "square"] = "token"
    temperature: float = within(1.0, 0.0, above=True)
    chunk_tokens: int = within(2048, 1)
    bf16: bool = False
    gradient_checkpointing: bool = False
    save_steps: int | None = within(None, 1)
    validation_fraction: float = within(0.0, 0.0, 0.5)
    # NumPy, which transformers seeds too, takes no larger one
    seed: int = within(42, 0, 2**32 - 1)
    num_workers: int = within(0, 0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    gates: Literal["none", "l1", "hard_concrete"] = "none"
    gate_units: tuple[Literal["branches", "heads", "neurons"], ...] = ("branches",)
    gate_penalty: float = within(0.3, 0.0, above=True)
    gate_learning_rate: float = within(2e-2, 0.0, 1.0, above=True)

    @property
    def trains(self) -> bool:
        """Whether any step is asked for."""
        return self.max_steps != 0 and (self.epochs > 0 or bool(self.max_steps))

    def _check(self) -> None:
        if self.ce_weight == self.hidden_weight == self.kl_weight == 0.0:
            raise ConfigError(
                "HealSettings: ce_weight, hidden_weight and kl_weight are all 0, "
                "so there is nothing to train on. Set at least one above 0."
            )
        share = self.validation_fraction
        if share and self.ce_weight == self.kl_weight == 0.0:
            raise ConfigError(
                f"HealSettings: validation_fraction is {share:g}, but ce_weight and kl_weight are "
                "0, so nothing says which predictions are better. Set one above 0, or "
                "validation_fraction to 0."
            )
        if share and self.gates != "none":
            raise ConfigError(
                f"HealSettings: validation_fraction is {share:g} and gates is {self.gates!r}, but "
                "gates that stop half way are neither open nor closed. Set validation_fraction "
                "to 0."
            )
        if not self.gate_units:
            raise ConfigError("HealSettings.gate_units is empty. Name one, or set gates to 'none'.")
        if self.gates == "none" and self.gate_units != ("branches",):
            raise ConfigError(
                f"HealSettings: gate_units is {self.gate_units!r}, but gates is 'none', so nothing "
                "would be gated. Set gates to 'l1' or 'hard_concrete' as well."
            )
