"""How much the predictions hang on every token of every layer, for the weights of the fits.

Legend: P predictions of V classes, D width, N tokens of one run of a tower.

A small change d of a token's state changes the predictions p of the model by

    KL(p || p') ~ 1/2 d' F d,    F = sum of J' (diag(p) - p p') J,    J = dz / d state

with the logits z, summed over predictions. What is asked here is the trace of F, the mean of |g|^2
for

    g = d (v . z) / d state,    v = sqrt(p) * (e - sqrt(p) (sqrt(p) . e)),    e standard normal

since v has the covariance diag(p) - p p'. p is softened by a temperature, so that a prediction of
which the model is sure counts too: a student is less sure.

Source: the Fisher information as the metric of the divergence, Amari 1998, "Natural Gradient Works
Efficiently in Learning"; rows of a least squares weighed by it in compression: FWSVD (Hsu et al.
2022, arXiv 2207.00112).
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from interlace.errors import DataError
from interlace.models.predictor import IGNORED, Predictor, check_gradients
from interlace.models.states import hooked, shift_input, watch_state

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle

    from interlace.models.handle import VLM

TEMPERATURE = 2.0
# Draws of e per batch; its many predictions average out the rest.
_DRAWS = 4

# Tower -> number of a state (that of the layer it goes into, or the depth) -> one [N] per run.
Traces = dict[str, dict[int, list["Tensor"]]]
# (tower, number of a state) -> [D, D], on the CPU
State = tuple[str, int]
Moments = dict[State, "Tensor"]


class Fisher:
    """Asks one model, batch by batch."""

    def __init__(
        self, vlm: VLM, asked: str = "token_weights='fisher'", instead: str = "token_weights='even'"
    ) -> None:
        """Prepare.

        Args:
            vlm: the model.
            asked: what it is for, as errors name it.
            instead: what does without it.

        Raises:
            ConfigError: the weights allow no gradients.
        """
        check_gradients(vlm, f"{asked} cannot be had")
        self._vlm, self._instead = vlm, instead
        self._predictor = Predictor(vlm)
        # drawn where they are used: a batch takes as many as it has logits
        self._random = torch.Generator(vlm.device).manual_seed(0)

    def traces(
        self,
        inputs: Mapping[str, Any],
        towers: Iterable[str],
        moments: Moments | None = None,
        seed: int | None = None,
    ) -> Traces:
        """Return the trace of F for all states of some towers; cost: one pass and four backward.

        Args:
            inputs: a batch as the collator gives it with answers, on the model's device.
            towers: their names.
            moments: F itself, summed over the tokens of the batch, is added to those of its states.
            seed: of this batch's draws; default: they go on from the batch before.

        Raises:
            DataError: a batch without answers, or gradients that are not finite.
            FamilyError: the model gives no predictions.
        """
        if seed is not None:
            self._random.manual_seed(seed)
        wanted = moments or {}
        watch = _Watch(wanted)
        hooks = (
            hook for name in towers for hook in watch.hooks(name, self._vlm.towers[name].layers)
        )
        with torch.enable_grad(), _untrained(self._vlm.model), hooked(hooks):
            logits = self._softened(inputs)
            # a batch need not reach the towers, nor what they give the predictions
            reached = watch.leaves and logits.requires_grad
            for draw in range(_DRAWS if reached else 0):
                torch.autograd.grad(
                    self._drawn(logits),
                    watch.leaves,
                    retain_graph=draw < _DRAWS - 1,
                    allow_unused=True,
                )
        found = watch.traces()
        values = [each for states in found.values() for runs in states.values() for each in runs]
        if not all(bool(each.isfinite().all()) for each in values):
            raise DataError(
                "NaN or infinite gradients of the predictions. Open the model in bfloat16 or "
                f"float32, or take {self._instead}."
            )
        for state, moment in watch.moments.items():
            wanted[state] += (moment / _DRAWS).to(wanted[state])
        return found

    def _softened(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return the logits of all predictions, [P, V]; each token of an answer is one."""
        if not self._predictor.contrastive:
            logits, targets = self._predictor.answers(inputs)
            return logits[targets != IGNORED] / TEMPERATURE
        rows = self._predictor.similarities(inputs) / TEMPERATURE
        if self._predictor.sigmoid:
            # two classes, one of them at 0
            return torch.stack([rows, torch.zeros_like(rows)], -1).flatten(0, 1)
        return torch.cat([rows, rows.T])

    def _drawn(self, logits: Tensor) -> Tensor:
        """Return v . z, with a new draw of v."""
        root = logits.detach().softmax(-1).sqrt()
        random = self._random
        drawn = torch.randn(root.shape, generator=random, device=random.device).to(root)
        return (logits * root * (drawn - root * (root * drawn).sum(-1, keepdim=True))).sum()


class _Watch:
    """Sums of |g|^2 at the states of towers, over the backward passes of one forward pass.

    Of those states whose moments are wanted, the sums of g g' as well, [D, D] fp32.
    """

    def __init__(self, wanted: Iterable[State]) -> None:
        self.leaves: list[Tensor] = []
        self.moments: dict[State, Tensor] = {}
        self._wanted = frozenset(wanted)
        self._sums: dict[tuple[str, int], list[Tensor]] = {}

    def hooks(self, name: str, layers: nn.ModuleList) -> Iterator[RemovableHandle]:
        """Set the hooks of one tower."""

        def first(hidden: Tensor) -> Tensor:
            if not hidden.requires_grad:
                hidden = hidden.detach().requires_grad_()
                self.leaves.append(hidden)
            return hidden

        yield shift_input(layers[0], first)
        for state in range(len(layers) + 1):
            yield watch_state(layers, state, name, partial(self._add, name, state))

    def _add(self, name: str, state: int, hidden: Tensor) -> None:
        runs = self._sums.setdefault((name, state), [])
        total = torch.zeros(hidden[..., 0].numel(), dtype=torch.float64, device=hidden.device)
        runs.append(total)

        def add(gradient: Tensor) -> None:
            total.add_(gradient.double().square().sum(-1).reshape(-1))
            if (name, state) in self._wanted:
                flat = gradient.reshape(-1, gradient.shape[-1]).float()
                before = self.moments.get((name, state), 0)
                self.moments[name, state] = before + flat.T @ flat

        # a tower that works without gradients of its own accord has traces of 0
        if hidden.requires_grad:
            hidden.register_hook(add)  # type: ignore[no-untyped-call]

    def traces(self) -> Traces:
        """Return the means over the draws, on the CPU."""
        found: Traces = {}
        for (name, state), runs in self._sums.items():
            found.setdefault(name, {})[state] = [(each / _DRAWS).cpu() for each in runs]
        return found


@contextlib.contextmanager
def _untrained(model: nn.Module) -> Iterator[None]:
    """Ask for no gradients of the weights, whose inputs would be kept for them."""
    trained = [each for each in model.parameters() if each.requires_grad]
    try:
        for each in trained:
            each.requires_grad_(False)
        yield
    finally:
        for each in trained:
            each.requires_grad_(True)
