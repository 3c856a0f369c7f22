"""Which records are taken, and what happens to bad images."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from data import made
from PIL import Image

from interlace._cli import read_samples
from interlace.config import DataSettings
from interlace.data.images import BytesImage, FileImage, MemoryImage, decode
from interlace.data.samples import Sample, Samples, Turn, samples
from interlace.errors import ConfigError, DataError
from interlace.pipeline import _calibration

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def plain(count: int) -> list[Sample]:
    turns = (Turn("user", "hi"), Turn("assistant", "ho"))
    return [Sample(str(index), "chat", (), turns) for index in range(count)]


def test_records_that_are_not_understood_count_as_bad(write_json: Callable[..., Path]) -> None:
    good = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}
    odd = {"conversations": [{"from": "cat", "value": "miaow"}]}
    path = write_json([*[good] * 10, odd, *[good] * 9])
    found = samples(path, max_bad_fraction=0.05)
    assert (len(found), found.num_skipped) == (19, 1)
    # replaced by another one
    some = [samples(path, count=10, seed=seed, max_bad_fraction=0.1) for seed in range(9)]
    assert [len(each) for each in some] == [10] * 9
    assert {each.num_skipped for each in some} == {0, 1}
    # of the tasks that are wanted, none is served
    with pytest.raises(DataError, match=r"since 1 cannot .*serves the tasks caption.*'cat'"):
        samples(path, tasks=("caption",), max_bad_fraction=0.05)
    with pytest.raises(DataError, match=r"1 samples that cannot be used .*, 0 allowed .*'cat'"):
        samples(path)


def test_every_record_is_as_likely() -> None:
    data = plain(20)
    counts = Counter(s.id for seed in range(200) for s in samples(data, count=5, seed=seed))
    # mean 50, standard deviation 6
    assert min(counts.values()) > 25
    assert max(counts.values()) < 75
    assert len(counts) == 20


def test_count_and_fraction() -> None:
    data = plain(10)
    assert len(samples(data, fraction=0.35)) == 3
    assert len(samples(data, fraction=0.01)) == 1
    assert len(samples(data, count=50)) == 10
    assert [sample.id for sample in samples(data)] == [str(index) for index in range(10)]
    first = [sample.id for sample in samples(data, count=5, seed=1)]
    assert first != [sample.id for sample in samples(data, count=5, seed=2)]
    assert len(set(first)) == 5


@pytest.mark.parametrize(
    "wrong",
    [
        {"count": 1, "fraction": 0.5},
        {"count": 0},
        {"fraction": 0.0},
        {"fraction": 1.5},
        {"fraction": float("nan")},
        {"fraction": "0.5"},
        {"max_bad_fraction": -1},
        {"max_bad_fraction": "1%"},
        {"processor": object()},
        {"tasks": ("captoin",)},
        {"tasks": "vqa"},
    ],
)
def test_arguments_out_of_range(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        samples(plain(3), **wrong)  # type: ignore[arg-type]


def test_tasks_may_come_one_by_one() -> None:
    wanted = samples("scenes", count=3, tasks=("vqa",))
    assert samples("scenes", count=3, tasks=iter(("vqa",))).fingerprint == wanted.fingerprint  # type: ignore[arg-type]


def test_scenes_need_a_count_and_nothing_is_empty() -> None:
    with pytest.raises(ConfigError, match="count="):
        samples("scenes")
    with pytest.raises(DataError, match="no samples"):
        samples([])


def test_same_choice_and_fingerprint_in_another_process(llava_file: Callable[..., Path]) -> None:
    path = llava_file(12)
    here = samples(path, count=4, seed=7)
    code = (
        "import sys; from interlace.data.samples import samples; "
        "s = samples(sys.argv[1], count=4, seed=7); print(s.fingerprint, *[x.id for x in s])"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "5"}
    out = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    assert out.stdout.split() == [here.fingerprint, *[sample.id for sample in here]]


def test_fingerprint_sees_text_order_and_pixels(
    llava_file: Callable[..., Path], save_image: Callable[..., Path]
) -> None:
    path = llava_file(3)
    first = samples(path).fingerprint
    assert samples(path).fingerprint == first
    assert samples(path)[::-1].fingerprint != first
    save_image("images/1.png", seed=99, side=8)
    assert samples(path).fingerprint != first


def test_samples_is_a_sequence_of_views() -> None:
    held = Samples(plain(5), source="x", seed=4, num_skipped=2, processor="p")
    part = held[1:3]
    assert isinstance(part, Samples)
    assert [sample.id for sample in part] == ["1", "2"]
    assert (part.source, part.seed, part.num_skipped, part.processor) == ("x", 4, 2, "p")
    assert [sample.id for sample in held.subset(2)] == ["0", "1"]
    assert len(held.subset(9)) == 5
    with pytest.raises(ConfigError, match=r"2\.5"):
        held.subset(2.5)  # type: ignore[arg-type]
    with pytest.raises(ConfigError):
        held.subset(0)


def _spoil(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "zero bytes":
        path.write_bytes(b"")
    elif how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "text":
        path.write_text("not an image")
    elif how == "folder":
        path.unlink()
        path.mkdir()


@pytest.mark.parametrize("how", ["missing", "zero bytes", "truncated", "text", "folder"])
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_bad_image_is_skipped_replaced_and_counted(
    how: str,
    suffix: str,
    save_image: Callable[..., Path],
    write_json: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    records = []
    for index in range(10):
        save_image(f"{index}.{suffix}", seed=index)
        records.append({"id": str(index), "image": f"{index}.{suffix}", "caption": "c"})
    path = write_json(records)
    victim = samples(path, count=6, seed=1)[2].id
    _spoil(path.parent / f"{victim}.{suffix}", how)
    found = samples(path, count=6, seed=1, max_bad_fraction=0.2)
    assert len(found) == 6
    assert victim not in {sample.id for sample in found}
    assert found.num_skipped == 1
    assert caplog.text.count("skipped 1 samples") == 1
    everything = samples(path, max_bad_fraction=0.1)
    assert (len(everything), everything.num_skipped) == (9, 1)
    with pytest.raises(DataError, match=rf"{victim}\.{suffix}.*max_bad_fraction"):
        samples(path, count=6, seed=1)


def test_too_many_bad_images_names_the_first(llava_file: Callable[..., Path]) -> None:
    path = llava_file(40)
    for index in range(40):
        _spoil(path.parent / f"images/{index}.png", "zero bytes")
    with pytest.raises(DataError, match=r"empty \(0 bytes\).*and 35 more.*max_bad_fraction"):
        samples(path, max_bad_fraction=0.5)


def test_what_the_chat_template_refuses_is_bad_as_well() -> None:
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    processor = made.qwen(strict + made.CHATML)
    data = [made.sample("red", name=str(number)) for number in range(9)]
    data.append(made.sample("red", "yes", name="with system"))
    data.append(made.sample("red", name="marked"))
    spoiled = Turn("user", "<image>\nis <|image_pad|> a word?")
    data[-1] = replace(data[-1], turns=(spoiled, *data[-1].turns[1:]))
    found = samples(data, processor=processor, max_bad_fraction=0.2)
    assert [sample.id for sample in found] == [str(number) for number in range(9)]
    assert (found.num_skipped, found.processor) == (2, processor)
    with pytest.raises(DataError, match=r"(?s)with system.*no system.*'marked'.*max_bad_fraction"):
        samples(data, processor=processor)
    # models that take a question as it is have no template
    for other in (made.clip(), made.blip(), None):
        assert len(samples(data, processor=other)) == 11


def test_no_readable_sample_is_told_with_every_image_once(
    save_image: Callable[..., Path], write_json: Callable[..., Path]
) -> None:
    image = save_image("one.png")
    _spoil(image, "zero bytes")
    path = write_json([{"id": str(i), "image": "one.png", "caption": "c"} for i in range(8)])
    with pytest.raises(DataError, match=r"no sample is left, since 8 cannot be used\. ") as told:
        samples(path, max_bad_fraction=1.0)
    assert str(told.value).count("one.png") == 1
    assert "max_bad_fraction" not in str(told.value)
    # of more bad ones than are wanted none can be allowed either
    with pytest.raises(DataError, match=r"2 allowed \(max_bad_fraction=1.0\)") as told:
        samples(path, count=2, max_bad_fraction=1.0)
    assert str(told.value).count("one.png") == 1
    assert "raise" not in str(told.value)


def test_scenes_have_no_root() -> None:
    with pytest.raises(ConfigError, match="root is 'there', but the built-in scenes are drawn"):
        samples("scenes", count=2, root="there")
    with pytest.raises(ConfigError, match="root is 'there', but samples that are made already"):
        samples(plain(2), root="there")


def test_only_data_sets_of_the_hub_are_streamed(llava_file: Callable[..., Path]) -> None:
    for source in ("scenes", llava_file(2), plain(2)):
        with pytest.raises(ConfigError, match="streaming is for data sets of the hub"):
            samples(source, count=1, streaming=True)
    with pytest.raises(DataError, match="neither an existing file"):
        samples("no such/name at all", count=1, streaming=True)


@pytest.mark.parametrize("seed", [None, "1", 0.5])
def test_a_seed_is_a_whole_number(seed: Any) -> None:
    with pytest.raises(ConfigError, match="seed is"):
        samples(plain(2), count=1, seed=seed)


@pytest.mark.parametrize("root", ["nowhere", "data.json"])
def test_a_root_that_is_no_folder_is_told(llava_file: Callable[..., Path], root: str) -> None:
    path = llava_file(2)
    with pytest.raises(DataError, match=rf"{root}: no such folder to look for images in"):
        samples(path, root=path.parent / root, max_bad_fraction=1.0)


@pytest.mark.parametrize("way", ["dots", "absolute", "link", "linked folder", "nul"])
def test_image_path_may_not_leave_the_root(
    way: str, tmp_path: Path, save_image: Callable[..., Path], write_json: Callable[..., Path]
) -> None:
    outside = save_image("outside/secret.png")
    root = tmp_path / "root"
    root.mkdir()
    name = {
        "dots": "../outside/secret.png",
        "absolute": str(outside),
        "link": "link.png",
        "linked folder": "far/secret.png",
        "nul": "a\0b",
    }[way]
    (root / "link.png").symlink_to(outside)
    (root / "far").symlink_to(outside.parent)
    path = write_json([{"image": name, "caption": "c"}])
    with pytest.raises(DataError, match=r"record 0.*(outside the data root|not an image path)"):
        samples(path, root=root)


def test_path_inside_the_root_may_be_absolute_or_linked(
    tmp_path: Path, save_image: Callable[..., Path], write_json: Callable[..., Path]
) -> None:
    real = save_image("deep/real.png")
    (tmp_path / "link.png").symlink_to(real)
    names = [str(real), "link.png", "deep/../deep/real.png"]
    path = write_json([{"image": name, "caption": "c"} for name in names])
    assert len({sample.images[0].identity for sample in samples(path)}) == 1


def test_large_images_and_long_strips_are_bad(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Image.new("L", (1, 300)).save(tmp_path / "strip.png")
    Image.new("L", (300, 300)).save(tmp_path / "large.png")
    data = (tmp_path / "large.png").read_bytes()
    assert decode(data, "large").size == (300, 300)
    with pytest.raises(DataError, match=r"strip\.png: 1 x 300"):
        FileImage(tmp_path / "strip.png").open()
    # PIL itself warns above its limit and raises above twice the limit
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DataError, match=r"large: .*decompression bomb"):
        decode(data, "large")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 80_000)
    with (
        pytest.warns(Image.DecompressionBombWarning),
        pytest.raises(DataError, match="large: 300 x 300 pixels"),
    ):
        decode(data, "large")


def test_images_open_upright_rgb_from_any_mode(tmp_path: Path) -> None:
    turned = Image.new("RGB", (4, 2))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert FileImage(tmp_path / "turned.jpg").open().size == (2, 4)
    deep = Image.fromarray(np.full((2, 2), 0x8000, dtype=np.uint16))
    deep.save(tmp_path / "deep.png")
    assert np.asarray(FileImage(tmp_path / "deep.png").open()).tolist() == [[[128] * 3] * 2] * 2
    for mode in ("P", "L", "RGBA", "1", "CMYK"):
        assert MemoryImage(Image.new(mode, (3, 3))).open().mode == "RGB"
    data = (tmp_path / "deep.png").read_bytes()
    assert BytesImage(data).identity == FileImage(tmp_path / "deep.png").identity


@pytest.mark.parametrize(
    ("objective", "tasks"),
    [
        ("chat", {"vqa", "caption"}),
        ("vqa", {"vqa"}),
        ("caption", {"caption"}),
        ("contrastive", {"retrieval"}),
    ],
)
def test_commands_and_recipes_take_scenes_that_the_model_can_learn_from(
    objective: str, tasks: set[str]
) -> None:
    vlm: Any = SimpleNamespace(family=SimpleNamespace(objective=objective), processor=None)
    given = read_samples(vlm, "scenes", None, "train", 4, 0, 0.0)
    assert {each.task for each in given} == tasks
    assert {each.task for each in _calibration(DataSettings(calibration_count=4), vlm)} == tasks
    named = DataSettings(calibration_count=4, tasks=("chat",))
    assert {each.task for each in _calibration(named, vlm)} == {"chat"}
