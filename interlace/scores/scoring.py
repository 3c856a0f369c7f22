"""`score`: one forward pass over calibration data, every metric of every tower on the way.

Legend: L layers of a tower, U samples of a batch.
"""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from interlace._progress import quiet, track
from interlace._torch_utils import (
    accepts,
    agree_on_failure,
    inference,
    joined_processes,
    sum_over_processes,
    to_device,
    without_cache,
)
from interlace.errors import ConfigError, DataError, InterlaceError, unknown_name
from interlace.models.handle import check_vlm
from interlace.records import Provenance, Scores, TowerScores
from interlace.scores.batches import Batch, Batches
from interlace.scores.metrics import WIDTH_METRICS, Meter, meter_classes
from interlace.scores.packing import check_packing
from interlace.scores.tap import Tap
from interlace.scores.widths import gauge_class, measure

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

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
    progress: bool = True,
    description: str = "scoring",
) -> Scores:
    """Measure every layer of a model in one forward pass over calibration data.

    The metrics of single heads and neurons (`head_norm`, `ffn_norm`, `head_taylor`) take a pass of
    their own each, the last one with answers and a backward pass.

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
        packed: lay the samples of a batch end to end in one row instead of padding them.
        progress: show a bar with the time left.
        description: what the bar is called.

    Returns:
        The scores: means over the tokens of a sample first, over samples then. In towers that
        read images the image takes the place of the sample.

    Raises:
        ConfigError: an unknown metric or tower, a pack that does not fit, a bad batch size, a
            model that cannot take packed batches.
        DataError: no data, data without anything for a tower that was asked for, or activations
            that are not finite; it says which tower, layer, batch and sample.
        ShapeError: a tower that does not run its layers one after the other.
    """
    check_vlm(vlm, "model")
    classes = meter_classes(metrics)
    wide = [name for name in dict.fromkeys(_listed(metrics)) if name in WIDTH_METRICS]
    counts: dict[str, int] = {}
    chosen = _towers(vlm, towers)
    batches = Batches(vlm, data, batch_size=batch_size, answers=answers, packed=packed)
    watches = [_watch(tower, classes, packs) for tower in chosen]
    with joined_processes() as (rank, world), contextlib.ExitStack() as stack:
        if rank or not progress:
            stack.enter_context(quiet())
        message = "it broke off"
        try:
            if classes:
                _run(vlm, track(batches.part(rank, world), description=description), watches)
            message = ""
        except InterlaceError as error:
            message = str(error)
            raise
        finally:
            agree_on_failure(message)
        for watch in watches:
            for meter in watch.meters.values():
                meter.load_totals(sum_over_processes(meter.totals()))
        importance: dict[str, dict[str, Any]] = {tower.name: {} for tower in chosen}
        for name in wide:
            gradient = gauge_class(name).gradient
            own = Batches(
                *(vlm, data),
                batch_size=batch_size,
                answers=answers or gradient,
                packed=False,
                labels=gradient,
            )
            found = measure(vlm, chosen, name, own, (rank, world), f"{description}: {name}")
            for tower_name, (values, count) in found.items():
                importance[tower_name][name] = values
                counts[tower_name] = count
    made = {w.tower.name: _collect(w, importance[w.tower.name], counts) for w in watches}
    return Scores(
        towers=_seen(made, named=towers is not None),
        shape=vlm.shape(),
        model_name=vlm.name,
        settings={
            "metrics": [*classes, *wide],
            "packs": packs if packs == "all" else list(packs),
            "batch_size": batch_size,
            "answers": answers,
            "packed": packed,
        },
        inputs={"model": vlm.fingerprint, **batches.fingerprints},
        provenance=Provenance.collect(seed=getattr(data, "seed", None)),
    )


def _listed(names: Sequence[str]) -> Sequence[str]:
    return (names,) if isinstance(names, str) else names


def _towers(vlm: VLM, names: Sequence[str] | None) -> list[Tower]:
    if names is None:
        return list(vlm.towers.values())
    if isinstance(names, str):
        names = (names,)
    if not names:
        raise ConfigError(
            f"towers is empty. Name some of {', '.join(vlm.towers)}, or give None for all of them."
        )
    for name in names:
        if name not in vlm.towers:
            raise ConfigError(unknown_name(f"tower of {vlm.name}", name, vlm.towers))
    return [vlm.towers[name] for name in dict.fromkeys(names)]


def _packs(tower: Tower, packs: Sequence[int] | Literal["all"]) -> tuple[int, ...]:
    num_layers = tower.num_layers
    if isinstance(packs, str):
        if packs != "all":
            raise ConfigError(f"packs must be 'all' or numbers of layers, got '{packs}'.")
        return tuple(range(1, num_layers))
    wanted = tuple(sorted(set(packs)))
    if not wanted:
        raise ConfigError("packs is empty. Give distances such as (1, 2, 3), or 'all'.")
    if any(isinstance(pack, bool) or not isinstance(pack, int) or pack < 1 for pack in wanted):
        raise ConfigError(f"packs must be whole numbers of at least 1 or 'all', got {wanted}.")
    if wanted == DEFAULT_PACKS:
        return tuple(pack for pack in wanted if pack < num_layers)
    if wanted[-1] >= num_layers:
        raise ConfigError(
            f"Pack {wanted[-1]} does not fit the tower '{tower.name}' with {num_layers} layers: "
            f"give packs of 1 to {num_layers - 1}, or score fewer towers by towers=(...)."
        )
    return wanted


def _watch(
    tower: Tower, classes: Mapping[str, type[Meter]], packs: Sequence[int] | Literal["all"]
) -> _Watch:
    own = _packs(tower, packs)
    meters = {
        name: kind(tower.num_layers, own, whole=packs == "all") for name, kind in classes.items()
    }
    return _Watch(tower, Tap(tower.name, tower.layers, list(meters.values())), meters)


def _run(vlm: VLM, batches: Iterable[Batch], watches: Sequence[_Watch]) -> None:
    extra: dict[str, Any] = {}
    # Neither the logits of all tokens nor a KV cache is of use here, and both cost memory.
    if accepts(vlm.model, "logits_to_keep"):
        extra["logits_to_keep"] = 1
    with contextlib.ExitStack() as stack:
        stack.enter_context(inference(vlm.model))
        stack.enter_context(without_cache(vlm.model))
        for watch in watches:
            stack.enter_context(watch.tap)
        checked = False
        for batch in batches:
            inputs = to_device(batch.inputs, vlm.device, vlm.dtype)
            if len(batch.singles) > 1 and not checked:
                check_packing(vlm, batch.singles)
                checked = True
            for watch in watches:
                watch.tap.start(partial(batch.units, vlm, watch.tower))
            vlm.model(**inputs, **extra)
            for watch in sorted(watches, key=lambda watch: watch.tap.began):
                _finish(watch, batch)


def _finish(watch: _Watch, batch: Batch) -> None:
    if not watch.tap.finish():
        return
    for meter in watch.meters.values():
        bad = meter.finish()
        if bad is None:
            continue
        where = f"the output of layer {bad.state - 1}" if bad.state else "the input of layer 0"
        raise DataError(
            f"NaN or infinite activations in {where} of the tower '{watch.tower.name}', batch "
            f"{batch.number}, {batch.name_of(watch.tower, bad.unit, bad.num_units)}. Open the "
            "model in another dtype (float16 overflows where bfloat16 and float32 do not), check "
            "its weights, or leave the sample out."
        )


def _collect(
    watch: _Watch, importance: Mapping[str, Any], counts: Mapping[str, int]
) -> TowerScores:
    tower = watch.tower
    fields: dict[str, Any] = {"num_samples": counts.get(tower.name, 0), "importance": importance}
    for meter in watch.meters.values():
        for name, value in meter.results().items():
            both = isinstance(value, dict) and isinstance(fields.get(name), dict)
            fields[name] = {**fields[name], **value} if both else value
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
