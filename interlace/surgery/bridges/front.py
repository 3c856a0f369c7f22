"""Outputs of the modules in front of a tower, computed once per batch and replayed afterwards.

A vision tower costs much more than the one text layer that a fit looks at.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from interlace.models.states import hooked, standing_in

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from torch import nn


def modules_in_front(
    model: nn.Module, path: str, others: Mapping[str, str], runs: Iterable[Callable[[], Any]]
) -> dict[str, str]:
    """Find the modules that have finished before a tower begins.

    Args:
        model: the model.
        path: dotted path of the tower's layers.
        others: name -> path of the layers of the other towers.
        runs: each runs the model on a batch; taken until the tower has run.

    Returns:
        Name of another tower -> path of the outermost module around it that a forward pass calls
        and that has ended when the first layer of the tower is called; without the towers that
        have none.
    """
    around = {
        name: [each for each in _enclosing(other) if not f"{path}.".startswith(f"{each}.")]
        for name, other in others.items()
    }
    early: set[str] = set()
    late: set[str] = set()
    begun = False

    def begin(*_: Any) -> None:
        nonlocal begun
        begun = True

    def end(each: str, *_: Any) -> None:
        (late if begun else early).add(each)

    layers: Any = model.get_submodule(path)
    hooks = [layers[0].register_forward_pre_hook(begin)]
    for each in {each for found in around.values() for each in found}:
        hooks.append(model.get_submodule(each).register_forward_hook(partial(end, each)))
    with hooked(hooks):
        for run in runs:
            run()
            if begun:
                break
    done = {
        name: [each for each in found if each in early - late] for name, found in around.items()
    }
    return {name: found[0] for name, found in done.items() if found}


def _enclosing(path: str) -> list[str]:
    """Return the paths of the modules around a list of layers, the outermost first."""
    names = path.split(".")
    return [".".join(names[:count]) for count in range(1, len(names))]


class Front:
    """Outputs of modules of a model for every batch, kept on the CPU."""

    def __init__(self, model: nn.Module, kept: Mapping[str, dict[Any, Any]]) -> None:
        """Name the modules.

        Args:
            model: the model.
            kept: path of a module -> where its outputs are kept; models in which it gives the same
                may share that. It must give the same whenever the model runs on a batch.
        """
        self._modules = [(model.get_submodule(path), found) for path, found in kept.items()]

    @contextlib.contextmanager
    def resting(self, batch: Mapping[str, Any]) -> Iterator[None]:
        """Replay the outputs for a batch, which is recognised by its identity, inside the block."""
        with contextlib.ExitStack() as stack:
            for module, kept in self._modules:
                stack.enter_context(standing_in([module], partial(_replay, kept, id(batch))))
            yield


def _replay(kept: dict[Any, Any], batch: int, forward: Callable[..., Any]) -> Callable[..., Any]:
    calls = 0

    def give(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        key, calls = (batch, calls), calls + 1
        if key in kept:
            return pytree.tree_map(_copied, kept[key])
        output = forward(*args, **kwargs)
        # whoever is given it may go on to work in place
        kept[key] = pytree.tree_map(_put_away, output)
        return output

    return give


class _Kept:
    """A tensor on the CPU that was on a device."""

    def __init__(self, value: torch.Tensor) -> None:
        self.device = value.device
        self.value = value.detach().to("cpu", copy=True)


def _put_away(value: Any) -> Any:
    return _Kept(value) if isinstance(value, torch.Tensor) else value


def _copied(value: Any) -> Any:
    return value.value.to(value.device, copy=True) if isinstance(value, _Kept) else value
