"""What the runs of retention.py measure: methods, fractions, seeds and sample counts by name."""

from __future__ import annotations

from dataclasses import dataclass

from methods import ABLATION, COMPARED
from methods.case import Sizes
from methods.rules import OTHERS, OURS, OURS_NORM, OURS_SPLIT, PUBLISHED
from subjects import BUNDLED, CROWDED_SUBJECTS

from interlace._recommended import RECOMMENDED_HEAL


@dataclass(frozen=True)
class Preset:
    """How much is measured.

    Attributes:
        methods: names of them.
        fractions: shares of the layers, 0..1.
        seeds: of the samples and draws.
        sizes: numbers of samples.
        models: names of subjects.
        rounds: timed runs per model; 0 to time nothing.
        exact: take out the fractions themselves where a method can, instead of as much as whole
            layers come to.
        against: method whose difference from the others is shown; default: shares of the dense.
        divergence: measure how far predictions are from the dense model's, not what they are worth.
    """

    methods: tuple[str, ...]
    fractions: tuple[float, ...]
    seeds: tuple[int, ...]
    sizes: Sizes
    models: tuple[str, ...] = BUNDLED
    rounds: int = 7
    exact: bool = False
    against: str = ""
    divergence: bool = False


FULL = Sizes(128, 1024, 32, 256)
PERCENT = ("interlace", "sleb", "last", "shortgpt", "linearpatch", "width", "magnitude")
CROWDED = Sizes(
    512, 0.01, 8, 256, contrastive_batch=32, validation=RECOMMENDED_HEAL.validation_fraction
)
# 0.334, since a third of 12 layers is to be 4
PRESETS = {
    "bridges": Preset(("interlace", "sleb"), (0.25, 0.334), (0,), Sizes(128, 0, 0, 128)),
    # CLIP is the fastest: every method in about a minute, but for parts, which take some five
    "smoke": Preset(tuple(COMPARED), (0.25,), (0,), Sizes(8, 16, 8, 8), ("clip",), 2),
    "small": Preset((*PUBLISHED, *OTHERS), (0.25,), (0, 1, 2), Sizes(128, 2048, 32, 384)),
    "full": Preset(tuple(COMPARED), (0.10, 0.15, 0.20, 0.25, 0.334, 0.50), (0, 1, 2), FULL),
    "ablation": Preset(ABLATION, (0.25, 0.50), (0, 1, 2), FULL, against=OURS),
    "parameters": Preset(
        (OURS_NORM, OURS, "width", "magnitude"), (0.30, 0.40, 0.50), (0, 1, 2), FULL, exact=True
    ),
    # the published budget: one percent of the training samples, one epoch; more samples to fit on
    # and more steps than in `full`
    "percent": Preset(
        (OURS, *PERCENT),
        (0.10, 0.15, 0.20, 0.25, 0.334, 0.50),
        (0, 1, 2),
        Sizes(512, 0.01, 8, 256, contrastive_batch=32),
    ),
    # the same on models and scenes that tell the methods apart; all go only as far as a few of the
    # samples approve of
    "crowded": Preset(
        (
            *(OURS, OURS_SPLIT, OURS_NORM),
            *PERCENT,
            *("uidl", "replaceme", "flap", "magnitude_per_matrix", "wanda", "sparsegpt"),
        ),
        (0.10, 0.15, 0.20, 0.25, 0.334, 0.50, 0.667),
        (0, 1, 2),
        CROWDED,
        tuple(each.name for each in CROWDED_SUBJECTS),
        rounds=15,
    ),
    # the same students, measured where scores of tasks are at their ceiling
    "divergence": Preset(
        (
            *(OURS, OURS_SPLIT, "width", "flap", "sleb", "shortgpt"),
            *("magnitude", "magnitude_per_matrix", "wanda", "sparsegpt"),
        ),
        (0.10, 0.15, 0.20, 0.25, 0.334, 0.50),
        (0, 1, 2),
        CROWDED,
        tuple(each.name for each in CROWDED_SUBJECTS),
        rounds=0,
        divergence=True,
    ),
}
