"""Results of benchmarks that take long: a JSON line per cell, so that a run can be continued."""

from __future__ import annotations

import json
import logging
import time
from typing import TYPE_CHECKING, Any

import torch

from interlace.errors import PlanError
from interlace.records import Provenance

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

log = logging.getLogger("cells")

# what a line says about the cell and its making, beside the result
ABOUT = ("cell", "seconds", "versions", "threads", "date")


def read(path: Path) -> list[dict[str, Any]]:
    """Read all cells of a results file; none where there is no file yet."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


class Cells:
    """A results file that is filled cell by cell; cells that it holds are not measured again."""

    def __init__(self, path: Path, **stated: Any) -> None:
        """Open a results file.

        Args:
            path: of the file; made with its folder when the first cell is known.
            stated: what every new line says beside its own result.
        """
        self.path = path
        self.stated = stated
        self._done = {json.dumps(row["cell"]): row for row in read(path)}

    def get(self, cell: list[Any]) -> dict[str, Any] | None:
        """Return what was measured for a cell; None where it is not known yet."""
        row = self._done.get(json.dumps(cell))
        return None if row is None else {k: v for k, v in row.items() if k not in ABOUT}

    def adopt(self, path: Path) -> None:
        """Take over the cells of another file that this one lacks."""
        for row in read(path):
            if json.dumps(row["cell"]) not in self._done:
                self._write(row)

    def keep(self, cell: list[Any], make: Callable[[], dict[str, Any]]) -> None:
        """Measure a cell and write it as soon as it is known, unless the file holds it."""
        if json.dumps(cell) in self._done:
            return
        started = time.monotonic()
        try:
            result = make()
        except PlanError as error:
            # a rule that has no plan at this fraction, or a bridge that a tower cannot take, is a
            # result, not a failure of the run
            result = {"no_plan": str(error)}
        seconds = round(time.monotonic() - started, 1)
        row = {"cell": cell, **result, "seconds": seconds, **self.stated, **_provenance()}
        self._write(row)
        log.info("%s: %s, %.0f s", cell, result.get("healed", "done"), seconds)

    def _write(self, row: dict[str, Any]) -> None:
        self._done[json.dumps(row["cell"])] = row
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def _provenance() -> dict[str, Any]:
    found = Provenance.collect()
    keys = ("package_version", "commit", "python", "torch", "transformers", "device")
    return {
        "versions": {key: getattr(found, key) for key in keys},
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d"),
    }
