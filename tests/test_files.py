"""Files take their places whole or not at all, and small texts come out as they should."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bnfold.errors import InputError, UsageError
from bnfold.files import may_write, ready_to_write, replacing, write_text
from bnfold.text import counted, first_line, listed, one_line, printable, unused


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def put(folder: Path, text: str) -> None:
    """A file, two files that belong together, and a folder, all of the same text."""
    write_text(folder / "one.txt", text)
    with replacing(folder / "two.data", folder / "two.txt") as parts:
        for part in parts:
            part.write_text(text)
    with replacing(folder / "many") as (part,):
        part.mkdir()
        (part / f"{text}.txt").write_text(text)


def test_what_is_whole_takes_its_place(tmp_path: Path) -> None:
    for text in ("old", "new"):
        put(tmp_path, text)
        assert contents(tmp_path) == dict.fromkeys(("one.txt", "two.data", "two.txt", f"many/{text}.txt"), text)


@pytest.mark.parametrize("targets", [["one.txt"], ["two.data", "two.txt"], ["fresh.data", "two.txt"], ["many"]])
@pytest.mark.parametrize("failing", [0, 1, 2, 3])
def test_on_an_error_all_is_as_before(targets: list[str], failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """failing: while it is written (0), or when so many files have changed their places; more than there are is no error."""
    put(tmp_path, "old")
    before, calls, replace = contents(tmp_path), [0], os.replace

    def faulty(source: Path, target: Path) -> None:
        calls[0] += 1
        if calls[0] == failing:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr("os.replace", faulty)
    failed = False
    try:
        with replacing(*(tmp_path / name for name in targets)) as parts:
            for part in parts:
                if targets == ["many"]:
                    part.mkdir()
                else:
                    part.write_text("new")
            if not failing:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        failed = True
    except InputError as error:
        failed = "can't be written (No space left on device); choose another folder" in str(error)
    assert failed == (failing <= calls[0])
    assert (contents(tmp_path) == before) == failed
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_what_cannot_be_written_is_told_before_any_work(tmp_path: Path) -> None:
    path = tmp_path / "there.txt"
    path.write_text("mine")
    for error, name, text in (
        (UsageError, "there.txt", "the file exists; give another name, or --force to overwrite it"),
        (UsageError, "out", "the name must end in .txt, such as out.txt"),
        (InputError, "no/out.txt", "is not a folder; make it first"),
    ):
        with pytest.raises(error, match=text):
            ready_to_write({None: [], tmp_path / name: [".txt"]}, force=False)
    ready_to_write({path: [".txt"], tmp_path / "free.txt": [".txt"]}, force=True)
    with pytest.raises(UsageError, match="this is an input; give another name"):
        may_write(path, force=False, inputs=[tmp_path / "none", path])
    with pytest.raises(UsageError, match="a folder; name a file in it"):
        may_write(tmp_path, force=True)
    assert contents(tmp_path) == {"there.txt": "mine"}


def test_small_texts() -> None:
    assert [counted(n, "sample", ",") for n in (0, 1, 2000)] == ["0 samples", "1 sample", "2,000 samples"]
    assert [listed(names) for names in ("", "a", "ab", "abc")] == ["", "a", "a and b", "a, b and c"]
    error = ValueError("\n  the first.\n  the second.\n")
    assert (first_line(error), one_line(error)) == ("the first", "the first. the second")
    assert first_line(ValueError()) == one_line(ValueError(" ")) == "ValueError"
    assert (len(first_line(ValueError("a" * 1000))), len(one_line(ValueError("a" * 1000)))) == (300, 200)
    taken = {"a"}
    assert [unused("a", taken), unused("a", taken), unused("b", taken), unused("b", taken, "{}.{}", 1)] == ["a_2", "a_3", "b", "b.1"]
    assert taken == {"a", "a_2", "a_3", "b", "b.1"}
    assert printable("a\0\ud800b") == "a\ufffd\ufffdb"
