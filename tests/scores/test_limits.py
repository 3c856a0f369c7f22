"""Bad input is refused in words, and memory stays within what is promised."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from scores.written_out import TOLERANCE, batch_of, labelled, one_by_one, opened
from tiny_processors import with_processor
from torch import nn

import interlace as il
import interlace.scores.batches
import interlace.scores.similarity
from interlace.data import Sample, Turn
from interlace.data.samples import scenes_tasks
from interlace.errors import ConfigError, DataError, ShapeError
from interlace.models import VLM
from interlace.scores import score
from interlace.scores.metrics import Units
from interlace.scores.similarity import Similarity
from interlace.scores.tap import Tap

if TYPE_CHECKING:
    from collections.abc import Iterator

TOKENS, WIDTH = 12, 40


@pytest.fixture(autouse=True)
def few_objects() -> Iterator[None]:
    """Let gc.get_objects() give new objects only, which is quick."""
    gc.freeze()
    yield
    gc.unfreeze()


class Step(nn.Module):
    """A layer that adds noise of its own to a new tensor, called by keyword and giving a tuple."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.noise = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))

    def forward(self, *, hidden_states: torch.Tensor) -> tuple[torch.Tensor]:
        return (hidden_states + self.noise,)


class StepInPlace(Step):
    def forward(self, *, hidden_states: torch.Tensor) -> tuple[torch.Tensor]:
        return (hidden_states.add_(self.noise),)


def _units(hidden: torch.Tensor) -> Units:
    unit = torch.zeros(hidden.shape[:-1].numel(), dtype=torch.int64)
    return Units(unit, torch.zeros_like(unit), 1)


def _living_states() -> int:
    states = [
        each
        for each in gc.get_objects()
        if type(each) is torch.Tensor and each.numel() == TOKENS * WIDTH
    ]
    return len({each.untyped_storage().data_ptr() for each in states})


def _run(layers: nn.ModuleList, meter: Similarity) -> list[int]:
    """Run the layers under a tap, and count the hidden states alive inside every layer."""
    alive: list[int] = []
    resting = _living_states()
    with Tap("text", layers, [meter]) as tap, torch.no_grad():
        # behind the tap's own hooks
        hooks = [
            layer.register_forward_pre_hook(lambda *_: alive.append(_living_states() - resting))
            for layer in layers
        ]
        tap.start(_units)
        hidden = torch.randn(1, TOKENS, WIDTH)
        for layer in layers:
            (hidden,) = layer(hidden_states=hidden)
        assert tap.finish()
    for hook in hooks:
        hook.remove()
    return alive


@pytest.mark.parametrize("packs", [(1,), (1, 2, 3), (2, 4)])
def test_no_more_states_are_held_than_the_largest_pack_and_one(
    packs: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = nn.ModuleList(Step(seed) for seed in range(9))
    resting = _living_states()
    products = interlace.scores.similarity._row_products
    compared: list[int] = []

    def watched(*args: Any) -> torch.Tensor:
        compared.append(_living_states() - resting)
        return products(*args)

    monkeypatch.setattr(interlace.scores.similarity, "_row_products", watched)
    in_layers = _run(layers, Similarity(9, packs, whole=False))
    # the newest state is compared with as many as the largest pack; then the oldest goes
    assert max(compared) == compared[-1] == max(packs) + 1
    assert max(in_layers) == in_layers[-1] == max(packs)


def test_layers_that_write_into_their_input_are_refused() -> None:
    layers = nn.ModuleList(StepInPlace(seed) for seed in range(4))
    with pytest.raises(ShapeError, match="in place"):
        _run(layers, Similarity(4, (1,), whole=False))


@pytest.mark.parametrize("whole", [False, True])
def test_padding_may_be_nan_and_a_zero_vector_is_like_nothing(whole: bool) -> None:
    states = [torch.randn(6, 8) for _ in range(4)]
    states[1][5] = float("nan")
    states[2][:2] = 0
    unit = torch.tensor([0, 0, 1, 1, 1, -1])
    meter = Similarity(3, (1, 2), whole=whole)
    meter.start()
    meter.begin_run(Units(unit, torch.tensor([0, 1, 0, 0, 1, 0]), 2))
    for index, state in enumerate(states):
        meter.state(index, state)
    meter.end_run()
    assert meter.finish() is None
    found = meter.results()
    cosine = torch.cosine_similarity(states[1][2:5], states[2][2:5], dim=1).tolist()
    # sample 0 is zero in h_2, so its mean is 0
    assert found["similarity"]["all"][1][1] == pytest.approx(sum(cosine) / 6, abs=TOLERANCE)
    assert found["similarity"]["vision"][1][1] == pytest.approx(cosine[2] / 2, abs=TOLERANCE)
    assert found["num_tokens"] == {"all": 5, "text": 3, "vision": 2}


@pytest.mark.parametrize(
    "asked",
    [
        {"packs": (3,)},
        {"packs": "all"},
        {"metrics": ("relevance",)},
        {"metrics": ("sensitivity",)},
    ],
)
def test_activations_that_are_not_finite_are_located(asked: dict[str, Any]) -> None:
    vlm, singles = opened("qwen3_vl"), one_by_one(labelled("qwen3_vl"))
    length = singles[1]["input_ids"].shape[1]

    def break_second(_: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output / 0 if output.shape[1] == length else output

    hook = vlm.towers["text"].layers[2].mlp.register_forward_hook(break_second)
    where = r"the output of layer 2 of the tower 'text', batch 1, sample '1\[0\]'"
    with pytest.raises(DataError, match=where):
        score(vlm, singles, **asked, progress=False)
    hook.remove()
    singles[2]["pixel_values"] = singles[2]["pixel_values"] * float("nan")
    with pytest.raises(DataError, match="the input of layer 0 of the tower 'vision', batch 2"):
        score(vlm, singles, **asked, progress=False)


def test_bad_arguments_are_refused() -> None:
    vlm, batch = opened("llava"), batch_of("llava")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"metrics": ("similarty",)}, "Did you mean 'similarity'"),
        ({"metrics": ()}, "No metric"),
        ({"towers": ("visual",)}, "Did you mean 'vision'"),
        ({"packs": (1, 8), "towers": ("text",)}, "Pack 8 does not fit the tower 'text'"),
        ({"packs": (0,)}, "at least 1"),
        ({"packs": "full"}, "'all'"),
        ({"packs": 3}, "packs is 3; give 'all' or distances"),
        ({"packs": (1, "2")}, "whole numbers"),
        ({"metrics": 3}, "metrics is 3; give names"),
        ({"metrics": (3,)}, r"metrics is \(3,\); give names"),
        ({"towers": 3}, "towers is 3; give names"),
        ({"batch_size": 0}, "batch_size"),
    ]
    for arguments, words in cases:
        with pytest.raises(ConfigError, match=words):
            score(vlm, [batch], **{"progress": False, **arguments})
    with pytest.raises(ConfigError, match="packed=False"):
        score(opened("clip"), [batch_of("clip")], packed=True, progress=False)


def test_numbers_and_names_of_other_kinds_mean_the_same() -> None:
    vlm, batch = opened("llava"), batch_of("llava")
    wanted = score(vlm, [batch], packs=(1, 2), towers=("text",), progress=False)
    assert wanted.settings["packs"] == [1, 2]
    for packs in (np.array([2, 1]), range(1, 3), (each for each in (1, 2))):
        scores = score(
            vlm,
            [batch],
            metrics=(name for name in ("similarity",)),  # type: ignore[arg-type]
            packs=packs,  # type: ignore[arg-type]
            towers=(name for name in ("text",)),  # type: ignore[arg-type]
            batch_size=np.int64(8),  # type: ignore[arg-type]
            progress=False,
        )
        assert scores.towers == wanted.towers
        assert set(scores.settings["packs"]) == {1, 2}


def test_data_without_anything_to_score_is_refused() -> None:
    vlm, batch = opened("llava"), batch_of("llava")
    with pytest.raises(DataError, match="no sample"):
        score(vlm, [], progress=False)
    with pytest.raises(ConfigError, match="processor"):
        score(vlm, [Sample("a", "chat", (), (Turn("user", "Hi"),))], progress=False)
    ids = {"input_ids": batch["input_ids"].numpy()}
    said: list[tuple[Any, str]] = [
        (batch, "is a single dict; give .* a list of batches"),
        ([batch, Sample("a", "chat", (), ())], "holds samples and batches"),
        ([batch, ids], "In batch 1 of the calibration data, input_ids is a ndarray; give tensors"),
        ([batch, 3], "holds a int"),
    ]
    for data, words in said:
        with pytest.raises(DataError, match=words):
            score(vlm, data, progress=False)
    text = {"input_ids": batch["input_ids"].clamp(max=99)}
    with pytest.raises(DataError, match="tower vision"):
        score(vlm, [text], towers=("vision",), progress=False)
    assert set(score(vlm, [text], progress=False).towers) == {"text"}
    with pytest.raises(DataError, match="packed"):
        score(vlm, [batch], packed=True, progress=False)


@pytest.mark.parametrize("name", ["clip", "blip_vqa", "blip2_opt"])
def test_a_sample_of_another_number_of_images_is_told_before_the_model_runs(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm = with_processor(name)
    tasks = scenes_tasks(vlm.family.objective)
    whole = il.samples("scenes", count=3, tasks=tasks)
    monkeypatch.setattr(vlm.model, "forward", _ran)
    for images in ((), whole[0].images * 2):
        asked = Turn("user", "<image>" * len(images) + "what?")
        odd = replace(whole[2], images=images, turns=(asked, *whole[2].turns[1:]))
        says = f"'{odd.id}' has {len(images)} images, but .* exactly one. Give it one image"
        with pytest.raises(DataError, match=says):
            score(vlm, [*whole[:2], odd], batch_size=1, progress=False)
        with pytest.raises(DataError, match=says):
            il.evaluate(vlm, tasks=tasks, data=[*whole[:2], odd], batch_size=1)


def _ran(**_: Any) -> None:
    raise AssertionError("the model ran")


def test_samples_are_asked_their_first_question_alone_and_batched_by_length(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[list[Sample]] = []

    class Stub:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.answers = kwargs["answers"]

        for_model = classmethod(lambda cls, *args, **kwargs: cls(*args, **kwargs))

        def __call__(self, samples: list[Sample]) -> dict[str, torch.Tensor]:
            seen.append(list(samples))
            length = max(len(turn.text) for sample in samples for turn in sample.turns)
            return {"input_ids": torch.full((len(samples), length), 7)}

    monkeypatch.setattr(interlace.scores.batches, "Collator", Stub)
    vlm = VLM(opened("llava").model, opened("llava").family, processor=object())
    samples = [
        Sample(
            id=f"s{n}",
            task="chat",
            images=(),
            turns=(Turn("user", "a" * n), Turn("assistant", "no"), Turn("user", "again?")),
        )
        for n in (3, 9, 4, 10)
    ]
    scores = score(vlm, samples, batch_size=2, towers=("text",), progress=False)
    assert [[sample.id for sample in batch] for batch in seen] == [["s10", "s9"], ["s4", "s3"]]
    assert all(len(sample.turns) == 1 for batch in seen for sample in batch)
    assert scores["text"].num_samples == 4
