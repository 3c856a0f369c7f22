"""The records that the stages hand on: Scores, Plan, PruneRecord, HealReport, EvalReport.

A progressive run adds a ProgressiveRecord, which tells of all its stages.

Every record is frozen, equals its own copy read back from JSON, names the fingerprints of what it
was made from, and is refused on loading when its content no longer matches its fingerprint.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from interlace._records.base import (
    Provenance,
    Record,
    parse_object,
    read_record_text,
)
from interlace._records.evaluation import EvalReport
from interlace._records.healing import HealReport
from interlace._records.plan import Action, Bridge, Plan, PruneRecord, TowerPlan
from interlace._records.progressive import ProgressiveRecord, StageRecord
from interlace._records.scores import Scores, TowerScores
from interlace._records.shape import ModelShape, SiteShape, TowerShape
from interlace.errors import CheckpointError, unknown_name

if TYPE_CHECKING:
    import os
    from pathlib import Path

__all__ = [
    "Action",
    "Bridge",
    "EvalReport",
    "HealReport",
    "ModelShape",
    "Plan",
    "ProgressiveRecord",
    "Provenance",
    "PruneRecord",
    "Record",
    "Scores",
    "SiteShape",
    "StageRecord",
    "TowerPlan",
    "TowerScores",
    "TowerShape",
    "load_record",
    "records_in",
]


_logger = logging.getLogger(__name__)

_KINDS: dict[str, type[Record]] = {
    kind.kind: kind
    for kind in (Scores, Plan, PruneRecord, HealReport, EvalReport, ProgressiveRecord)
}


def load_record(path: str | os.PathLike[str]) -> Record:
    """Read a record of whatever kind the file says it is, and verify it.

    Raises:
        CheckpointError: the file is missing, damaged, altered or no record of a known kind.
    """
    text = read_record_text(path)
    kind = parse_object(text, str(path)).get("kind")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise CheckpointError(f"{path}: {unknown_name('kind of record', kind, _KINDS)}")
    return _KINDS[kind].from_json(text, source=str(path))


def records_in(folder: Path) -> list[Record]:
    """Read the records of an exported model, its manifest left out.

    Files of others that have the name of a record are passed over, and named in the log.
    """
    found = []
    for kind in _KINDS:
        for path in sorted((*folder.glob(f"{kind}.json"), *folder.glob(f"{kind}_*.json"))):
            try:
                found.append(load_record(path))
            except CheckpointError as error:
                _logger.warning("Left out: %s", error)
    return found
