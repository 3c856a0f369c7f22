"""Shells: copies of a model's modules over the same weights, so that the original is left alone.

Legend: none; this file moves parameters, not activations.

Healing hooks, wraps and shards modules, switches modes and trains in fp32 where the model is stored
in half precision. All of that happens to a shell. The student itself changes once, when everything
went well: `hand_over` writes the trained values into it.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence

HALF = (torch.float16, torch.bfloat16)


def make_shell(model: nn.Module, own: Collection[str] = ()) -> nn.Module:
    """Copy the modules and configs of a model over the same weights in memory.

    Args:
        model: any module; it is not changed.
        own: names of the parameters that will train. The shell gets copies of these, in fp32 where
            they are stored in half precision: steps of 1e-5 vanish in the rounding of bfloat16.

    Returns:
        The shell, in eval mode, with the KV cache off in its configs. Exactly the parameters in
        `own` require a gradient; whether those of `model` do stays as it was.
    """
    shared: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        if name in own:
            value = value.to(torch.float32 if value.dtype in HALF else value.dtype, copy=True)
        shared[id(parameter)] = nn.Parameter(value, requires_grad=name in own)
    shell = copy.deepcopy(model, shared)
    for module in shell.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "use_cache", None):
            config.use_cache = False
    return shell.eval()


def move_together(models: Sequence[nn.Module], device: torch.device) -> None:
    """Move models to a device, in place; weights that they share stay shared.

    Args:
        models: a student and its teacher, say.
        device: where to.
    """
    # The originals are kept until the end: freed memory could come back under the same key.
    moved: dict[tuple[int, torch.Size, torch.dtype], tuple[torch.Tensor, torch.Tensor]] = {}
    for model in models:
        for parameter in model.parameters():
            if parameter.device != device:
                key = (parameter.data_ptr(), parameter.shape, parameter.dtype)
                if key not in moved:
                    moved[key] = (parameter.data, parameter.data.to(device))
                parameter.data = moved[key][1]
        model.to(device)


def full_value(parameter: torch.Tensor) -> torch.Tensor:
    """Return a parameter (or optimizer state) as a whole tensor, gathered where it is sharded.

    Every process of the run must call this together.
    """
    value = parameter.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value


def gathered(tensors: Iterable[tuple[str, torch.Tensor]], *, keep: bool) -> dict[str, torch.Tensor]:
    """Gather named tensors one by one and move them to the CPU.

    Every process of the run must call this together.

    Args:
        tensors: names and (possibly sharded) tensors.
        keep: whether this process needs them; another one takes part and returns nothing.
    """
    whole = {}
    for name, tensor in tensors:
        value = full_value(tensor)
        if keep:
            whole[name] = value.cpu()
    return whole


def like_parameter(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Shard a whole tensor the way a parameter is sharded; the inverse of `full_value`."""
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    whole = value.to(parameter.device)
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements)


def reshard(model: nn.Module) -> None:
    """Let go of weights that FSDP2 gathered for a pass and kept, so that the next reads new ones.

    It lets go by itself after a backward pass, and after a forward pass only where it is told to.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def hand_over(
    model: nn.Module, names: Collection[str], trained: Callable[[str], torch.Tensor]
) -> None:
    """Write trained values into a model, in its own dtype and in place.

    Args:
        model: the model that was healed.
        names: names of the trained parameters in it.
        trained: gives the whole trained tensor of a name.
    """
    with torch.no_grad():
        for name in names:
            parameter = model.get_parameter(name)
            parameter.copy_(trained(name).to(parameter.device, parameter.dtype))
