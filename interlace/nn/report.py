"""What `fuse` did to every module, and why it left the others alone."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class FuseEntry:
    """One module, or one facility of the whole model.

    Attributes:
        module: dotted path in the model; "" for the model itself.
        kind: class of the module.
        part: "attention", "norm", "block", "mlp", "patches", "head", "absent", "graphs" or
            "overlap".
        fused: whether it was replaced.
        backend: what computes it, in words; empty if it was left alone.
        reason: why it was left alone, or what restricts the backend; may be empty.
    """

    module: str
    kind: str
    part: str
    fused: bool
    backend: str = ""
    reason: str = ""


@dataclass(frozen=True)
class FuseReport:
    """What `fuse` did. `str(report)` is a table with one line for modules that are alike.

    Attributes:
        model: class of the model.
        device: where it was when it was fused, such as "cuda:0".
        dtype: of most of its parameters, such as "torch.bfloat16".
        entries: one per module that was replaced or looked at, in the order of the model.
    """

    model: str
    device: str
    dtype: str
    entries: tuple[FuseEntry, ...]

    def _repr_pretty_(self, printer: Any, _cycle: bool) -> None:
        # what notebooks show of a cell's last value
        printer.text(str(self))

    @property
    def fused(self) -> tuple[FuseEntry, ...]:
        """What was replaced."""
        return tuple(entry for entry in self.entries if entry.fused)

    def __str__(self) -> str:
        lines = [f"{self.model} on {self.device}, {self.dtype.removeprefix('torch.')}"]
        rows = [("module", "part", "class", "now", "reason")]
        rows += [
            (path, kind.part, kind.kind, kind.backend if kind.fused else "left alone", kind.reason)
            for path, kind in self._grouped()
        ]
        widths = [max(len(row[place]) for row in rows) for place in range(4)]
        for row in rows:
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
            lines.append("  ".join((*cells, row[4])).rstrip())
        return "\n".join(lines)

    def _grouped(self) -> list[tuple[str, FuseEntry]]:
        """Modules that differ by a number only, and fare alike, in one."""
        groups: dict[tuple[str, ...], list[FuseEntry]] = {}
        for entry in self.entries:
            key = (_NUMBER.sub("#", entry.module), entry.kind, entry.part, entry.backend)
            groups.setdefault((*key, entry.reason), []).append(entry)
        return [(_path([each.module for each in found]), found[0]) for found in groups.values()]


def _path(modules: list[str]) -> str:
    if len(modules) == 1:
        return modules[0] or "(model)"
    # the number in which the paths differ
    numbers = [tuple(map(int, _NUMBER.findall(module))) for module in modules]
    varying = next(
        (place for place, each in enumerate(zip(*numbers, strict=True)) if len(set(each)) > 1), 0
    )
    found = sorted({each[varying] for each in numbers})
    whole = found == list(range(found[0], found[-1] + 1))
    text = f"{found[0]}-{found[-1]}" if whole else ",".join(map(str, found))
    count = iter(range(len(numbers[0])))
    return _NUMBER.sub(
        lambda match: f"[{text}]" if next(count) == varying else match[0], modules[0]
    )
