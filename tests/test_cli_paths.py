"""Paths on the command line: the ~ of a home folder, also where no shell replaces it."""

from __future__ import annotations

from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from interlace.cli import app
from interlace.records import Scores

COMMANDS = [command.callback for command in app.registered_commands]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder that is not the working folder."""
    folder, work = tmp_path / "home", tmp_path / "work"
    folder.mkdir()
    work.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(work)
    return folder


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__)
def test_every_path_may_begin_with_a_home_folder(command, home: Path) -> None:
    for name, hint in get_type_hints(command, include_extras=True).items():
        if "Path" not in str(get_args(hint)[:1]):
            continue
        parser = get_args(hint)[1].parser
        assert parser is not None, name
        assert parser("~/x") == home / "x"


def test_what_is_read_and_written_may_lie_at_home(interlace, home: Path) -> None:
    packs = {pack: [0.5 + 0.01 * i for i in range(8 - pack)] for pack in (1, 2, 3)}
    Scores.from_similarity("text", packs, 8).save(home / "scores.json")
    call = ("plan", "~/scores.json", "--output=~/deep/plan.json", "--picture", "~/plan.png")
    code, told, error = interlace(*call)
    assert code == 0, error
    assert f"Wrote {home / 'deep/plan.json'}" in told
    # what draws may keep a cache at home
    made = {path.name for path in home.iterdir() if not path.name.startswith(".")}
    assert made == {"scores.json", "deep", "plan.png"}
    assert not list(Path.cwd().iterdir())


@pytest.mark.parametrize(
    ("call", "read"),
    [
        (("plan", "IN/scores.json", "-o", "IN/scores.json"), "IN/scores.json"),
        (("score", "bundled:clip", "--data", "IN/d.json", "-o", "IN/d.json"), "IN/d.json"),
        (("eval", "bundled:clip", "--data", "IN/d.json", "-o", "IN/d.json"), "IN/d.json"),
        (("prune", "IN", "IN/plan.json", "-o", "IN"), "IN"),
        (("heal", "IN/../IN", "IN/plan.json", "-o", "IN"), "IN/../IN"),
        (("heal", "bundled:clip", "p", "--data", "IN/d.json", "-o", "IN"), "IN/d.json"),
        (("export", "IN", "IN"), "IN"),
    ],
)
def test_what_is_read_is_not_replaced(interlace, tmp_path: Path, monkeypatch, call, read) -> None:
    monkeypatch.chdir(tmp_path)
    Path("IN").mkdir()
    for name in ("scores.json", "d.json", "plan.json", "config.json"):
        Path("IN", name).write_text("{}")
    code, _, error = interlace(*call, "--overwrite")
    output = call[-1]
    assert code == 2
    assert error.startswith(f"Error: Refusing to replace {output}: {read} is read from there."), (
        error
    )


@pytest.mark.parametrize(
    "call",
    [
        ("plan", "NOWHERE", "-o", "plan.json"),
        ("score", "NOWHERE", "-o", "scores.json"),
        ("score", "bundled:clip", "--data", "NOWHERE", "-o", "scores.json"),
        ("score", "bundled:clip", "--data", "FILE", "--root", "NOWHERE", "-o", "scores.json"),
    ],
)
def test_paths_that_lead_nowhere_are_told(interlace, tmp_path: Path, call) -> None:
    known = {"FILE": str(tmp_path / "data.json")}
    (tmp_path / "data.json").write_text("[]")
    for nowhere, told in (
        ("~nobody-of-that-name/s", "no home folder for '~nobody-of-that-name/s'"),
        ("", " is empty. "),
    ):
        known["NOWHERE"] = nowhere
        code, _, error = interlace(*(known.get(word, word) for word in call))
        assert code == 2
        assert told in error


def test_help_names_paths(interlace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    _, told, _ = interlace("plan", "--help")
    output = next(line for line in told.splitlines() if "--output" in line)
    assert "path" in output.lower().split("--output")[1]
