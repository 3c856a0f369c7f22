from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import pytest

from interlace.data.samples import Sample, Turn, samples
from interlace.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

HUMAN = {"from": "human", "value": "<image>\nwhat?"}
GPT = {"from": "gpt", "value": "red"}


@pytest.fixture
def one_image(save_image: Callable[..., Path]) -> str:
    return save_image("a.png").name


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_llava_conversation(name: str, llava_file: Callable[..., Path]) -> None:
    found = samples(llava_file(2, name))
    assert [sample.id for sample in found] == ["r0", "r1"]
    assert found[1].turns == (Turn("user", "<image>\nwhat is it?"), Turn("assistant", "thing 1"))
    assert found[1].task == "chat"
    assert found[1].images[0].open().mode == "RGB"
    assert found[1].images[0].open().size == (8, 8)


def test_json_lines_under_the_name_json(llava_file: Callable[..., Path], tmp_path: Path) -> None:
    text = llava_file(3, "data.jsonl").read_text()
    (tmp_path / "lines.json").write_text("\n" + text)
    assert len(samples(tmp_path / "lines.json")) == 3


QWEN_PARTS = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
]
INLINE = [
    {
        "role": "user",
        "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "?"}],
    },
    {"role": "assistant", "content": "red"},
]


@pytest.mark.parametrize(
    ("record", "task", "texts", "references"),
    [
        (
            {"messages": QWEN_PARTS, "images": ["a.png"]},
            "chat",
            ["be brief", "<image>what?", "red"],
            (),
        ),
        ({"messages": INLINE}, "chat", ["<image>?", "red"], ()),
        (
            {
                "images": ["a.png", {"path": "a.png", "bytes": None}],
                "texts": [
                    {"user": "what?", "assistant": "red"},
                    {"user": "sure?", "assistant": "yes"},
                ],
            },
            "chat",
            ["<image>\n<image>\nwhat?", "red", "sure?", "yes"],
            (),
        ),
        (
            {
                "image": "a.png",
                "question": "what?",
                "answers": [{"answer": "red"}, {"answer": "blue"}, {"answer": "red"}],
            },
            "vqa",
            ["<image>\nwhat?", "red"],
            ("red", "blue", "red"),
        ),
        (
            {"image": "a.png", "question": "what?", "answer": 7, "task": "vqa", "group": "count"},
            "vqa",
            ["<image>\nwhat?", "7"],
            ("7",),
        ),
        (
            {"image": "a.png", "captions": ["one", "two"]},
            "caption",
            ["<image>\nDescribe the image.", "one"],
            ("one", "two"),
        ),
        (
            {"image": "a.png", "conversations": [HUMAN, GPT], "task": "vqa"},
            "vqa",
            ["<image>\nwhat?", "red"],
            ("red",),
        ),
        ({"conversations": [{"from": "human", "value": "hi"}, GPT]}, "chat", ["hi", "red"], ()),
        (
            {"image": "", "conversations": [{"from": "human", "value": "hi"}, GPT]},
            "chat",
            ["hi", "red"],
            (),
        ),
        (
            {"images": [], "image": "a.png", "conversations": [HUMAN, GPT]},
            "chat",
            ["<image>\nwhat?", "red"],
            (),
        ),
        (
            {"conversations": [{"from": None, "role": "user", "value": "hi"}, GPT]},
            "chat",
            ["hi", "red"],
            (),
        ),
    ],
)
def test_every_schema(
    record: dict[str, Any],
    task: str,
    texts: list[str],
    references: tuple[str, ...],
    one_image: str,
    write_json: Callable[..., Path],
) -> None:
    (sample,) = samples(write_json([record]))
    assert (sample.task, sample.references) == (task, references)
    assert [turn.text for turn in sample.turns] == texts
    assert len(sample.images) == sum(text.count("<image>") for text in texts)
    assert sample.group == record.get("group", "")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"image": "a.png", "conversations": [GPT, HUMAN]}, "roles out of order"),
        ({"image": "a.png", "conversations": [HUMAN, HUMAN, GPT]}, "roles out of order"),
        ({"image": "a.png", "conversations": [{"from": "cat", "value": "x"}]}, "role 'cat'"),
        ({"image": "a.png", "conversations": [{"from": ["gpt"], "value": "x"}]}, "role .'gpt'"),
        ({"image": "\ud800.png", "conversations": [HUMAN, GPT]}, "cannot be resolved"),
        ({"image": "a.png", "conversations": []}, "empty"),
        ({"image": "a.png", "conversations": [HUMAN, {"from": "gpt"}]}, "no text"),
        ({"conversations": [HUMAN, GPT]}, "1 <image> placeholders.*0 images"),
        ({"images": ["a.png", "a.png"], "conversations": [HUMAN, GPT]}, "1 <image>.*2 images"),
        (
            {"image": "a.png", "conversations": [HUMAN, {"from": "gpt", "value": "<image>"}]},
            "outside user turns",
        ),
        ({"image": "a.png", "words": "x"}, "unknown schema with the keys image, words"),
        ({"video": "a.mp4", "conversations": [HUMAN, GPT]}, "video"),
        ({"image": 3, "conversations": [HUMAN, GPT]}, "image is given as int"),
        ({"image": "https://a.b/c.png", "conversations": [HUMAN, GPT]}, "remote"),
        ({"images": ["a.png"], "messages": INLINE}, "one place"),
        ("text", "expected an object"),
    ],
)
def test_broken_record_names_file_and_record(
    record: Any, message: str, one_image: str, write_json: Callable[..., Path]
) -> None:
    with pytest.raises(DataError, match=rf"(?s)data\.json, record 0.*{message}"):
        samples(write_json([record]))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "", "empty"),
        ("a.json", "[]", "no records"),
        ("a.jsonl", "\n\n", "no records"),
        ("a.json", '[\n{"id": 1},\n{"id": }]', "line 3, column"),
        ("a.jsonl", '{"id": 1}\n\n{"id"\n', "line 3, column"),
        ("a.json", '"words"', "holds a str"),
        ("a.json", '{"a": 1}', "an object with the keys a"),
        ("a.json", '{"images": [{"id": 1}], "annotations": []}', None),
        ("a.json", '{"images": [], "annotations": [{"image_id": 1}]}', "misses 'caption'"),
        ("a.json", "[" * 100_000, "nested|not valid JSON"),
        ("a.jsonl", '{"id": 1}\n{"id": ' + "1" * 5000 + "}", "line 2: Exceeds the limit"),
        ("a.txt", "x", "expected .json"),
    ],
)
def test_broken_file(name: str, text: str, message: str | None, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        samples(tmp_path / name)
    assert name in str(caught.value)


def test_an_empty_cell_of_a_table_is_no_text(tmp_path: Path) -> None:
    rows = [{"question": "a", "image": math.nan, "answers": ["b", math.nan], "hint": math.nan}]
    path = tmp_path / "table.json"
    path.write_text(json.dumps(rows))
    (found,) = samples(path)
    assert [turn.text for turn in found.turns] == ["a", "b"]
    assert found.references == ("b",)
    assert not found.images
    path.write_text(json.dumps([{"question": math.nan, "answer": "x"}]))
    with pytest.raises(DataError, match="unknown schema with the keys answer"):
        samples(path)


def test_file_that_is_not_utf8_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"id": 1}\n{"id": "\xff"}\n')
    with pytest.raises(DataError, match=r"line 2: not UTF-8"):
        samples(tmp_path / "a.jsonl")


@pytest.mark.parametrize("source", ["missing.json", "./nowhere", "/nowhere/at all", 3, [1, 2]])
def test_source_that_is_none(source: Any) -> None:
    with pytest.raises(DataError):
        samples(source)


@pytest.mark.parametrize("layout", ["txt", "jsonl", "names", "coco", "metadata"])
def test_image_folder_with_captions(
    layout: str, save_image: Callable[..., Path], write_json: Callable[..., Path], tmp_path: Path
) -> None:
    save_image("x.png", 1)
    save_image("sub/y.jpg", 2)
    captions = {"x.png": ["a", "b"], "sub/y.jpg": ["c"]}
    if layout == "txt":
        (tmp_path / "x.txt").write_text("a\n\nb\n")
        (tmp_path / "sub/y.txt").write_text("c\n")
    elif layout == "jsonl":
        write_json([{"image": k, "captions": v} for k, v in captions.items()], "captions.jsonl")
    elif layout == "metadata":
        write_json(
            [
                {"file_name": "x.png", "text": ["a", "b"]},
                {"file_name": "sub/y.jpg", "text": "c"},
            ],
            "metadata.jsonl",
        )
    elif layout == "names":
        write_json(captions, "captions.json")
    else:
        images = [{"id": i, "file_name": name} for i, name in enumerate(captions)]
        texts = [
            {"image_id": i, "caption": text}
            for i, name in enumerate(captions)
            for text in captions[name]
        ]
        write_json({"images": images, "annotations": texts}, "captions_val2017.json")
    found = samples(tmp_path)
    assert sorted(sample.references for sample in found) == [("a", "b"), ("c",)]
    assert {sample.task for sample in found} == {"caption"}
    assert all(sample.images[0].open().size == (32, 32) for sample in found)


def test_folder_without_captions(save_image: Callable[..., Path], tmp_path: Path) -> None:
    save_image("x.png")
    with pytest.raises(DataError, match="1 images, but no captions"):
        samples(tmp_path)


def test_tasks_reinterpret_or_pass_over(one_image: str, write_json: Callable[..., Path]) -> None:
    records = [
        {"image": one_image, "caption": "a dog"},
        {"image": one_image, "conversations": [HUMAN, GPT]},
        {"image": one_image, "conversations": [HUMAN, GPT, {"from": "human", "value": "and?"}]},
    ]
    path = write_json(records)
    (caption,) = samples(path, tasks=("retrieval",))
    assert (caption.task, caption.references) == ("retrieval", ("a dog",))
    (question,) = samples(path, tasks=("vqa",))
    assert (question.task, question.references) == ("vqa", ("red",))
    assert [sample.task for sample in samples(path, tasks=("chat",))] == ["chat"] * 3
    # what it calls its task cannot be served, so the word tells its kind of record
    (talk,) = samples(write_json([{**records[2], "task": "vqa"}], "talk.json"))
    assert (talk.task, talk.group) == ("chat", "vqa")
    only_captions = write_json(records[:1], "captions_only.json")
    with pytest.raises(DataError, match="serves the tasks"):
        samples(only_captions, tasks=("vqa",))


def test_samples_of_the_caller_and_of_scenes() -> None:
    made = samples("scenes", count=6, seed=3, tasks=("vqa",))
    assert len(made) == 6
    again = samples(made, count=6)
    assert sorted(sample.id for sample in again) == sorted(sample.id for sample in made)
    assert again.source == "scenes"
    text_only = Sample("t", "chat", (), (Turn("user", "hi"), Turn("assistant", "ho")))
    assert samples([text_only])[0] is text_only
