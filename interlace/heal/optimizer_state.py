"""The optimizer's tensors and the schedule's place as plain tensors and numbers, and back.

Legend: none; tensors have the shapes of the parameters they belong to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from interlace.heal.shell import gathered, like_parameter

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn


def _plain(optimizer: Any) -> Any:
    # accelerate wraps the optimizer.
    return getattr(optimizer, "optimizer", optimizer)


def tensors_of(
    optimizer: Any, trained: Mapping[str, nn.Parameter], *, keep: bool
) -> dict[str, Tensor]:
    """Return the optimizer's tensors, whole and on the CPU, as "<state>/<parameter name>".

    Every process of the run must call this together; the result is empty unless `keep` is set.
    """
    state = _plain(optimizer).state
    named = (
        (f"{key}/{name}", value)
        for name, parameter in trained.items()
        for key, value in state.get(parameter, {}).items()
    )
    return gathered(named, keep=keep)


def load(
    optimizer: Any, trained: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Put back what `tensors_of` returned, sharded like the parameters."""
    stored: dict[str, dict[str, Tensor]] = {}
    for path, value in tensors.items():
        key, name = path.split("/", 1)
        stored.setdefault(name, {})[key] = like_parameter(value, trained[name])
    names = {id(parameter): name for name, parameter in trained.items()}
    plain = _plain(optimizer)
    # A state dict counts parameters in the order of the groups.
    order = [names[id(each)] for group in plain.param_groups for each in group["params"]]
    state = plain.state_dict()
    state["state"] = {i: stored[name] for i, name in enumerate(order) if name in stored}
    plain.load_state_dict(state)


def schedule_of(scheduler: Any) -> dict[str, Any]:
    """Return where a learning-rate schedule stands."""
    return {"last_epoch": scheduler.last_epoch, "last_lr": scheduler.get_last_lr()}


def load_schedule(optimizer: Any, scheduler: Any, place: Mapping[str, Any]) -> None:
    """Put back what `schedule_of` returned, and the learning rates that follow from it."""
    scheduler.last_epoch = place["last_epoch"]
    scheduler._step_count = place["last_epoch"] + 1
    scheduler._last_lr = list(place["last_lr"])
    for group, rate in zip(_plain(optimizer).param_groups, scheduler._last_lr, strict=True):
        group["lr"] = rate
