"""Fitting the bridges of all towers of a student, in the order in which the towers run."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from interlace._torch_utils import inference, without_cache
from interlace.models.bridges import DIAGONAL, LOWRANK
from interlace.surgery.bridges.calibration import Calibration, default_data
from interlace.surgery.bridges.fold import fit_fold
from interlace.surgery.bridges.gaps import find_gaps
from interlace.surgery.bridges.names import EVEN, FOLD, REFIT
from interlace.surgery.bridges.observe import Pair
from interlace.surgery.bridges.runtime import fit_run_time
from interlace.surgery.bridges.scale import fit_scale

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import nn

    from interlace.models.handle import VLM
    from interlace.records import Bridge
    from interlace.surgery.cuts import Cut


@dataclass(frozen=True)
class Fitted:
    """What was done.

    Attributes:
        bridges: one entry per gap.
        notes: what a user of the student should know.
        inputs: fingerprints of what the bridges were fitted on.
    """

    bridges: tuple[Bridge, ...] = ()
    notes: tuple[str, ...] = ()
    inputs: dict[str, str] = field(default_factory=dict)


def fit_bridges(
    vlm: VLM,
    student: nn.Module,
    cuts: Mapping[str, Cut],
    names: Mapping[str, str],
    data: Any,
    batch_size: int,
    rank: int,
    token_weights: str,
) -> Fitted:
    """Fit the bridges of a student.

    The towers come in the order in which they run, and the cuts of each from the front to the back:
    every fit sees what the student makes of the data with everything before it repaired.

    Args:
        vlm: the model before the cut; left as it was.
        student: the model after it; given new weights, never written to in place.
        cuts: tower name -> its cut.
        names: tower name -> its bridge, for the towers that get one.
        data: samples or batches of model inputs; None for the built-in scenes; or a calibration of
            this model that has served before.
        batch_size: samples per forward pass.
        rank: of low-rank bridges, at least 1.
        token_weights: as of `prune`; that of a calibration is its own.

    Raises:
        PlanError: a bridge cannot be expressed in a tower.
        ConfigError: no processor for samples, a bad batch size.
        DataError: too little or unusable data.
    """
    fits: dict[str, Callable[..., list[Bridge]]] = {
        "scale": fit_scale,
        FOLD: fit_fold,
        REFIT: fit_fold,
        **{kind: partial(fit_run_time, kind=kind, rank=rank) for kind in (DIAGONAL, LOWRANK)},
    }
    notes: list[str] = []
    if data is None:
        data, note = default_data(vlm)
        notes.append(note)
    if isinstance(data, Calibration):
        calibration = data
    else:
        calibration = Calibration(vlm, data, batch_size, token_weights=token_weights)
    bridges: list[Bridge] = []
    with contextlib.ExitStack() as stack:
        for model in (vlm.model, student):
            stack.enter_context(inference(model))
            stack.enter_context(without_cache(model))
        for tower, weights in calibration.survey(names).items():
            gaps, unread = find_gaps(cuts[tower], names[tower])
            notes += [
                f"{tower} layers {', '.join(map(str, run))} are read by nothing, so no bridge "
                "stands in for them"
                for run in unread
            ]
            if gaps:
                fit = fits[names[tower]]
                pair = Pair(vlm.model, student, calibration, weights)
                with calibration.looking_at(tower, student, cuts):
                    bridges += fit(pair, gaps)
    if calibration.token_weights != EVEN:
        weighed = {"token_weights": calibration.token_weights}
        bridges = [
            replace(each, settings={**each.settings, **weighed}) if each.settings else each
            for each in bridges
        ]
    notes += [
        f"{bridge.tower} layers {', '.join(map(str, bridge.dropped))} have no bridge: {bridge.note}"
        for bridge in bridges
        if bridge.note and bridge.dropped
    ]
    inputs = {"data": calibration.fingerprint} if calibration.fingerprint else {}
    return Fitted(tuple(bridges), tuple(notes), inputs)
