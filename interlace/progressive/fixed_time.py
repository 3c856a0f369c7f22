"""How much of a layer's time narrower heads and feed-forward parts leave as it is, measured.

Legend, per tower: L layers, T seconds of the whole model, T_d of the model without a share d of the
layers, T_w of the model whose layers have lost a share w of their parameters as heads and neurons.
What is not of the layers drops out of

    the layers            A = (T - T_d) / d
    their parameters      B = (T - T_w) / w
    the fixed share       1 - B / A
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from interlace._records.shape import FFN_MULTIPLE
from interlace.data.given import as_samples
from interlace.errors import ConfigError, DataError, check_numbers, unknown_name
from interlace.evaluate._common import Options
from interlace.evaluate.speed import measure
from interlace.models.handle import check_one_device, check_vlm
from interlace.records import Plan, TowerPlan
from interlace.surgery import prune

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from interlace.data.samples import Sample
    from interlace.evaluate._common import TaskResult
    from interlace.models import VLM
    from interlace.records import SiteShape, TowerShape

# A share of exactly 1 would leave nothing that a width could save.
_MOST = 0.99
_FEWEST_ROUNDS = 2
_PHASES = {"prefill": "prefill_seconds", "decode": "decode_tokens_per_second"}
_ENCODED = {"vision": "images_per_second", "text": "texts_per_second"}


def fixed_time(
    vlm: VLM,
    data: Sequence[Sample],
    *,
    phase: Literal["decode", "prefill"] = "decode",
    towers: Sequence[str] | None = None,
    batch_size: int = 1,
    max_new_tokens: int = 32,
    rounds: int = 15,
    fused: bool = False,
) -> dict[str, float]:
    """Measure which share of a layer's time passes whatever its width, for `split_plan`.

    Times the model, the model without half of a tower's layers, and the model with half of the
    heads and neurons in each layer. Launching kernels, norms and attention over a long cache are
    fixed; products of matrices go with their width.

    Args:
        vlm: the model, not fused, on the device and in the dtype it will run in. Left as it is.
        data: samples to run it on; the first `batch_size` are taken.
        phase: what is timed of models that write text: "decode", one token after the other, or
            "prefill", up to the first one, which is what other towers than the text tower always
            do. Models that embed run their own tower.
        towers: towers to measure; default: the text tower where there is one, else all.
        batch_size: samples per batch, at least 1.
        max_new_tokens: tokens to decode, at most 32.
        rounds: timed runs of each model, at least 2; medians count.
        fused: put each on fused kernels while it is timed, one after the other; else they take
            turns.

    Returns:
        Tower -> share, 0..0.99. Noise makes small models' shares uncertain by some hundredths.

    Raises:
        ConfigError: unknown towers or phases, a model over several devices, no processor, or layers
            of which none may go or nothing can be cut.
        DataError: no samples, or layers that take too little of the time to be told from noise.
        PlanError: as `prune` raises it, for towers that cannot lose every second layer (the
            Q-Former, BLIP's VQA alone) or half of their heads (T5).
    """
    check_vlm(vlm, "model")
    check_one_device(vlm, "timing its layers")
    check_numbers(batch_size=batch_size, max_new_tokens=max_new_tokens, rounds=rounds)
    if rounds < _FEWEST_ROUNDS:
        raise ConfigError(f"rounds is {rounds}; give at least {_FEWEST_ROUNDS}.")
    if phase not in _PHASES:
        raise ConfigError(unknown_name("phase", phase, _PHASES))
    samples = as_samples(data, "data to time the model on")
    options = Options(batch_size=batch_size, max_new_tokens=max_new_tokens)
    shapes = vlm.shape().towers
    found = {}
    for tower in towers or (("text",) if "text" in vlm.towers else tuple(vlm.towers)):
        if tower not in vlm.towers:
            raise ConfigError(unknown_name(f"tower of {vlm.name}", tower, vlm.towers))
        plans = _shallow(vlm, tower), _narrow(tower, shapes[tower])
        students = [prune(vlm, Plan({tower: each}, standard=False)) for each in plans]
        results = _timed([vlm, *students], samples, options, rounds, fused=fused)
        name = _metric(vlm, tower, phase)
        whole, shallow, narrow = (_seconds(name, each.metrics) for each in results)
        count = len(plans[0].drop)
        layers = (whole - shallow) * shapes[tower].num_layers / count
        if layers <= 0:
            raise DataError(
                f"Without {count} of its layers the tower '{tower}' is not faster ({whole:.3g} s, "
                f"then {shallow:.3g} s), so nothing can be told of one. Time it on a machine that "
                "does nothing else, in larger batches or more rounds."
            )
        after = shapes[tower].narrowed(plans[1].cut)
        lost = 1 - sum(after.layer_parameters) / sum(shapes[tower].layer_parameters)
        found[tower] = min(max(1 - (whole - narrow) / lost / layers, 0.0), _MOST)
    return found


def _timed(
    models: Sequence[VLM], samples: Sequence[Sample], options: Options, rounds: int, *, fused: bool
) -> list[TaskResult]:
    if not fused:
        return measure(models, samples, options, rounds=rounds)
    # loads transformers' modelling code, which nothing else here needs
    from interlace.nn import fuse, unfuse

    results = []
    for each in models:
        # they share weights, which only one at a time can lay out anew
        fuse(each)
        try:
            results += measure([each], samples, options, rounds=rounds)
        finally:
            unfuse(each)
    return results


def _metric(vlm: VLM, tower: str, phase: str) -> str:
    if vlm.family.objective == "contrastive":
        return _ENCODED[tower]
    return _PHASES[phase if tower == "text" else "prefill"]


def _seconds(name: str, metrics: Mapping[str, float]) -> float:
    return metrics[name] if name.endswith("seconds") else 1 / metrics[name]


def _shallow(vlm: VLM, tower: str) -> TowerPlan:
    """Drop every second layer that may go."""
    own = vlm.towers[tower]
    free = [layer for layer in range(1, own.num_layers - 1) if layer not in own.pinned]
    if not free:
        raise ConfigError(f"No layer of the tower '{tower}' may go, so none can be timed.")
    return TowerPlan(own.num_layers, drop=tuple(free[::2]))


def _narrow(tower: str, shape: TowerShape) -> TowerPlan:
    """Cut half of the KV groups and of the neurons of every layer."""
    cut = {name: _half(site) for name, site in shape.sites.items()}
    cut = {name: units for name, units in cut.items() if units}
    if not cut:
        raise ConfigError(
            f"No heads or neurons are known in the layers of the tower '{tower}', so none can be "
            "cut, and all of its time is fixed."
        )
    return TowerPlan(shape.num_layers, cut=cut)


def _half(site: SiteShape) -> dict[int, tuple[int, ...]]:
    units = {}
    for layer, groups in enumerate(site.groups):
        if site.kind == "ffn":
            number = sum(groups) // 2 // FFN_MULTIPLE * FFN_MULTIPLE
        else:
            number = sum(groups[: len(groups) // 2])
        if number:
            units[layer] = tuple(range(number))
    return units
