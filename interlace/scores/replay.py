"""Replay: a model runs again with one layer changed, and only what the change reaches is computed.

One run is recorded: what every layer of every tower was given and what it made of it. In a run that
follows, a layer that is given exactly the same again is not run: its recorded output is handed on.
So everything before the changed layer, the towers that do not read it included, costs nothing, and
whatever a model does between its layers (DeepStack, cross-attention, projectors) runs as ever. The
result is bit-equal to that of a whole run, as far as the layers are deterministic.

Memory: the hidden states of all layers, for one batch at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from interlace.errors import ShapeError
from interlace.models.states import layer_input, standing_in

if TYPE_CHECKING:
    from torch import Tensor

    from interlace.models.handle import Tower

Forward = Callable[..., Any]
# A layer in the place of another: (its own forward, arguments, keyword arguments) -> output.
Change = Callable[[Forward, tuple[Any, ...], dict[str, Any]], Any]

_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)


@dataclass(frozen=True)
class _Call:
    """One call of a layer in the recorded run.

    Attributes:
        args: positional and keyword arguments.
        output: what came of them.
        versions: torch's counts of writes into every tensor among them, right after the call.
    """

    args: tuple[tuple[Any, ...], dict[str, Any]]
    output: Any
    versions: tuple[int, ...]

    def untouched(self) -> bool:
        """Nothing wrote into any of the tensors since."""
        return self.versions == _versions((self.args, self.output))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _tensors(each)
    elif isinstance(value, Mapping):
        yield from _tensors(tuple(value.values()))


def _versions(value: Any) -> tuple[int, ...]:
    return tuple(tensor._version for tensor in _tensors(value))


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if one is other:
            return True
        alike = one.shape == other.shape and one.dtype == other.dtype and one.device == other.device
        return alike and torch.equal(one, other)
    if type(one) is not type(other):
        return False
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    # Anything else, a KV cache for one, may have changed inside.
    return isinstance(one, _PLAIN) and bool(one == other)


def _skipped(where: str, args: tuple[Any, ...], kwargs: dict[str, Any], recorded: Any) -> Any:
    # Whatever else a layer gives, such as the position bias of a T5, stays as recorded.
    states = layer_input(args, kwargs, where)
    return (states, *recorded[1:]) if isinstance(recorded, tuple | list) else states


class Replay:
    """Stands before the layers of some towers inside a `with` block.

    Attributes:
        num_computed: layer calls that were computed in the last run.
        refusals: tower -> why its calls cannot be answered from the record, in words.
    """

    def __init__(self, towers: Mapping[str, Tower]) -> None:
        """Take all towers of a model; their layers are changed inside the `with` block only."""
        self._towers = towers
        self._standing = ExitStack()
        self._calls: dict[tuple[str, int, int], _Call] = {}
        self._turn: dict[tuple[str, int], int] = {}
        self._running = self._recording = False
        self._changed: tuple[str, int] | None = None
        self._change: Change | None = None
        self._missed: set[str] = set()
        self.num_computed = 0
        self.refusals: dict[str, str] = {}

    def __enter__(self) -> Replay:
        """Put the layers behind the record."""
        for name, tower in self._towers.items():
            for index, layer in enumerate(tower.layers):
                make = partial(self._standing_before, name, index)
                self._standing.enter_context(standing_in([layer], make))
        return self

    def __exit__(self, *error: object) -> None:
        """Give every layer its own forward back."""
        self.forget()
        self._standing.close()

    def record(self, run: Callable[[], Tensor]) -> Tensor:
        """Run the model as it is and record it."""
        self.forget()
        self._recording = True
        try:
            return self._fresh(run)
        finally:
            self._recording = False

    def forget(self) -> None:
        """Let go of the recorded run."""
        self._calls = {}

    def ran(self, tower: str) -> bool:
        """Tell whether a tower took part in the recorded run."""
        return any(name == tower for name, _, _ in self._calls)

    def changed(
        self, tower: str, layer: int, change: Change | None, run: Callable[[], Tensor]
    ) -> Tensor:
        """Run the model with one layer changed.

        Args:
            tower: name of the tower.
            layer: position of the layer in it.
            change: what runs in its place; None skips it.
            run: runs the model, on the inputs that were recorded.
        """
        self._changed, self._change = (tower, layer), change
        try:
            return self._fresh(run)
        finally:
            self._changed = self._change = None

    def verify(self, run: Callable[[], Tensor]) -> None:
        """Find the towers that cannot be replayed: with nothing changed, no layer may be computed.

        Their names go into `refusals`; from then on their layers are always computed.
        """
        self._missed.clear()
        self._fresh(run)
        for name in sorted(self._missed):
            self.refusals[name] = (
                "its layers are not given the same again when the same input is run (they write "
                "into their input or output, or carry a state), so every one of them was skipped "
                "in a whole forward pass"
            )

    def _fresh(self, run: Callable[[], Tensor]) -> Tensor:
        self._turn = {}
        self.num_computed = 0
        self._running = True
        try:
            return run()
        finally:
            self._running = False

    def _standing_before(self, tower: str, index: int, forward: Forward) -> Forward:
        where = f"Layer {index} of the tower '{tower}'"

        def stand_in(*args: Any, **kwargs: Any) -> Any:
            if not self._running:
                return forward(*args, **kwargs)
            turn = self._turn.get((tower, index), 0)
            self._turn[tower, index] = turn + 1
            known = self._calls.get((tower, index, turn))
            if not self._recording and self._changed == (tower, index):
                if known is None:
                    raise ShapeError(
                        f"{where} ran more often than in the recorded run, so it cannot be "
                        "skipped. Score this tower by similarity alone."
                    )
                if self._change is None:
                    return _skipped(where, args, kwargs, known.output)
                self.num_computed += 1
                return self._change(forward, args, kwargs)
            if not self._recording and known is not None and tower not in self.refusals:
                if known.untouched() and _same(known.args, (args, kwargs)):
                    return known.output
                self._missed.add(tower)
            self.num_computed += 1
            output = forward(*args, **kwargs)
            if self._recording:
                given = (args, kwargs)
                self._calls[tower, index, turn] = _Call(given, output, _versions((given, output)))
            return output

        return stand_in
