from __future__ import annotations

import errno
import logging
import os
import signal
import subprocess
import sys

import pytest

from interlace import _progress
from interlace._files import (
    atomic_folder,
    atomic_write_bytes,
    atomic_write_text,
    check_new_checkpoint,
    check_new_file,
    remove_parts,
    sha256_of,
)
from interlace._progress import bar, quiet, track
from interlace.errors import CheckpointError, ConfigError, InterlaceError, unknown_name


def names(folder):
    return sorted(each.name for each in folder.iterdir())


def test_a_file_is_replaced_whole_and_its_folders_are_made(tmp_path):
    path = tmp_path / "a" / "b" / "record.json"
    assert atomic_write_text(path, "older") == path
    atomic_write_text(path, "newer £")
    assert path.read_text(encoding="utf-8") == "newer £"
    assert names(path.parent) == ["record.json"]
    # the rights are those of any new file, not the private ones of temporary files
    plain = tmp_path / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_told_in_words_and_keeps_the_older_file(tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    atomic_write_text(path, "older")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(CheckpointError, match=r"disk is full.*record\.json.*Free some space"):
        atomic_write_bytes(path, b"newer")
    assert path.read_text() == "older"
    assert names(tmp_path) == ["record.json"]


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="Cannot create the folder"):
        atomic_write_text(tmp_path / "file" / "inside.json", "x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointError, match="Cannot write"):
        atomic_write_text(tmp_path / "folder", "x")
    assert names(tmp_path) == ["file", "folder"]


def test_a_device_or_pipe_is_not_replaced_by_a_file(tmp_path):
    # what /dev/null and /dev/stdout are to root, without harm where this fails
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for write in (
        lambda: atomic_write_text(pipe, "text"),
        lambda: check_new_file(pipe, overwrite=True),
    ):
        with pytest.raises(ConfigError, match="is a device or a pipe"):
            write()
    assert pipe.is_fifo()
    assert names(tmp_path) == ["pipe"]


def test_a_folder_appears_only_when_complete(tmp_path):
    target = tmp_path / "deep" / "out"
    with atomic_folder(target) as folder:
        (folder / "one").write_text("1")
        assert not target.exists()
        assert folder.parent == target.parent
    assert names(target) == ["one"]
    assert names(target.parent) == ["out"]


@pytest.mark.parametrize("error", [RuntimeError("wrong"), KeyboardInterrupt()])
def test_a_folder_that_fails_leaves_nothing(tmp_path, error):
    def work():
        with atomic_folder(tmp_path / "out") as folder:
            (folder / "one").write_text("1")
            raise error

    with pytest.raises(type(error)):
        work()
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        # compiled writers wrap the error and keep its text alone
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_folder_on_a_full_disk(tmp_path, error):
    with pytest.raises(CheckpointError, match="disk is full"), atomic_folder(tmp_path / "out"):
        raise error
    assert names(tmp_path) == []


def test_an_existing_folder_is_replaced_only_on_request(tmp_path, monkeypatch):
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(ConfigError, match=r"exists already.*overwrite"), atomic_folder(target):
        pytest.fail("work was spent before the refusal")
    with pytest.raises(ValueError, match="late"), atomic_folder(target, overwrite=True):
        raise ValueError("late")
    assert names(target) == ["old"]
    with atomic_folder(target, overwrite=True) as folder:
        (folder / "new").write_text("new")
    assert names(target) == ["new"]
    assert names(tmp_path) == ["out"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="not a folder"), atomic_folder(tmp_path / "file", True):
        pass
    monkeypatch.chdir(target)
    with pytest.raises(ConfigError, match="working folder"), atomic_folder(tmp_path, True):
        pass


@pytest.mark.parametrize("name", ["out", "run[1]"])
def test_what_a_killed_process_left_of_a_folder_is_removed_and_nothing_else(tmp_path, name):
    with atomic_folder(tmp_path / name) as made:
        pass
    made.mkdir()
    (tmp_path / ".other.1-ab.tmp").mkdir()
    remove_parts(tmp_path / name)
    assert names(tmp_path) == sorted([name, ".other.1-ab.tmp"])


def test_sha256_does_not_depend_on_the_order_of_keys():
    assert sha256_of({"a": 1, "b": [1.5, None]}) == sha256_of({"b": [1.5, None], "a": 1})
    assert sha256_of({"a": 1}) != sha256_of({"a": 1.0})


def test_unknown_names_come_with_the_nearest():
    assert unknown_name("rule", "interlase", ["random", "interlace"]) == (
        "Unknown rule 'interlase'. Did you mean 'interlace'? Known: interlace, random."
    )
    assert unknown_name("rule", "qqq", ["random"]) == "Unknown rule 'qqq'. Known: random."
    assert unknown_name("tower", "Text", {"text": 1}).startswith("Unknown tower 'Text'. Did you")
    assert issubclass(CheckpointError, InterlaceError)


def test_progress_is_a_line_now_and_then_where_there_is_no_terminal(caplog, monkeypatch):
    monkeypatch.setattr(_progress, "LOG_SECONDS", 0.0)
    with caplog.at_level(logging.INFO, logger="interlace.progress"):
        assert list(track(iter("ab"), description="scoring", total=2)) == ["a", "b"]
        with bar("healing") as advance:
            advance(3, "loss 1.5")
    first, *_, last = caplog.messages
    assert first.startswith("scoring: 1/2, 0:0")
    assert "healing: 3, loss 1.5" in caplog.messages
    assert last.startswith("healing: 3 done in")
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="interlace.progress"), quiet():
        assert list(track([1, 2], description="scoring")) == [1, 2]
    assert caplog.messages == []


def test_progress_on_a_terminal_nests_and_cleans_up(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    for _ in track(range(2), description="outer"):
        live = _progress._Display.live
        for _ in track(range(3), description="inner"):
            assert _progress._Display.live is live
            break
    assert _progress._Display.live is None
    with pytest.raises(ZeroDivisionError):
        _ = [1 / number for number in track(range(2), description="outer")]
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "outer" in captured.err


def test_a_checkpoint_replaces_only_a_checkpoint(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    assert check_new_checkpoint(target, overwrite=True) == target
    (target / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=r"holds thesis\.tex and no config\.json"):
        check_new_checkpoint(target, overwrite=True)
    (target / "config.json").write_text("{}")
    assert check_new_checkpoint(target, overwrite=True, inputs=("org/name", None)) == target
    for read in (target, target / "thesis.tex"):
        with pytest.raises(ConfigError, match=f"{read} is read from there"):
            check_new_checkpoint(target, overwrite=True, inputs=(read,))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_command_that_is_told_to_end_leaves_nothing_half_written(tmp_path, number):
    script = f"""
import signal, sys, time, typer
import interlace.cli as cli
from interlace._files import atomic_folder

def work():
    with atomic_folder({str(tmp_path / "out")!r}) as folder:
        (folder / "part").write_text("half")
        print("filling", flush=True)
        time.sleep(60)

# tests that run in the background inherit that Ctrl-C is ignored
signal.signal(signal.SIGINT, signal.default_int_handler)
cli.app = typer.Typer()
cli.app.command()(work)
cli.main()
"""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", script], text=True, **pipes) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "filling\n"
        assert len(names(tmp_path)) == 1
        process.send_signal(number)
        told = process.communicate(timeout=60)[1]
        assert process.returncode == 128 + number
        assert told == "Stopped before it was done; what was half written is removed.\n"
    assert names(tmp_path) == []
