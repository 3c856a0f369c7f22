"""`score`: every metric of every tower, in as few passes over calibration data as they allow.

Legend: L layers of a tower, U samples of a batch.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal

from interlace._progress import quiet, track
from interlace._torch_utils import (
    failing_together,
    inference,
    joined_processes,
    outside_inference_mode,
    sum_over_processes,
    without_cache,
)
from interlace.errors import ConfigError, DataError, check_numbers, unknown_name
from interlace.models.handle import check_vlm, to_model
from interlace.models.predictor import for_states
from interlace.records import Provenance, Scores, TowerScores
from interlace.scores.alignment import Alignment, meeting_layers
from interlace.scores.batches import Batch, Batches
from interlace.scores.metrics import Meter, metric_classes, named
from interlace.scores.obs import Eliminations, Obs
from interlace.scores.packing import check_packing
from interlace.scores.probes import Probe, Probes
from interlace.scores.tap import Tap
from interlace.scores.task import Measure, TaskRelevance
from interlace.scores.widths import Gauge, Gauges

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from interlace.data import Sample
    from interlace.models.handle import VLM, Tower

logger = logging.getLogger(__name__)

DEFAULT_PACKS = (1, 2, 3)


@dataclass(frozen=True)
class _Watch:
    """One tower with its tap and its meters by metric name."""

    tower: Tower
    tap: Tap
    meters: dict[str, Meter]


@outside_inference_mode()
def score(
    vlm: VLM,
    data: Sequence[Sample] | Iterable[Mapping[str, Any]],
    *,
    metrics: Sequence[str] = ("similarity",),
    packs: Sequence[int] | Literal["all"] = DEFAULT_PACKS,
    towers: Sequence[str] | None = None,
    batch_size: int = 8,
    answers: bool = False,
    packed: bool = False,
    num_directions: int = 8,
    measure: Measure | None = None,
    progress: bool = True,
    description: str = "scoring",
) -> Scores:
    """Measure every layer of a model on calibration data.

    What the metrics cost per sample, L layers in the tower, in forward passes of the model; several
    of a kind share what they can, and the bar says the sum:

    - "similarity", "alignment": one pass for both, on the questions.
    - "sensitivity": a forward and a backward pass, about 3.
    - "relevance": 1 + L/2 for a tower that nothing else reads; for one that others read up to L.
    - "attention_relevance", "mlp_relevance": as "relevance", each.
    - "sensitivity_zeroth_order": `num_directions` times L, half as for relevance and twice for the
      two sides of a difference. No gradients, so it needs the memory of inference.
    - "task_relevance": L + 1 calls of `measure` per tower, whatever they cost.
    - "head_norm", "ffn_norm", of single heads and neurons: one pass each, on the questions.
    - "head_taylor", of single heads: a forward and a backward pass, about 3.
    - "head_obs", "ffn_obs", of single heads and neurons: two forward and four backward passes for
      both, about 10, and one for every 4 GiB beyond the first of what they collect: 4 C^2 bytes for
      every output projection that reads C columns, on its device.

    Sensitivity, relevance, "head_taylor" and the two of "obs" run on questions with their answers,
    since they need a loss or predictions: those of the answer tokens, or the contrastive ones.

    Under torch.distributed (torchrun) every process takes every n-th batch and all get the
    scores of the whole data, equal to those of one process up to the order of fp64 sums.

    Args:
        vlm: the model; it is left as it was.
        data: samples, or ready batches that the model's forward takes as keyword arguments.
        metrics: names of metrics; see `METRICS` and `WIDTH_METRICS`.
        packs: distances p >= 1 of the compared states h_i and h_{i+p}, or "all" for the full
            matrix. Of the default 1, 2, 3 those that a shallow tower has no room for are left
            out there; any other set has to fit every tower that is scored.
        towers: names of towers; default: all of them.
        batch_size: samples per forward pass. Ready batches stay as they are; only with `packed`,
            where each has to hold one sample, so many of them are laid into a row.
        answers: feed the answers too. By default the model sees what stands before the first
            answer, as published. Models whose text part runs on answers alone always get them.
        packed: lay the samples of a batch end to end in one row instead of padding them, for the
            metrics of hidden states; those of the loss, of heads and of neurons always pad.
        num_directions: random directions per layer of "sensitivity_zeroth_order", at least 1.
        measure: what "task_relevance" asks: callback (tower, dropped positions) -> a number, higher
            is better; it is called with no layers for the whole model.
        progress: show a bar with the time left.
        description: what the bar is called.

    Returns:
        The scores: means over the tokens of a sample first, over samples then. In towers that
        read images the image takes the place of the sample for the metrics of hidden states.

    Raises:
        ConfigError: an unknown metric or tower, a pack that does not fit, a bad batch size, a
            model that cannot take packed batches, "task_relevance" without `measure`.
        DataError: no data, data without anything for a tower that was asked for or without the
            answers that a loss needs, or activations, losses or gradients that are not finite; it
            says which tower, layer, batch and sample.
        ShapeError: a tower that does not run its layers one after the other.
    """
    check_vlm(vlm, "model")
    classes = metric_classes(metrics)
    chosen = _towers(vlm, towers)
    batches = Batches(vlm, data, batch_size=batch_size, answers=answers, packed=packed)
    distances = _distances(packs)
    watches = [_watch(tower, classes, distances) for tower in chosen]
    probes = _probes(vlm, chosen, classes, num_directions)
    task = _task(chosen, classes, measure)
    wide = {name: kind for name, kind in classes.items() if issubclass(kind, Gauge)}
    gauges = Gauges(vlm, chosen, wide) if wide else None
    removed = {name: kind for name, kind in classes.items() if issubclass(kind, Obs)}
    eliminations = Eliminations(vlm, chosen, removed) if removed else None
    if probes or eliminations or any(kind.gradient for kind in wide.values()):
        batches.check_compared()
    others = [each for each in (probes, task, gauges) if each is not None]
    with joined_processes() as (rank, world), contextlib.ExitStack() as stack:
        if rank or not progress:
            stack.enter_context(quiet())
        with failing_together():
            if any(watch.meters for watch in watches):
                _run(vlm, track(batches.part(rank, world), description=description), watches)
            if probes is not None:
                labelled = batches.labelled().part(rank, world)
                probes.run(track(labelled, description=probes.description()))
            if task is not None:
                task.run(rank, world)
            if gauges is not None:
                gauges.run(batches, rank, world, description)
        meters = [meter for watch in watches for meter in watch.meters.values()]
        for each in (*meters, *others):
            each.load_totals(sum_over_processes(each.totals()))
        if probes is not None:
            probes.share_notes()
        if eliminations is not None:
            eliminations.run(batches, rank, world, description)
    giving = others if eliminations is None else [*others, eliminations]
    scored = {
        watch.tower.name: _collect(
            vlm, watch, *(other.results(watch.tower.name) for other in giving)
        )
        for watch in watches
    }
    return Scores(
        towers=_seen(scored, named=towers is not None),
        shape=vlm.shape(),
        model_name=vlm.name,
        settings={
            "metrics": list(classes),
            "packs": distances if distances == "all" else list(distances),
            "batch_size": batch_size,
            "answers": answers,
            "packed": packed,
            **(probes.settings() if probes is not None else {}),
        },
        inputs={"model": vlm.fingerprint, **batches.fingerprints},
        provenance=Provenance.collect(seed=getattr(data, "seed", None)),
    )


def _probes(
    vlm: VLM, towers: Sequence[Tower], classes: Mapping[str, type], num_directions: int
) -> Probes | None:
    check_numbers(num_directions=num_directions)
    kinds = {name: kind for name, kind in classes.items() if issubclass(kind, Probe)}
    by_name = {tower.name: tower for tower in towers}
    return Probes(vlm, by_name, kinds, num_directions) if kinds else None


def _task(
    towers: Sequence[Tower], classes: Mapping[str, type], measure: Measure | None
) -> TaskRelevance | None:
    if TaskRelevance in classes.values():
        return TaskRelevance(measure, {tower.name: tower for tower in towers})
    if measure is not None:
        raise ConfigError(
            "measure=... was given, but no metric calls it. Add 'task_relevance' to metrics."
        )
    return None


def _towers(vlm: VLM, names: Sequence[str] | None) -> list[Tower]:
    if names is None:
        return list(vlm.towers.values())
    names = named("towers", names, next(iter(vlm.towers)))
    if not names:
        raise ConfigError(
            f"towers is empty. Name some of {', '.join(vlm.towers)}, or give None for all of them."
        )
    for name in names:
        if name not in vlm.towers:
            raise ConfigError(unknown_name(f"tower of {vlm.name}", name, vlm.towers))
    return [vlm.towers[name] for name in dict.fromkeys(names)]


def _distances(packs: Any) -> tuple[int, ...] | Literal["all"]:
    if isinstance(packs, str):
        if packs != "all":
            raise ConfigError(f"packs must be 'all' or numbers of layers, got '{packs}'.")
        return "all"
    if not isinstance(packs, Iterable):
        raise ConfigError(f"packs is {packs!r}; give 'all' or distances, such as (1, 2, 3).")
    given = tuple(packs)
    if not given:
        raise ConfigError("packs is empty. Give distances such as (1, 2, 3), or 'all'.")
    if any(isinstance(p, bool) or not isinstance(p, Integral) or int(p) < 1 for p in given):
        raise ConfigError(f"packs must be whole numbers of at least 1 or 'all', got {given}.")
    return tuple(int(pack) for pack in given)


def _packs(tower: Tower, packs: tuple[int, ...] | Literal["all"]) -> tuple[int, ...]:
    num_layers = tower.num_layers
    if packs == "all":
        return tuple(range(1, num_layers))
    wanted = tuple(sorted(set(packs)))
    if wanted == DEFAULT_PACKS:
        return tuple(pack for pack in wanted if pack < num_layers)
    if wanted[-1] >= num_layers:
        raise ConfigError(
            f"Pack {wanted[-1]} does not fit the tower '{tower.name}' with {num_layers} layers: "
            f"give packs of 1 to {num_layers - 1}, or score fewer towers by towers=(...)."
        )
    return wanted


def _watch(
    tower: Tower, classes: Mapping[str, type], packs: tuple[int, ...] | Literal["all"]
) -> _Watch:
    own = _packs(tower, packs)
    meters = {
        name: kind(tower.num_layers, own, whole=packs == "all")
        for name, kind in classes.items()
        if issubclass(kind, Meter)
    }
    return _Watch(tower, Tap(tower.name, tower.layers, list(meters.values())), meters)


def _run(vlm: VLM, batches: Iterable[Batch], watches: Sequence[_Watch]) -> None:
    with contextlib.ExitStack() as stack:
        stack.enter_context(inference(vlm.model))
        stack.enter_context(without_cache(vlm.model))
        for watch in watches:
            stack.enter_context(watch.tap)
        checked = False
        for batch in batches:
            if len(batch.singles) > 1 and not checked:
                check_packing(vlm, batch.singles)
                checked = True
            for watch in watches:
                watch.tap.start(partial(batch.units, vlm, watch.tower))
            vlm.model(**to_model(for_states(vlm.model, batch.inputs), vlm))
            finished = [
                watch
                for watch in sorted(watches, key=lambda watch: watch.tap.began)
                if _finish(watch, batch)
            ]
            _join(finished)


def _join(watches: Sequence[_Watch]) -> None:
    """Let every tower's alignment meter look at the tower of the other modality."""
    meters = {
        watch.tower.name: meter
        for watch in watches
        for meter in watch.meters.values()
        if isinstance(meter, Alignment)
    }
    for name, meter in meters.items():
        names = ("text_encoder", "text") if name == "vision" else ("vision",)
        other = next((meters[each] for each in names if each in meters), None)
        if other is not None:
            meter.join(other)


def _finish(watch: _Watch, batch: Batch) -> bool:
    """End a batch for one tower and say whether it ran.

    Raises:
        DataError: activations are not finite.
    """
    if not watch.tap.finish():
        return False
    for meter in watch.meters.values():
        bad = meter.finish()
        if bad is not None:
            raise batch.not_finite(watch.tower, bad)
    return True


def _collect(vlm: VLM, watch: _Watch, *more: dict[str, Any]) -> TowerScores:
    tower = watch.tower
    fields: dict[str, Any] = {}
    for results in (*(meter.results() for meter in watch.meters.values()), *more):
        for name, value in results.items():
            if isinstance(value, dict):
                fields[name] = {**fields.get(name, {}), **value}
            elif isinstance(value, tuple):
                fields[name] = (*fields.get(name, ()), *value)
            else:
                fields[name] = value
    # without a metric of the hidden states, the samples are those behind the other metrics
    fields.setdefault("num_samples", max(fields.get("group_samples", {}).values(), default=0))
    if "alignment" in watch.meters:
        fields["alignment"] = meeting_layers(vlm, tower)
    # Records of a pruned model count its layers as they stand; the family counts original ones.
    crossing = tower.cross_attention_layers
    return TowerScores(
        num_layers=tower.num_layers,
        pinned={tower.position(layer): reason for layer, reason in tower.pinned.items()},
        cross_attention_layers=(
            None if crossing is None else tuple(tower.position(layer) for layer in crossing)
        ),
        **fields,
    )


def _seen(scored: dict[str, TowerScores], *, named: bool) -> dict[str, TowerScores]:
    unseen = [name for name, tower in scored.items() if not tower.num_samples]
    if unseen and (named or len(unseen) == len(scored)):
        raise DataError(
            f"Nothing of the calibration data ran through the tower {', '.join(unseen)}. A vision "
            "tower needs samples with images, a text decoder samples with text."
        )
    for name in unseen:
        logger.warning("nothing of the data ran through the tower '%s'; it has no scores", name)
    return {name: tower for name, tower in scored.items() if name not in unseen}
