from __future__ import annotations

import io

import pytest
from matplotlib.colors import to_hex
from PIL import Image

from interlace.errors import ConfigError, PlanError
from interlace.plan import make_plan
from interlace.records import (
    ModelShape,
    Plan,
    Scores,
    SiteShape,
    TowerPlan,
    TowerScores,
    TowerShape,
)
from interlace.report.plots import (
    ACTION_COLOURS,
    figure_bytes,
    plan_strip,
    retention_chart,
    save_figure,
    similarity_map,
)

S1 = [0.9, 0.8, 0.7, 0.9, 0.8, 0.7, 0.6]


@pytest.fixture
def scores():
    packs = {1: S1, 2: [0.8] * 6, 3: [0.7] * 5}
    return Scores.from_similarity("text", packs, 8)


def test_strip_has_one_cell_per_layer_in_the_colour_of_its_action(scores):
    plan = make_plan(scores, num_drop=2)
    figure = plan_strip(plan)
    (axes,) = figure.axes
    colours = [to_hex(cell.get_facecolor()).upper() for cell in axes.patches]
    assert colours == [ACTION_COLOURS[plan["text"].action(layer)] for layer in range(8)]
    words = [text.get_text() for text in figure.legends[0].get_texts()]
    assert words == ["drop", "tune", "freeze (anchor)", "keep"]
    with pytest.raises(PlanError, match="no tower"):
        plan_strip(Plan({}))


def test_strip_shows_what_is_cut_within_layers():
    sites = {
        "attn": SiteShape("heads", ((2, 2), (2, 2), (2, 2), ()), 1),
        "mlp": SiteShape("ffn", ((16,),) * 4, 1),
    }
    shape = TowerShape(4, 4, 2, 1, (20,) * 4, causal=True, sites=sites)
    cut = {"attn": {0: (1,), 2: (0, 1, 2)}, "mlp": {2: tuple(range(8))}}
    tower = TowerPlan(4, drop=(1,), cut=cut, parts={"mlp": (0,)})

    def rows(shapes):
        """Label of a row -> layer -> share of it that is filled in the colour of what is cut."""
        figure = plan_strip(Plan({"text": tower}, shape=shapes))
        (axes,) = figure.axes
        labels = [label.get_text() for label in axes.get_yticklabels()]
        found = {label: {} for label in labels[1:]}
        cells = [each for each in axes.patches if each.get_y() > 0.5]
        for cell in cells:
            row = found[labels[round(cell.get_y() + 0.38)]]
            filled = cell.get_height() / 0.76 if to_hex(cell.get_facecolor()) == "#cc79a7" else 0
            row[round(cell.get_x() + 0.46)] = filled
        assert figure.legends[0].get_texts()[-1].get_text() == "cut"
        return found

    known = rows(ModelShape({"text": shape}, 100, 4))
    # a layer that goes has nothing to cut, one without the place neither
    assert known["attn: 50% cut"] == pytest.approx({0: 0.25, 2: 0.75})
    assert known["mlp: 50% cut"] == pytest.approx({0: 1.0, 2: 0.5, 3: 0.0})
    assert rows(None).keys() == {"attn: cut", "mlp: cut"}


def test_map_shows_packs_or_the_whole_matrix(scores):
    figure = similarity_map(scores)
    shown = figure.axes[0].images[0].get_array()
    assert shown.shape == (3, 8)
    assert shown[0].compressed().tolist() == S1
    packs = {p: [1 - 0.1 * p] * (4 - p) for p in (1, 2, 3)}
    whole = Scores.from_similarity("vision", packs, 4)
    shown = similarity_map(whole).axes[0].images[0].get_array()
    assert shown.shape == (4, 4)
    assert shown.T.tolist() == shown.tolist()
    assert shown[0].tolist() == pytest.approx([1, 0.9, 0.8, 0.7])
    tails = dict.fromkeys((1, 2, 3, 4), 0.5)
    ends = Scores.from_similarity("vision", packs, 4, tail=tails)
    shown = similarity_map(ends).axes[0].images[0].get_array()
    assert shown[4].tolist() == [0.5, 0.5, 0.5, 0.5, 1.0]
    with pytest.raises(PlanError, match="token group 'text'"):
        similarity_map(scores, group="text")
    with pytest.raises(PlanError, match="similarity was not scored"):
        similarity_map(Scores({"text": TowerScores(num_layers=4)}))


def test_chart_draws_what_each_series_has():
    figure = retention_chart({"before": {"a": 0.6, "b": 0.4}, "after": {"b": 0.9}})
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b"]
    bars = [(round(bar.get_x() + bar.get_width() / 2), bar.get_height()) for bar in axes.patches]
    assert bars == [(0, 0.6), (1, 0.4), (1, 0.9)]
    with pytest.raises(ConfigError, match="nothing to draw"):
        retention_chart({})


def test_heads_of_dropped_layers_stand_in_the_one_that_takes_them():
    tower = TowerPlan(num_layers=4, drop=(1, 2), graft={0: {1: (0, 1), 2: (3,)}})
    texts = plan_strip(Plan({"text": tower})).axes[0].texts
    assert [(each.get_text(), each.get_position()) for each in texts] == [("+3", (0, 0))]


def test_files_are_whole_images_and_repeat(scores, tmp_path):
    plan = make_plan(scores, num_drop=2)
    path = save_figure(plan_strip(plan), tmp_path / "deep" / "strip.png")
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        assert image.width > 400
    assert path.read_bytes() == figure_bytes(plan_strip(plan))
    assert b"<svg" in figure_bytes(plan_strip(plan), "svg")
    assert Image.open(io.BytesIO(figure_bytes(similarity_map(scores)))).width > 400
    with pytest.raises(ConfigError, match="figure format 'gif'"):
        save_figure(plan_strip(plan), tmp_path / "strip.gif")
    assert not (tmp_path / "strip.gif").exists()
