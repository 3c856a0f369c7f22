from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys

import pytest

from interlace.errors import CheckpointError, ConfigError, DataError, PlanError, ShapeError
from interlace.records import (
    Bridge,
    EvalReport,
    HealReport,
    ModelShape,
    Plan,
    Provenance,
    PruneRecord,
    Scores,
    TowerPlan,
    TowerScores,
    TowerShape,
    load_record,
)


def shape(num_layers: int = 6) -> ModelShape:
    tower = TowerShape(8, 4, 2, 2, (100,) * num_layers, causal=True)
    return ModelShape({"text": tower}, total_parameters=1000, bytes_per_parameter=2)


def scores(**more) -> Scores:
    packs = {1: [0.9, 0.8, 0.7, 0.6, 0.5], 3: [0.5, 0.25, 1 / 3]}
    return Scores.from_similarity("text", packs, 6, pinned={5: "last"}, shape=shape(), **more)


RECORDS = {
    "scores": scores(tail={1: 0.1}, cross_attention_layers=[0, 2], model_name="m"),
    "plan": Plan(
        {"text": TowerPlan(6, (3, 1), (2, 0), (4,), (0.1, None, 0.2, 0.3, 0.4, 0.5), {3: "why"})},
        rule="interlace",
        seed=42,
        shape=shape(),
        settings={"protect": "auto"},
        inputs={"scores": "abc"},
    ),
    "prune": PruneRecord(
        "f" * 64,
        towers={"text": (0, 2, 4, 5)},
        dropped={"text": (3, 1)},
        config_changes={"text_config.num_hidden_layers": [6, 4]},
        parameters_before=1000,
        parameters_after=800,
        bridges=(
            Bridge("text", "fold", (3,), 2, 0.5, 0.1, {"ridge": 1e-3}),
            Bridge("text", "none", (1,), note="no room"),
        ),
        notes=("a note",),
    ),
    "heal": HealReport(
        3, 48, 1000, 200, 800, ({"step": 1, "loss": 2.5},), {"loss": math.nan}, 1.5, "chat"
    ),
    "eval": EvalReport({"vqa": {"accuracy": 0.5}}, {"vqa": {"accuracy": 1.0}}, None, {"vqa": 4}),
}


@pytest.mark.parametrize("kind", RECORDS)
def test_round_trip(kind, tmp_path):
    record = RECORDS[kind]
    path = record.save(tmp_path / "record.json")
    loaded = type(record).load(path)
    assert loaded.to_json() == record.to_json()
    assert loaded.fingerprint == record.fingerprint
    assert type(load_record(path)) is type(record)
    # a NaN is equal to nothing, itself included
    if kind != "heal":
        assert loaded == record
    json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


def test_in_memory_keys_are_numbers_and_sequences_tuples():
    loaded = Scores.from_json(RECORDS["scores"].to_json())
    assert loaded["text"].packs(3) == (0.5, 0.25, 1 / 3)
    assert loaded["text"].pinned == {5: "last"}
    plan = TowerPlan(num_layers=4, drop=[2], tune=[1])
    assert plan == TowerPlan(num_layers=4, drop=(2,), tune=(1,), layer_scores=(None,) * 4)


def test_a_report_of_measurements_prints_as_a_table() -> None:
    measured = {"fidelity": {"kl": 0.25}, "vqa": {"accuracy": 0.5}}
    kept = {"vqa": {"accuracy": 2 / 3}}
    assert str(EvalReport(measured, {"vqa": {"accuracy": 0.75}}, kept)).splitlines() == [
        "task      metric    value  baseline  retention",
        "--------  --------  -----  --------  ---------",
        "fidelity  kl        0.25",
        "vqa       accuracy  0.5    0.75      66.7 %",
    ]
    assert str(EvalReport(measured)).splitlines()[0] == "task      metric    value"


def test_numpy_values_become_plain_ones():
    np = pytest.importorskip("numpy")
    made = Scores.from_similarity("text", {1: np.array([0.5, 0.25])}, np.int64(3))
    assert made == Scores.from_similarity("text", {1: [0.5, 0.25]}, 3)
    report = EvalReport({"vqa": {"accuracy": np.float32(0.5)}}, details={"x": np.float64(2)})
    assert report == EvalReport({"vqa": {"accuracy": 0.5}}, details={"x": 2.0})
    with pytest.raises(ConfigError, match=r"details.*has no JSON form"):
        EvalReport({}, details={"x": object()})


def changed(record, **changes) -> str:
    return json.dumps({**json.loads(record.to_json()), **changes})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not valid JSON"),
        ("[1]", "holds a JSON list"),
        ('{"kind": "plan", "kind": "plan"}', "the key kind stands twice"),
        (changed(RECORDS["scores"]), "of kind 'scores', but 'plan' is expected"),
        (changed(RECORDS["plan"], schema=1), "schema version 1.*reads 2 only"),
        (changed(RECORDS["plan"], rul="x"), "Unknown key 'rul'. Did you mean 'rule'"),
        (changed(RECORDS["plan"], rule="random"), "was altered after it was written"),
        (changed(RECORDS["plan"], seed="x"), r"cannot be used\. plan\.seed: expected int, got 'x'"),
        (changed(RECORDS["plan"], towers={"text": {"num_layers": 6, "dorp": []}}), "'drop'"),
        (changed(RECORDS["plan"], towers={"text": {"num_layers": 6, "drop": [9]}}), "0..5"),
        (changed(RECORDS["plan"], fingerprint="0" * 64), "altered"),
        ("{}", "of kind None"),
    ],
)
def test_damaged_records_are_refused_in_words(text, words, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=words) as caught:
        Plan.load(path)
    assert str(path) in str(caught.value)


def test_a_record_without_a_key_is_refused(tmp_path):
    content = json.loads(RECORDS["plan"].to_json())
    del content["rule"]
    with pytest.raises(CheckpointError, match="lacks rule"):
        Plan.from_json(json.dumps(content))
    with pytest.raises(CheckpointError, match="no record at"):
        Plan.load(tmp_path / "missing.json")
    (tmp_path / "other.json").write_text('{"kind": "plans"}')
    with pytest.raises(CheckpointError, match="Did you mean 'plan'"):
        load_record(tmp_path / "other.json")


def test_any_change_of_content_is_noticed():
    original = RECORDS["scores"]
    text = original.to_json()
    for old, new in (("0.25", "0.26"), ('"last"', '"lost"'), ("[100, 100", "[100, 101")):
        assert text.count(old) >= 1
        with pytest.raises(CheckpointError, match="altered"):
            Scores.from_json(text.replace(old, new, 1))
    # other ways to write the same content are the same record
    assert Scores.from_json(json.dumps(json.loads(text), sort_keys=True)) == original


def test_provenance_is_no_part_of_the_fingerprint_or_equality():
    here = Provenance.collect(seed=7)
    assert here.seed == 7
    assert here.python.count(".") == 2
    record = RECORDS["plan"]
    other = dataclasses.replace(record, provenance=Provenance(device="another"))
    assert other == record
    assert other.fingerprint == record.fingerprint
    assert Plan.from_json(other.to_json()).provenance.device == "another"


def test_records_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RECORDS["plan"].rule = "random"


@pytest.mark.parametrize(
    ("packs", "error", "words"),
    [
        ({1: [0.5] * 6}, ShapeError, r"Pack 1 of 6 layers has 5 values"),
        ({7: []}, ShapeError, "Packs of 6 layers"),
        ({1: [0.5, math.nan, 0.5, 0.5, 0.5]}, DataError, "pack 1, layer 1 is nan"),
        ({2: [0.5, 0.5, 0.5, 1.5]}, DataError, "no cosine"),
        ({2: [0.5, 0.5, 0.5, 1.01]}, DataError, "no cosine"),
        ({1: [0.5, "x", 0.5, 0.5, 0.5]}, ConfigError, "expected float, got 'x'"),
    ],
)
def test_tables_that_cannot_be(packs, error, words):
    with pytest.raises(error, match=words):
        Scores.from_similarity("text", packs, 6)


def test_cosines_of_bfloat16_are_taken():
    # what identical states give there
    made = Scores.from_similarity("text", {1: [1.0078125] * 5}, 6)
    assert made["text"].packs(1) == (1.0078125,) * 5


def test_missing_packs_say_what_to_score():
    with pytest.raises(PlanError, match=r"Pack 2 .*scored: 1, 3.*packs=\(\.\.\., 2\)"):
        scores()["text"].packs(2)
    with pytest.raises(PlanError, match="token group 'vision'"):
        scores()["text"].packs(1, "vision")
    with pytest.raises(PlanError, match="Did you mean 'text'"):
        scores()["txt"]


def test_plans_that_cannot_be():
    with pytest.raises(PlanError, match=r"0..3; the plan names \[4\]"):
        TowerPlan(4, drop=(4,))
    with pytest.raises(PlanError, match=r"\[1\] stand more than once"):
        TowerPlan(4, drop=(1,), tune=(1,))
    # a damaged number is refused before anything is counted by it
    for number in (0, 10**30):
        with pytest.raises(PlanError, match="between 1 and 100000 layers"):
            TowerPlan(number)
    with pytest.raises(PlanError, match="drops all 2"):
        TowerPlan(2, drop=(0, 1))
    plan = TowerPlan(5, drop=(3,), tune=(2,), freeze=(4,))
    assert plan.kept == (0, 1, 2, 4)
    actions = [plan.action(layer) for layer in range(5)]
    assert actions == ["keep", "keep", "tune", "drop", "freeze"]
    with pytest.raises(PlanError, match="not 5"):
        plan.action(5)


def test_a_plan_names_no_place_that_loses_nothing():
    for cut in ({"mlp": {}}, {"mlp": {0: ()}}):
        assert "mlp" not in str(Plan({"text": TowerPlan(4, cut=cut)}))
    some = Plan({"text": TowerPlan(4, cut={"mlp": {0: (), 1: (2, 3)}})})
    assert "mlp: 2 units cut in each of 1 layers, 2 in all" in str(some)


def test_merging_parts_of_a_data_set_gives_the_whole():
    def part(values, count):
        tower = TowerScores(
            num_layers=3,
            similarity={"all": {1: values}},
            metrics={"importance": (values[0], 0.0, 1.0)},
            num_samples=count,
            num_tokens={"all": 10 * count},
        )
        return Scores(towers={"text": tower}, model_name="m")

    merged = Scores.merge(part((0.5, 0.25), 1), part((0.75, 0.25), 3))["text"]
    assert merged.packs(1) == (0.6875, 0.25)
    assert merged.metrics["importance"] == (0.6875, 0.0, 1.0)
    assert (merged.num_samples, merged.num_tokens) == (4, {"all": 40})


def test_merging_towers_and_metrics_keeps_both():
    text = scores(num_samples=4)
    vision = Scores.from_similarity("vision", {1: [0.5]}, 2)
    extra = TowerScores(6, metrics={"relevance": (1.0,) * 6}, pinned={5: "last"}, num_samples=4)
    merged = Scores.merge(text, vision, Scores(towers={"text": extra}))
    assert list(merged.towers) == ["text", "vision"]
    assert merged["text"].packs(1) == text["text"].packs(1)
    assert merged["text"].metrics == extra.metrics
    assert merged["text"].num_samples == 4
    assert merged.shape == text.shape


def test_merging_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="at least one"):
        Scores.merge()
    with pytest.raises(ShapeError, match="different models"):
        Scores.merge(scores(model_name="a"), scores(model_name="b"))
    with pytest.raises(ConfigError, match="num_samples"):
        Scores.merge(scores(), scores())
    other = Scores.from_similarity("text", {1: [0.5] * 6}, 7)
    with pytest.raises(ShapeError, match="differ in num_layers"):
        Scores.merge(scores(), other)
    half = Scores.from_similarity("text", {1: [0.5] * 5}, 6, pinned={5: "last"}, num_samples=1)
    with pytest.raises(ShapeError, match=r"overlap in part.*similarity/all/3"):
        Scores.merge(scores(num_samples=1), half)


def test_shapes_shrink():
    smaller = shape().after({"text": TowerPlan(6, drop=(1, 3))})
    assert smaller.total_parameters == 800
    assert smaller.towers["text"].num_layers == 4
    with pytest.raises(ShapeError, match=r"0\.\.5"):
        shape().after({"text": TowerPlan(7, drop=(6,))})
    with pytest.raises(ShapeError, match="Unknown tower"):
        shape().after({"vision": TowerPlan(6, drop=(1,))})


def test_files_are_readable():
    lines = RECORDS["scores"].to_json().splitlines()
    assert '          "1": [0.9, 0.8, 0.7, 0.6, 0.5],' in lines


def test_records_and_planning_load_nothing_heavy():
    code = (
        "import sys, interlace.records, interlace.config, interlace.plan.planner;"
        "import interlace.plan.published, interlace.plan.optimal, interlace.plan.baselines;"
        "print([m for m in ('torch', 'numpy', 'transformers', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
