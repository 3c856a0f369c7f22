"""What records look like when they are printed."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

from interlace.records import HealReport, Scores, TowerScores


def test_scores_are_printed_as_a_table_of_layers() -> None:
    scores = Scores.from_similarity(
        "text",
        {pack: [0.5 + pack / 100] * (5 - pack) for pack in (1, 2, 3, 4)},
        5,
        {4: "the last"},
        tail={1: 0.25},
        num_samples=8,
        model_name="m",
    )
    vision = TowerScores(
        2,
        metrics={"relevance": (0.5, 12.0)},
        importance={"head_norm": {"self_attn": ((1.0, 2.0), ())}},
        notes=("a note",),
    )
    made = replace(scores, towers={**scores.towers, "vision": vision})
    assert str(made).splitlines() == [
        "Scores of m",
        "",
        "text: 5 layers, 8 samples",
        "layer  similarity 1  similarity 2  similarity 3  pinned",
        "-----  ------------  ------------  ------------  --------",
        "    0  0.5100        0.5200        0.5300",
        "    1  0.5100        0.5200        0.5300",
        "    2  0.5100        0.5200",
        "    3  0.5100",
        "    4  0.2500                                    the last",
        "",
        "vision: 2 layers, 0 samples",
        "layer  relevance  mean head_norm",
        "-----  ---------  --------------",
        "    0  0.5        1.5",
        "    1  12",
        "a note",
    ]
    assert repr(made).startswith("Scores(inputs=")
    shown: list[str] = []
    made._repr_pretty_(SimpleNamespace(text=shown.append), False)
    assert shown == [str(made)]
    groups = Scores.from_similarity("text", {1: [0.5]}, 2, group="vision")
    assert "similarity 1 (vision)" in str(groups)


def test_a_report_of_healing_is_printed_in_words_and_tables() -> None:
    report = HealReport(
        steps=100,
        num_samples=400,
        tokens=12_345,
        trainable_parameters=1_500,
        total_parameters=3_000_000,
        losses=tuple({"step": step, "loss": 1 / step} for step in range(1, 101)),
        seconds=12.3,
        gates={"text": {0: {"mlp": 0.5}, 3: {"mlp": 0.5}}},
        validation=({"share": 0.5, "loss": 1.5}, {"share": 1.0, "loss": 2.0}),
    )
    head, losses, gates, kept, points = str(report).split("\n\n")
    assert head == (
        "Healed for 100 steps on 400 samples (12.35 k tokens) in 12 s; trained 1.50 k of 3.00 M "
        "parameters"
    )
    rows = losses.splitlines()
    assert rows[0] == "step  loss"
    assert (rows[2], rows[-1]) == ("1     1", "100   0.01")
    assert len(rows) == 2 + 12
    assert gates == "Gates of branches in 2 layers of text"
    assert kept == "The validation samples keep 50% of the way"
    assert points.splitlines()[2] == "0.5    1.5"
    assert repr(report).startswith("HealReport(inputs=")
    bare = HealReport(0, 0, 0, 1, 2, losses=({"step": 1, "loss": 0.5},))
    assert str(bare).splitlines()[-1] == "1     0.5"
