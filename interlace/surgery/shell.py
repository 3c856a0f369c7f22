"""Shells: a model as transformers builds it from a config, and filling it from another model.

A student is never made by editing the model it comes from. transformers builds a new module tree
from the student's config on the meta device, and the tensors are put into it by name. So every
number that a module derives from its index or from the depth is right by construction, the
checkpoint reloads into the same tree, and what the caller passed in is only ever read.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from interlace._torch_utils import FORWARD_REFUSALS
from interlace.errors import PlanError, ShapeError
from interlace.models.attention import set_widths

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from transformers import PreTrainedConfig, PreTrainedModel

    from interlace.models.attention import Widths

# What building a model from a config that it does not support raises.
REFUSALS = (*FORWARD_REFUSALS, StrictDataclassError, ShapeError)
_TENSORS = (torch.Tensor, nn.Parameter)
_PLAIN = (bool, int, float, str, type(None))
# Attributes that say nothing about what a module computes, or that are set from outside at run
# time.
_INCIDENTAL = (
    "training",
    "hf_device_map",
    "name_or_path",
    "all_tied_weights_keys",
    "gradient_checkpointing",
    "model_tags",
)
# The place of a layer; it follows from where the layer stands and is never taken over.
_INDEX = ("layer_idx", "layer_num", "layer_index")
_MAX_NAMED = 4


def build_shell(
    model: PreTrainedModel, config: PreTrainedConfig, widths: Mapping[str, Widths] | None = None
) -> PreTrainedModel:
    """Build the class of `model` from a config, on the meta device: all modules, no weights.

    Args:
        model: gives the class.
        config: becomes the config of the result; not copied.
        widths: path of a tower -> the widths of its layers that the config cannot state.

    Raises:
        PlanError: the class cannot be built from this config.
    """
    try:
        with torch.device("meta"):
            shell = cast("PreTrainedModel", type(model)(config))
            for path, widths_of_tower in (widths or {}).items():
                set_widths(cast("nn.ModuleList", shell.get_submodule(path)), widths_of_tower)
            return shell
    except REFUSALS as error:
        raise PlanError(
            f"{type(model).__name__} cannot be built from the config that this cut needs "
            f"({type(error).__name__}: {error}). A checkpoint of it could not be loaded either; "
            "choose another cut."
        ) from error


def check_same_tree(shell: nn.Module, model: nn.Module, consequence: str) -> None:
    """Check that two models have equal trees: module classes, names and shapes of tensors.

    Args:
        shell: as transformers builds it.
        model: what it is to be filled from.
        consequence: what a difference means and what to do, for the message.

    Raises:
        PlanError: they differ; names the first differences.
    """
    expected, found = _outline(shell), _outline(model)
    wrong = [
        f"{name or 'the model'} is {found.get(name, 'missing')} instead of "
        f"{expected.get(name, 'missing')}"
        for name in {**expected, **found}
        if expected.get(name) != found.get(name)
    ]
    if wrong:
        more = f"; and {len(wrong) - _MAX_NAMED} more" if len(wrong) > _MAX_NAMED else ""
        raise PlanError(f"{consequence} Differences: {'; '.join(wrong[:_MAX_NAMED])}{more}.")


def _outline(model: nn.Module) -> dict[str, str]:
    outline = {
        name: f"a {type(module).__name__}"
        + (" with a replaced forward" if "forward" in vars(module) else "")
        for name, module in model.named_modules(remove_duplicate=False)
    }
    for name, tensor in _tensors(model):
        # a quantised one keeps its shape
        kind = "tensor" if type(tensor) in _TENSORS else type(tensor).__name__
        outline[name] = f"a {kind} of shape {list(tensor.shape)}"
    return outline


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def fill(
    shell: nn.Module, source: nn.Module, *, own: Callable[[str], bool] = lambda _: False
) -> None:
    """Put the tensors of `source` into a shell with the same tree.

    Parameters are shared: new `nn.Parameter` objects over the same memory, without gradients, so
    that neither freezing nor training the one changes a flag of the other. Those that `own` names
    are copied and get gradients. Parameters that are one object in `source` (tied weights) are one
    object in the result. Buffers are copied.

    Args:
        shell: changed in place.
        source: only read.
        own: tells by its name in the tree whether a parameter is copied and trained.
    """
    modules = dict(shell.named_modules(remove_duplicate=False))

    def put(name: str, tensor: torch.Tensor) -> None:
        owner, _, leaf = name.rpartition(".")
        setattr(modules[owner], leaf, tensor)

    parameters = list(source.named_parameters(remove_duplicate=False))
    owned = {id(parameter) for name, parameter in parameters if own(name)}
    made: dict[int, Any] = {}
    for name, parameter in parameters:
        if id(parameter) not in made:
            train = id(parameter) in owned
            data = parameter.detach().clone() if train else parameter.detach()
            trains = train and data.is_floating_point()
            made[id(parameter)] = nn.Parameter(data, requires_grad=trains)
        put(name, made[id(parameter)])
    for name, buffer in source.named_buffers(remove_duplicate=False):
        put(name, made.setdefault(id(buffer), buffer.detach().clone()))
    for name, module in source.named_modules(remove_duplicate=False):
        built = vars(modules[name])
        for key, value in vars(module).items():
            # what a forward left behind, such as position offsets, is not part of the model
            if isinstance(value, torch.Tensor) and isinstance(built.get(key), torch.Tensor):
                setattr(modules[name], key, made.setdefault(id(value), value.detach().clone()))


def _is_plain(value: object) -> bool:
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(_is_plain(each) for each in value)
    if isinstance(value, dict):
        return all(_is_plain(key) and _is_plain(each) for key, each in value.items())
    return isinstance(value, _PLAIN)


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """Return the numbers, texts and lists that a module keeps and may compute with."""
    return {
        key: value
        for key, value in vars(module).items()
        if not key.startswith("_") and key not in _INCIDENTAL and _is_plain(value)
    }


def carried_over(shell: nn.Module, model: nn.Module) -> dict[int, dict[str, Any]]:
    """Find attributes that were changed on a model after it was built, a scale set by hand.

    Args:
        shell: the model as transformers builds it from the same config.
        model: the model as it is.

    Returns:
        id of the module in `shell` -> attribute -> value in `model`.
    """
    changed: dict[int, dict[str, Any]] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, module in shell.named_modules(remove_duplicate=False):
        built = plain_attributes(module)
        for key, value in plain_attributes(modules[name]).items():
            if key not in _INDEX and (key not in built or not _same(built[key], value)):
                changed.setdefault(id(module), {})[key] = copy.deepcopy(value)
    return changed


def check_same_attributes(
    shell: nn.Module, draft: nn.Module, moved: Callable[[str], Mapping[int, int]]
) -> None:
    """Check that transformers builds every module of a student as its source was built.

    This is what finds a model whose layers differ by their number in a way that its config cannot
    state for the student: a window on every second layer, a constant that grows with the depth.

    Args:
        shell: the student as built from its config.
        draft: the tree it is filled from.
        moved: path of a module -> numbers that may legitimately differ there, old -> new (its
            index, the depth).

    Raises:
        PlanError: an attribute differs otherwise.
    """
    modules = dict(shell.named_modules(remove_duplicate=False))
    for name, module in draft.named_modules(remove_duplicate=False):
        built = plain_attributes(modules[name])
        for key, value in plain_attributes(module).items():
            new = built.get(key)
            if _same(new, value):
                continue
            if type(value) is int and type(new) is int and moved(name).get(value) == new:
                continue
            raise PlanError(
                f"The config cannot state this cut: the kept module {name or 'model'} has {key} = "
                f"{value!r}, but transformers would build it with {new!r} at its new place. "
                "Choose other layers."
            )


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return list(one) == list(other)
    return bool(one == other)
