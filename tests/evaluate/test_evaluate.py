from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import interlace.evaluate
from interlace.data.samples import Sample, Samples, samples
from interlace.errors import ConfigError, DataError
from interlace.evaluate import TASKS, evaluate
from interlace.evaluate.runner import retention
from interlace.evaluate.selection import default_tasks
from interlace.records import EvalReport

if TYPE_CHECKING:
    from collections.abc import Callable

    from interlace.models import VLM


def test_retention() -> None:
    metrics = {"accuracy": 0.6, "perplexity": 4.0, "cider": 1.0, "empty": 0.5, "alone": 1.0}
    baseline = {"accuracy": 0.8, "perplexity": 3.0, "cider": 0.0, "empty": 0.0}
    kept = retention(metrics, baseline, frozenset({"perplexity"}))
    assert kept == pytest.approx({"accuracy": 0.75, "perplexity": 0.75})
    assert retention({"s": 0.0}, {"s": 1.0}, frozenset({"s"})) == {}
    assert retention({"bleu_2": 2e-10}, {"bleu_2": 1.5e-10}, frozenset()) == {}


def test_a_model_is_measured_by_what_it_is_for_and_the_data_can_tell(
    tiny_vlm: Callable[..., VLM],
) -> None:
    questions = samples("scenes", count=2, tasks=("vqa",))
    chat = tiny_vlm("qwen3_vl")
    assert default_tasks(chat) == ("vqa", "caption")
    assert default_tasks(chat, questions) == ("vqa",)
    assert default_tasks(tiny_vlm("clip")) == ("retrieval",)
    # what serves none of them is refused by name later
    assert default_tasks(tiny_vlm("blip_caption"), questions) == ("caption",)


def test_report_with_a_model_as_baseline(tiny_vlm: Callable[..., VLM]) -> None:
    student, teacher = tiny_vlm("qwen3_vl", 1), tiny_vlm("qwen3_vl", 0)
    settings: dict[str, Any] = {"count": 3, "max_new_tokens": 4}
    report = evaluate(student, tasks=("fidelity", "vqa"), baseline=teacher, **settings)
    assert list(report.metrics) == ["fidelity", "vqa"]
    assert report.baseline is not None
    assert report.retention is not None
    both = (report.baseline["fidelity"]["perplexity"], report.metrics["fidelity"]["perplexity"])
    assert report.retention["fidelity"] == {"perplexity": pytest.approx(both[0] / both[1])}
    assert report.num_samples == {"fidelity": 3, "vqa": 3}
    assert report.inputs["model"] == student.fingerprint
    assert report.inputs["baseline"] == teacher.fingerprint
    assert EvalReport.from_json(report.to_json()) == report
    # the baseline measured alone, on data of the caller, gives the same and can stand in
    data = samples("scenes", count=3, tasks=("vqa",), split="test")
    dense = evaluate(teacher, tasks="vqa", data={"vqa": data}, max_new_tokens=4, batch_size=1)
    assert dense.metrics["vqa"] == report.baseline["vqa"]
    again = evaluate(student, tasks=("vqa",), data=data, baseline=dense, max_new_tokens=4)
    assert again.metrics["vqa"] == report.metrics["vqa"]
    assert again.retention == {"vqa": report.retention["vqa"]}


def test_report_as_baseline_must_fit(tiny_vlm: Callable[..., VLM]) -> None:
    vlm = tiny_vlm("qwen3_vl")
    data = samples("scenes", count=2, tasks=("vqa",), split="test")
    dense = EvalReport(
        metrics={"vqa": {"accuracy": 0.5}},
        inputs={"data/vqa": data.fingerprint},
        details={"settings": {"max_new_tokens": 4}},
    )
    given: dict[str, Any] = {"data": data, "baseline": dense}
    kept = evaluate(vlm, tasks=("vqa",), max_new_tokens=4, **given)
    accuracy = kept.metrics["vqa"]["accuracy"]
    assert kept.retention == {"vqa": {"accuracy": pytest.approx(accuracy / 0.5)}}
    with pytest.raises(ConfigError, match="max_new_tokens=4, here it is 5"):
        evaluate(vlm, tasks=("vqa",), max_new_tokens=5, **given)
    with pytest.raises(ConfigError, match="has no task perplexity; it holds vqa"):
        evaluate(vlm, tasks=("perplexity",), **given)
    with pytest.raises(ConfigError, match="needs the baseline itself"):
        evaluate(vlm, tasks=("vqa", "speed"), **given)
    other = samples("scenes", count=2, tasks=("vqa",), split="test", seed=1)
    with pytest.raises(ConfigError, match="on other data"):
        evaluate(vlm, tasks=("vqa",), data=other, baseline=dense, max_new_tokens=4)


def test_one_data_set_serves_every_task_what_it_can_use(tiny_vlm: Callable[..., VLM]) -> None:
    pytest.importorskip("pycocoevalcap")
    mixed = samples("scenes", count=5, tasks=("vqa", "caption"), split="test")
    report = evaluate(
        tiny_vlm("qwen3_vl"), tasks=("vqa", "caption", "perplexity"), data=mixed, max_new_tokens=3
    )
    assert report.num_samples == {"vqa": 3, "caption": 2, "perplexity": 5}
    assert set(report.metrics["caption"]) == {
        "cider", "bleu_1", "bleu_2", "bleu_3", "bleu_4", "exact_match",
    }  # fmt: skip
    assert report.retention is None


def test_samples_and_numbers_of_other_kinds_mean_the_same(tiny_vlm: Callable[..., VLM]) -> None:
    vlm, asked = tiny_vlm("qwen3_vl"), samples("scenes", count=3, tasks=("vqa",))
    wanted = evaluate(vlm, tasks=("vqa",), data=asked, batch_size=2, max_new_tokens=2)
    for data in (list(asked), {"vqa": tuple(asked)}):
        report = evaluate(vlm, tasks="vqa", data=data, batch_size=np.int64(2), max_new_tokens=2)  # type: ignore[arg-type]
        assert report.metrics == wanted.metrics
        assert report.inputs == wanted.inputs
        assert type(report.details["settings"]["batch_size"]) is int


def test_unknown_names_and_numbers(tiny_vlm: Callable[..., VLM]) -> None:
    vlm = tiny_vlm("qwen3_vl")
    with pytest.raises(ConfigError, match="Did you mean 'fidelity'"):
        evaluate(vlm, tasks=("fidelty",))
    with pytest.raises(ConfigError, match="tasks is empty"):
        evaluate(vlm, tasks=())
    with pytest.raises(ConfigError, match="Did you mean 'vqa'"):
        evaluate(vlm, tasks=("vqa",), data={"vqaa": samples("scenes", count=1)})
    with pytest.raises(ConfigError, match="samples for caption, but the tasks are vqa"):
        evaluate(vlm, tasks=("vqa",), data={"caption": samples("scenes", count=1)})
    for name in ("batch_size", "max_new_tokens", "count"):
        for wrong in (0, 1.5, True):
            with pytest.raises(ConfigError, match=f"{name} is"):
                evaluate(vlm, tasks=("vqa",), **{name: wrong})  # type: ignore[arg-type]
    for data, what in (
        ([1], "data to measure on holds a int"),
        ([], "data to measure on holds no sample"),
        ({"vqa": [1]}, "data for vqa holds a int"),
    ):
        with pytest.raises(DataError, match=what):
            evaluate(vlm, tasks=("vqa",), data=data)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="tasks is None"):
        evaluate(vlm, tasks=None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="The model is a Qwen3VLForConditionalGeneration"):
        evaluate(vlm.model, tasks=("vqa",))  # type: ignore[arg-type]
    assert set(TASKS) == {"fidelity", "perplexity", "vqa", "caption", "retrieval", "speed"}
    with pytest.raises(AttributeError):
        _ = interlace.evaluate.nothing


def test_tasks_that_a_model_cannot_do(tiny_vlm: Callable[..., VLM]) -> None:
    with pytest.raises(ConfigError, match=r"retrieval cannot be done by .* caption model"):
        evaluate(tiny_vlm("blip_caption"), tasks=("retrieval",))
    with pytest.raises(ConfigError, match="choose from fidelity, retrieval, speed"):
        evaluate(tiny_vlm("clip"), tasks=("vqa",))
    with pytest.raises(ConfigError, match="takes no question"):
        evaluate(tiny_vlm("blip_caption"), tasks=("vqa",), count=1)
    with pytest.raises(ConfigError, match="compares with a baseline"):
        evaluate(tiny_vlm("qwen3_vl"), tasks=("fidelity",))
    with pytest.raises(ConfigError, match="models of one kind"):
        evaluate(
            tiny_vlm("qwen3_vl"), tasks=("fidelity",), baseline=tiny_vlm("blip_caption"), count=2
        )


def test_data_that_serves_no_task_is_refused_before_any_work(tiny_vlm: Callable[..., VLM]) -> None:
    vlm = tiny_vlm("qwen3_vl")
    captions = samples("scenes", count=2, tasks=("caption",), split="test")
    with pytest.raises(DataError, match=r"no sample serves the task vqa .*2 caption"):
        evaluate(vlm, tasks=("vqa",), data=captions)
    first = captions[0]
    bare = Samples([Sample(first.id, "vqa", first.images, first.turns)])
    with pytest.raises(DataError, match="no reference answer"):
        evaluate(vlm, tasks=("vqa",), data=bare)
    pytest.importorskip("pycocoevalcap")
    with pytest.raises(DataError, match="below 2"):
        evaluate(vlm, tasks=("caption",), data=captions.subset(1))
