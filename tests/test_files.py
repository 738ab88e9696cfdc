"""Files take their places whole or not at all, and small texts come out as they should."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bnfold.errors import InputError, UsageError
from bnfold.files import HeldErrors, may_write, neighbours, ready_to_write, replacing, unreadable, write_text
from bnfold.text import counted, first_line, listed, one_line, printable, unused

ROOT = Path(__file__).resolve().parents[1]


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


WORK = """
import os, signal, sys
from pathlib import Path
from bnfold.files import replacing
with replacing(Path("many"), Path("one.txt")) as parts:
    parts[0].mkdir()
    parts[1].write_text("new")
    os.replace("many", parts[0].parents[1] / "old" / "many")  # as it is for the moment of the change
    print("there", flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_process_left_is_cleared_away_and_put_back_by_the_next(tmp_path: Path) -> None:
    put(tmp_path, "old")
    before = contents(tmp_path)
    command = [sys.executable, "-c", WORK]
    with subprocess.Popen(
        command, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)}
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"there\n"
        (tmp_path / ".bnfold-notes").mkdir()
        write_text(tmp_path / "mine.txt", "mine")  # while the other works
        assert len([path for path in tmp_path.iterdir() if path.name.startswith(".bnfold-")]) == 2
        other.kill()
    assert not (tmp_path / "many").exists()
    write_text(tmp_path / "mine.txt", "mine")
    assert contents(tmp_path) == before | {"mine.txt": "mine"}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == [".bnfold-notes"]


def test_an_error_waits_until_the_writer_is_done(tmp_path: Path) -> None:
    file = HeldErrors(Path("/dev/full"))
    assert [file.write(b"x" * 100_000) for _ in range(3)] == [100_000] * 3
    file.seek(0)
    with pytest.raises(OSError, match="No space left"):
        file.close()
    with HeldErrors(tmp_path / "whole") as file:
        file.write(b"whole")
    assert (tmp_path / "whole").read_bytes() == b"whole"


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    write_text(tmp_path / "file", "a\udcff")
    assert contents(tmp_path) == {"file": "a\\udcff"}
    found = [unreadable(tmp_path / name) for name in ("pipe", "file", "none", ".", "a\0b")] + [unreadable("/dev/null")]
    pipe = "a device or pipe, not a file"
    assert neighbours(tmp_path / "fille") == f"; did you mean '{tmp_path}/file'?"
    assert [neighbours(tmp_path / name) for name in ("file", "none", "no/file", "a\0b")] == [""] * 4
    assert found == [pipe, "", "no such file", "a folder, not a file", "can't be read (embedded null byte)", pipe]


def test_what_cannot_be_written_is_told_before_any_work(tmp_path: Path) -> None:
    path = tmp_path / "there.txt"
    path.write_text("mine")
    for error, name, text in (
        (UsageError, "there.txt", "the file exists; give another name, or --force to overwrite it"),
        (UsageError, "out", "the name must end in .txt, such as out.txt"),
        (UsageError, "no/out.txt", "is not a folder; make it first"),
    ):
        with pytest.raises(error, match=text):
            ready_to_write((None, []), (tmp_path / name, [".txt"]), force=False)
    ready_to_write((path, [".txt"]), (tmp_path / "free.txt", [".txt"]), force=True)
    with pytest.raises(UsageError, match="two files would have this name"):
        ready_to_write((tmp_path / "free.txt", [".txt"]), (None, []), (tmp_path / "free.txt", [".txt"]), force=True)
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
    assert first_line(PermissionError(13, "Permission denied", "a.npy")) == "Permission denied"
    assert first_line(ValueError()) == one_line(ValueError(" ")) == "ValueError"
    assert (len(first_line(ValueError("a" * 1000))), len(one_line(ValueError("a" * 1000)))) == (300, 200)
    taken = {"a"}
    assert [unused("a", taken), unused("a", taken), unused("b", taken), unused("b", taken, "{}.{}", 1)] == ["a_2", "a_3", "b", "b.1"]
    assert taken == {"a", "a_2", "a_3", "b", "b.1"}
    assert printable("a\0\ud800b") == "a\ufffd\ufffdb"
