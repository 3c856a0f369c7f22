from __future__ import annotations

import json
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from interlace.data.samples import samples
from interlace.errors import ConfigError, DataError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


@pytest.fixture
def finevision(save_image: Callable[..., Path]) -> Any:
    """FineVision's schema: `images` and `texts` with further columns beside them."""
    count = 12
    data = {
        "images": [
            [str(save_image(f"hf/{index}-{number}.png", index)) for number in range(index % 3)]
            for index in range(count)
        ],
        "texts": [
            [{"user": f"what is {index}?", "assistant": f"it is {index}"}] for index in range(count)
        ],
        "source": ["made"] * count,
        "relevance_min": [5] * count,
    }
    dataset = datasets.Dataset.from_dict(data)
    features = dataset.features.copy()
    features["images"] = datasets.List(datasets.Image())
    return dataset.cast(features)


def embedded(dataset: Any) -> Any:
    """The same rows with the image files inside, as on the hub."""

    def embed(row: dict[str, Any]) -> dict[str, Any]:
        def read(image: dict[str, Any]) -> dict[str, Any]:
            with open(image["path"], "rb") as file:
                return {"bytes": file.read(), "path": None}

        return {"images": [read(image) for image in row["images"]]}

    plain = dataset.cast_column("images", datasets.List(datasets.Image(decode=False)))
    return plain.map(embed).cast_column("images", datasets.List(datasets.Image()))


def check(found: Any, count: int = 12) -> None:
    assert len(found) == count
    for sample in found:
        number = int(sample.turns[1].text.removeprefix("it is "))
        assert sample.task == "chat"
        assert sample.turns[0].text == "<image>\n" * (number % 3) + f"what is {number}?"
        assert [image.open().size for image in sample.images] == [(32, 32)] * (number % 3)


@pytest.mark.parametrize("way", ["object", "saved", "saved dict", "parquet file", "parquet folder"])
def test_finevision(way: str, finevision: Any, tmp_path: Path) -> None:
    dataset = embedded(finevision)
    source: Any = dataset
    if way == "saved":
        source = tmp_path / "saved"
        dataset.save_to_disk(source)
    elif way == "saved dict":
        source = tmp_path / "saved"
        datasets.DatasetDict(train=dataset, test=dataset.select([0])).save_to_disk(source)
    elif way == "parquet file":
        source = tmp_path / "rows.parquet"
        dataset.to_parquet(source)
    elif way == "parquet folder":
        source = tmp_path / "rows"
        (source / "data").mkdir(parents=True)
        for shard in range(2):
            part = dataset.shard(2, shard)
            part.to_parquet(source / f"data/train-0000{shard}-of-00002.parquet")
        dataset.select([0]).to_parquet(source / "data/test-00000-of-00001.parquet")
    found = samples(source)
    check(found)
    assert (
        samples(source, count=5, seed=1).fingerprint == samples(source, count=5, seed=1).fingerprint
    )
    if way in ("saved dict", "parquet folder"):
        assert len(samples(source, split="test")) == 1
        with pytest.raises(DataError, match=r"no .*split 'dev'.*test"):
            samples(source, split="dev")
    else:
        with pytest.raises(ConfigError, match=r"'train', but .* has no splits .* leave split out"):
            samples(source, split="train")


def test_image_paths_in_a_parquet_file_stay_inside(
    save_image: Callable[..., Path], tmp_path: Path
) -> None:
    image = {"path": str(save_image("a.png")), "bytes": None}
    (tmp_path / "inner").mkdir()
    path = tmp_path / "inner/rows.parquet"
    datasets.Dataset.from_list([{"image": image, "caption": "c"}]).to_parquet(path)
    with pytest.raises(DataError, match="outside the data root"):
        samples(path)
    assert samples(path, root=tmp_path)[0].images[0].open().size == (32, 32)


def test_images_of_a_data_set_in_memory_may_be_anywhere(finevision: Any) -> None:
    check(samples(finevision))


def test_images_are_read_when_opened(finevision: Any) -> None:
    found = samples(embedded(finevision))
    assert all("bytes" not in repr(image) for sample in found for image in sample.images)
    assert len({image.identity for sample in found for image in sample.images}) == 8


@pytest.mark.parametrize(
    ("columns", "task", "answer", "references"),
    [
        ({"question": "q?", "answer": "yes"}, "vqa", "yes", ("yes",)),
        (
            {
                "question": "q?",
                "multiple_choice_answer": "a",
                "answers": [{"answer": "b"}, {"answer": "a"}],
            },
            "vqa",
            "a",
            ("b", "a"),
        ),
        ({"query": "q?", "label": ["12"]}, "vqa", "12", ("12",)),
        ({"question": "q?", "choices": ["1", "2"], "answer": 1}, "vqa", "B", ("B",)),
        ({"question": "q?", "options": ["1", "2"], "answer": "1"}, "vqa", "A", ("A",)),
        ({"question": "q?", "options": ["x", "y"], "answer": "1"}, "vqa", "B", ("B",)),
        ({"question": "q?", "options": ["x", "y"], "label": "b"}, "vqa", "B", ("B",)),
        (
            {"question": "q?", "A": "x", "B": "y", "C": "nan", "hint": "nan", "answer": "B"},
            "vqa",
            "B",
            ("B",),
        ),
        ({"caption": ["one", "two"]}, "caption", "one", ("one", "two")),
        ({"text": "one"}, "caption", "one", ("one",)),
        ({"sentences": [{"raw": "one"}, {"raw": "two"}]}, "caption", "one", ("one", "two")),
    ],
)
def test_common_columns(
    columns: dict[str, Any],
    task: str,
    answer: str,
    references: tuple[str, ...],
    save_image: Callable[..., Path],
) -> None:
    image = str(save_image("a.png"))
    dataset = datasets.Dataset.from_dict({"image": [image], **{k: [v] for k, v in columns.items()}})
    (sample,) = samples(dataset.cast_column("image", datasets.Image()))
    assert (sample.task, sample.turns[-1].text, sample.references) == (task, answer, references)
    assert sample.images[0].open().size == (32, 32)


def test_choices_stand_in_the_question(save_image: Callable[..., Path], tmp_path: Path) -> None:
    save_image("a.png")
    record = {"image": "a.png", "question": "Which?", "hint": "Look.", "choices": ["cat", "dog"]}

    def asked(**changes: Any) -> Any:
        path = tmp_path / "choices.json"
        path.write_text(json.dumps([{**record, **changes}]))
        return samples(path, max_bad_fraction=0.0)[0]

    (user, answer) = asked(correct_choice_idx=1).turns
    assert user.text.splitlines() == [
        "<image>",
        "Look.",
        "Which?",
        "A. cat",
        "B. dog",
        "Answer with the letter of the right choice.",
    ]
    assert answer.text == "B"
    assert len(asked(hint="").turns) == 1
    # letters that stand there already, all of them and in order
    lines = user.text.splitlines()
    for carried in (["A. cat", "B. dog"], ["(a) cat", "(b) dog"], ["A: cat", "B:  dog"]):
        for right in ("dog", "b", carried[1], 1):
            (user, answer) = asked(choices=carried, answer=right).turns
            assert (user.text.splitlines(), answer.text) == (lines, "B")
    # columns of their own, as far as there are choices
    assert asked(choices=None, A="cat", B="dog", C=None, answer="B").turns[0].text == user.text
    rest = {"A": "cat", "B": "dog", "C": "nan", "D": "nan"}
    assert asked(choices=None, hint="nan", **rest).turns[0].text.splitlines() == [
        "<image>",
        *lines[2:],
    ]
    for others in (["A.D.", "B.C."], ["A. cat", "dog"], ["B. cat", "A. dog"], ["A. ", "B. "]):
        assert asked(choices=others).turns[0].text.splitlines()[3] == f"A. {others[0].strip()}"
    # an open question among them, and one without an image
    assert asked(choices=[], answer="cat").turns[0].text == "<image>\nWhich?"
    assert asked(choices=[], options=["cat", "dog"], answer="dog").turns[1].text == "B"
    spoken = asked(image=None, answer="cat")
    assert (spoken.task, spoken.images, spoken.references) == ("chat", (), ("A",))
    for changes, words in (
        ({"answer": 2}, "2 names none of the 2 choices"),
        ({"answer": "bird"}, "'bird' names none"),
        ({"choices": "['cat', 'dog']"}, "expected a list of 2 to 26 texts"),
    ):
        with pytest.raises(DataError, match=words):
            asked(**changes)


def test_bad_image_in_a_data_set_is_skipped(finevision: Any) -> None:
    dataset = embedded(finevision).cast_column(
        "images", datasets.List(datasets.Image(decode=False))
    )
    rows = dataset.to_list()
    rows[4]["images"][0]["bytes"] = rows[4]["images"][0]["bytes"][:40]
    found = samples(datasets.Dataset.from_list(rows), max_bad_fraction=0.1)
    assert (len(found), found.num_skipped) == (11, 1)


def test_unknown_columns_are_named() -> None:
    with pytest.raises(DataError, match=r"row 0: unknown schema with the keys a, b"):
        samples(datasets.Dataset.from_dict({"a": [1], "b": [2]}))


def test_stream_is_sampled_without_bias(finevision: Any) -> None:
    stream = embedded(finevision).to_iterable_dataset()
    check(samples(stream, count=5, seed=1), 5)
    with pytest.raises(DataError, match="count="):
        samples(stream)
    rows = [{"texts": [{"user": "q", "assistant": str(index)}]} for index in range(60)]
    plain = datasets.Dataset.from_list(rows).to_iterable_dataset()
    counts = Counter(
        int(sample.turns[1].text) // 20
        for seed in range(10)
        for sample in samples(plain, count=24, seed=seed)
    )
    # 240 draws over three thirds: mean 80, standard deviation about 6
    assert min(counts.values()) > 50
    assert sum(counts.values()) == 240


def test_hub_without_network_and_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"'owner/name:part'.*network"):
        samples("owner/name:part")
    with pytest.raises(DataError, match="neither an existing file"):
        samples("what is this?")
    with pytest.raises(DataError, match="Did you mean 'scenes', the built-in data"):
        samples("sceens")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="pip install datasets"):
        samples("owner/name")
