"""Taps: hooks that hand the hidden states of a tower on, one at a time, while the model runs.

h_i is what layer i is given, so whatever a model adds between two layers (DeepStack features, for
one) belongs to the state that the next layer sees; h_L is what the last layer gives, before any
final norm. This is the residual stream that is left standing when layers are taken out.

Legend: B batch, T tokens, N = B * T tokens in one row, D width, L layers.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

from interlace.errors import ShapeError
from interlace.models.states import watch_state

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    from torch import nn

    from interlace.scores.metrics import Meter, Units


class Tap:
    """Watches one tower inside a `with` block; feeds its meters between `start` and `finish`."""

    def __init__(self, name: str, layers: nn.ModuleList, meters: Sequence[Meter]) -> None:
        """Prepare the tap; hooks are set on entering the `with` block.

        Args:
            name: name of the tower, for messages.
            layers: its layers, in order.
            meters: what the states are handed to.
        """
        self.name = name
        self.layers = layers
        self.meters = tuple(meters)
        self._hooks = ExitStack()
        self._units_of: Callable[[torch.Tensor], Units] | None = None
        self._num_tokens = 0
        self._next = 0
        self._runs = 0
        # When the tower first ran in this batch: what breaks one tower breaks those that read it.
        self.began = 0.0

    def __enter__(self) -> Tap:
        """Set the hooks."""
        for index in range(len(self.layers) + 1):
            take = partial(self._take, index)
            self._hooks.enter_context(watch_state(self.layers, index, self.name, take))
        return self

    def __exit__(self, *error: object) -> None:
        """Take the hooks away."""
        self._units_of = None
        self._hooks.close()

    def start(self, units_of: Callable[[torch.Tensor], Units]) -> None:
        """Begin a batch.

        Args:
            units_of: tells what the tokens of a run are, from h_0 as the first layer is given it.
        """
        self._units_of = units_of
        self._next = self._runs = 0
        for meter in self.meters:
            meter.start()

    def finish(self) -> bool:
        """End the batch and say whether the tower ran in it.

        Raises:
            ShapeError: a run broke off.
        """
        self._units_of = None
        if self._next:
            raise ShapeError(
                f"The tower '{self.name}' stopped before layer {self._next} of "
                f"{len(self.layers)}: its layers cannot be scored by a forward pass that leaves "
                "some of them out."
            )
        return self._runs > 0

    def _take(self, index: int, hidden: torch.Tensor) -> None:
        if self._units_of is None:
            return
        if index != self._next:
            raise ShapeError(
                f"The tower '{self.name}' ran layer {index} where layer {self._next} was due. "
                "Only towers whose layers run one after the other can be scored."
            )
        flat = hidden.detach().reshape(-1, hidden.shape[-1])
        if index == 0:
            if not self._runs:
                self.began = time.perf_counter()
            units = self._units_of(hidden)
            self._num_tokens = units.unit.numel()
            for meter in self.meters:
                meter.begin_run(units)
        if flat.shape[0] != self._num_tokens:
            raise ShapeError(
                f"The tower '{self.name}' has {flat.shape[0]} tokens at layer {index}, but "
                f"{self._num_tokens} were described at its input. Towers that merge tokens between "
                "layers cannot be scored."
            )
        for meter in self.meters:
            meter.state(index, flat)
        self._next = index + 1
        if index == len(self.layers):
            for meter in self.meters:
                meter.end_run()
            self._next = 0
            self._runs += 1
