"""Which backend goes first on which GPU: measured once, kept as data, never measured while serving.

`order.json` maps the name of a GPU, as torch gives it, to ops, and an op to its backends, fastest
first. `interlace bench --update-order` writes it. Backends that it leaves out follow in the
general order, and so does every op on a GPU that was not measured.
"""

from __future__ import annotations

import functools
import json
from importlib import resources
from typing import TYPE_CHECKING

import torch

from interlace.ops._selection import ORDER

if TYPE_CHECKING:
    from collections.abc import Mapping


def precedence(op: str, device: torch.device) -> tuple[str, ...]:
    """Names of all backends in the order in which "auto" tries them for an op on a device."""
    if device.type != "cuda":
        return ORDER
    return _precedence(op, torch.cuda.get_device_name(device))


@functools.cache
def _precedence(op: str, gpu: str) -> tuple[str, ...]:
    first = tuple(measured().get(gpu, {}).get(op, ()))
    return (*first, *(name for name in ORDER if name not in first))


@functools.cache
def measured() -> Mapping[str, Mapping[str, list[str]]]:
    """Read the measured orders: GPU name -> op -> backends, fastest first."""
    text = resources.files("interlace.ops").joinpath("order.json").read_text(encoding="utf-8")
    orders: dict[str, dict[str, list[str]]] = json.loads(text)
    for gpu, ops in orders.items():
        for op, names in ops.items():
            unknown = set(names) - set(ORDER)
            if unknown:
                raise ValueError(f"order.json names {sorted(unknown)} for {op} on {gpu}")
    return orders
