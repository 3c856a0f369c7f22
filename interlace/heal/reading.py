"""What distillation needs out of one forward pass: anchor outputs and the input of the head.

Legend: B batch, T tokens, D hidden size, V vocabulary.

Hidden states are caught by forward hooks at the anchors alone; `output_hidden_states` would keep
those of all layers. The head (the module that makes logits) is found through
`get_output_embeddings`, on the model or on the part of it that has one. A hook keeps its input
[B, T, D] and hands the head one token, so that the forward pass makes [B, 1, V] logits, whichever
family it is; the loss applies the head itself, chunk by chunk. `logits_to_keep` does the same where
a family has it and its parts hand it on, but not all do, and it does not give the hidden states.

A model that changes its logits behind the head (by soft-capping, say) would be read wrongly. So the
one token's logits are compared with the head's own on the first pass; where they differ, and where
no head is found, the model's full logits are used: right as well, only larger.
"""

from __future__ import annotations

import logging
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from interlace.errors import FamilyError
from interlace.models.predictor import find_head
from interlace.models.states import layer_output

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor

logger = logging.getLogger(__name__)


def _called(method: weakref.WeakMethod[Any], *args: Any) -> Any:
    """Call a method unless its object is gone."""
    bound = method()
    return None if bound is None else bound(*args)


class Reader:
    """Runs a model and keeps the hidden states that the loss needs, for the time of one pass.

    Attributes:
        model: the model; hooks are set on its modules for good, so it should be a shell.
        states: place -> hidden states of the last pass.
        chunked: the head is applied by the loss; False once the model's own logits are used.
    """

    def __init__(
        self,
        model: nn.Module,
        places: Iterable[tuple[str, int]],
        paths: Mapping[str, str],
        *,
        with_head: bool,
    ) -> None:
        """Set the hooks.

        Args:
            model: the model to run.
            places: (tower name, position in it) of every layer whose output is kept.
            paths: tower name -> dotted path of its list of layers.
            with_head: read predictions as well; off for models without a vocabulary.
        """
        self.model = model
        self.states: dict[tuple[str, int], Tensor] = {}
        self._reading = False
        self._verified = False
        self._head_input: Tensor | None = None
        found = find_head(model) if with_head else None
        self._head: nn.Module | None = found[0] if found is not None else None
        self.owner = found[1] if found is not None else model
        self.chunked = self._head is not None
        # Hooks that held the reader would be in a circle with the model, whose memory then stays
        # taken until Python looks for circles; on a GPU that is too late.
        keep, narrow = weakref.WeakMethod(self._keep), weakref.WeakMethod(self._narrow)
        for place in places:
            layer = model.get_submodule(f"{paths[place[0]]}.{place[1]}")
            layer.register_forward_hook(lambda *call, at=place: _called(keep, at, call[-1]))
        if self._head is not None:
            self._head.register_forward_pre_hook(lambda *call: _called(narrow, *call))

    def _keep(self, place: tuple[str, int], output: Any) -> None:
        # Gradient checkpointing runs layers again in the backward pass: nothing to keep then.
        if self._reading:
            self.states[place] = layer_output(output, place[0])

    def _narrow(self, _module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not self._reading or not self.chunked:
            return None
        self._head_input = inputs[0]
        return (inputs[0][..., :1, :], *inputs[1:])

    def head(self, hidden: Tensor) -> Tensor:
        """Turn what `run` returned, [..., D], into logits [..., V]."""
        if not self.chunked or self._head is None:
            return hidden
        # Called past the module's hooks: those of a sharded model gather and release its weights
        # once per pass, and this pass still holds them.
        logits: Tensor = self._head.forward(hidden)
        return logits

    @property
    def vocabulary(self) -> int | None:
        """Number of logits that the head gives, where it says so."""
        size = getattr(self._head, "out_features", None)
        return size if isinstance(size, int) else None

    def run(self, inputs: Mapping[str, Any]) -> Any:
        """Run the model and return its output; the hidden states then belong to this pass."""
        self.release()
        self._reading = True
        try:
            return self.model(**inputs)
        finally:
            self._reading = False

    def predictions(self, inputs: Mapping[str, Any]) -> Tensor:
        """Run the model and return what `head` turns into logits, [B, T, D] (or [B, T, V]).

        Raises:
            FamilyError: the model has neither a head nor logits.
        """
        output = self.run(inputs)
        logits = getattr(output, "logits", None)
        if self.chunked and not self._verified and not self._agrees(logits):
            logger.warning(
                "%s changes its logits behind the head, so they are computed for all tokens at "
                "once instead of in chunks.",
                type(self.model).__name__,
            )
            self.chunked = False
            logits = getattr(self.run(inputs), "logits", None)
        if self.chunked and self._head_input is not None:
            return self._head_input
        if not isinstance(logits, torch.Tensor):
            raise FamilyError(
                f"{type(self.model).__name__} gives neither logits nor a head to make them with, "
                "so there is no loss to heal it with."
            )
        return logits

    def _agrees(self, logits: Tensor | None) -> bool:
        if self._head_input is None:
            return False
        self._verified = True
        if not isinstance(logits, torch.Tensor):
            return True
        with torch.no_grad():
            own = self.head(self._head_input[..., :1, :]).to(logits.dtype)
        return own.shape == logits.shape and torch.allclose(
            own, logits, rtol=1e-3, atol=1e-3, equal_nan=True
        )

    def state(self, tower: str, position: int, *, last: bool = False) -> Tensor | None:
        """Return the hidden states behind a layer in the last pass, None if it did not run.

        Args:
            tower: tower name.
            position: place of the layer in it.
            last: the layer ends the tower. Where the tower feeds the head, the last hidden state is
                then the head's input, behind the final norm.
        """
        if last and tower == "text" and self.chunked and self._head_input is not None:
            return self._head_input
        return self.states.get((tower, position))

    def release(self) -> None:
        """Let go of the hidden states of the last pass."""
        self.states = {}
        self._head_input = None
