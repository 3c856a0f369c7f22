"""The self-check: a model runs the layers of its towers in order, through the lists found in it.

Only then does taking layers out of a list take them out of the model. Known families are held to it
by tests; a model of unknown type has to pass it when it is opened.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from interlace._torch_utils import FORWARD_REFUSALS, inference
from interlace.errors import FamilyError
from interlace.models.states import hooked
from interlace.models.synthetic import image_features, synthetic_images, synthetic_inputs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from transformers import PreTrainedModel

    from interlace.models.discovery import Stack


@contextmanager
def _calls(stacks: Mapping[str, Stack]) -> Iterator[dict[str, list[int]]]:
    """Record the positions of the layers that run, per tower, in the order in which they run."""
    order: dict[str, list[int]] = {name: [] for name in stacks}

    def ran(name: str, position: int, *_: Any) -> None:
        order[name].append(position)

    with hooked(
        layer.register_forward_pre_hook(partial(ran, name, position))
        for name, stack in stacks.items()
        for position, layer in enumerate(stack.layers)
    ):
        yield order


def _tensors(output: Any) -> list[torch.Tensor]:
    """All floating tensors of a model output."""
    if isinstance(output, torch.Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        return [tensor for value in output.values() for tensor in _tensors(value)]
    if isinstance(output, (list, tuple)):
        return [tensor for value in output for tensor in _tensors(value)]
    return []


def _replace(model: nn.Module, path: str, layers: nn.ModuleList) -> None:
    owner, _, attribute = path.rpartition(".")
    setattr(model.get_submodule(owner), attribute, layers)


def check_forward(
    model: PreTrainedModel,
    stacks: Mapping[str, Stack],
    forward: Callable[[], Any],
) -> set[str]:
    """Check one forward: the towers it uses run in order, and dropping nothing changes nothing.

    Args:
        model: the model; left as it was.
        stacks: its towers.
        forward: runs the model on some input and returns its output.

    Returns:
        Names of the towers that ran.

    Raises:
        FamilyError: a tower runs its layers in another order, or rebuilding its list from the same
            layers changes the output.
    """
    with inference(model):
        with _calls(stacks) as order:
            expected = _tensors(forward())
        for name, positions in order.items():
            depth = len(stacks[name].layers)
            passes, rest = divmod(len(positions), depth)
            if positions and (rest or positions != list(range(depth)) * passes):
                raise FamilyError(
                    f"{type(model).__name__} runs the layers of {stacks[name].path} in the order "
                    f"{positions}; expected each of the {depth} once, in order, in every pass."
                )
        ran = {name for name, positions in order.items() if positions}
        try:
            for name in ran:
                _replace(model, stacks[name].path, nn.ModuleList(stacks[name].layers))
            found = _tensors(forward())
        finally:
            for name in ran:
                _replace(model, stacks[name].path, stacks[name].layers)
    if len(found) != len(expected) or not all(map(torch.equal, found, expected)):
        raise FamilyError(
            f"{type(model).__name__} gives another output when the module lists of {sorted(ran)} "
            "are rebuilt from the same layers, so something else holds on to them."
        )
    return ran


def synthetic_forwards(model: PreTrainedModel) -> Iterator[Callable[[], Callable[[], Any]]]:
    """Yield makers of forwards that a model of unknown type may accept."""
    anything: Any = model
    for make in synthetic_inputs(model):
        yield lambda make=make: partial(anything, **make())  # type: ignore[misc]
    yield lambda: partial(image_features, model, synthetic_images(model))
    yield lambda: partial(image_features, model, _in_rows(synthetic_images(model)))


def _in_rows(images: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give every row of a batch a list of images, of one each."""
    return {**images, "pixel_values": images["pixel_values"].unsqueeze(1)}


def self_check(
    model: PreTrainedModel,
    stacks: Mapping[str, Stack],
    inputs: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Check that every tower of a model is run through its module list, in order.

    Args:
        model: the model; left as it was.
        stacks: its towers.
        inputs: keyword arguments of a forward that uses every tower; synthetic ones are tried where
            None.

    Raises:
        FamilyError: a tower does not run as its list says, or no forward could be built that uses
            it.
    """
    if inputs is not None:
        checked = check_forward(model, stacks, partial(model, **inputs))
        refusals: list[str] = []
    else:
        checked, refusals = set(), []
        for make in synthetic_forwards(model):
            if checked == set(stacks):
                break
            try:
                checked |= check_forward(model, stacks, make())
            except FORWARD_REFUSALS as error:
                refusals.append(
                    f"{type(error).__name__}: "
                    f"{str(error).splitlines()[0][:120] if str(error) else ''}"
                )
    missing = sorted(set(stacks) - checked)
    if missing:
        tried = f" Tried: {'; '.join(refusals)}." if refusals else ""
        raise FamilyError(
            f"{type(model).__name__}: no forward was found that runs the tower(s) "
            f"{', '.join(missing)}, so it cannot be shown that cutting their lists cuts the "
            f"model.{tried}"
        )
