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
        self._done = {json.dumps(row["cell"]) for row in read(path)}

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
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"cell": cell, **result, **self.stated, **_provenance()}) + "\n")
        log.info("%s: %s, %.0f s", cell, result.get("healed", "done"), time.monotonic() - started)


def _provenance() -> dict[str, Any]:
    found = Provenance.collect()
    keys = ("package_version", "commit", "python", "torch", "transformers", "device")
    return {
        "versions": {key: getattr(found, key) for key in keys},
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d"),
    }
