"""What `python -m tests.frozen` holds against an earlier day."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests import frozen


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "tests.frozen", "--part", "names", *map(str, arguments)]
    return subprocess.run(line, cwd=frozen.HERE.parent, capture_output=True, text=True, check=False)


def test_what_changed_is_named(tmp_path: Path) -> None:
    file = tmp_path / "frozen.json"
    assert command("--write", file).returncode == 0
    assert command("--compare", file).stdout == "0 differences\n"
    was = json.loads(file.read_text())
    was["names"]["save"][0] = "positional or keyword module"
    file.write_text(json.dumps(was))
    done = command("--compare", file)
    assert done.returncode == 1
    assert done.stdout.startswith('names / save / 0\n    was "positional or keyword module"\n    now "positional or keyword model"\n')


def test_what_is_new_is_no_difference_and_what_is_gone_is_one() -> None:
    assert list(frozen.differences({"a": [1]}, {"a": [1], "b": 2}, "part")) == []
    assert len(list(frozen.differences({"a": 1, "b": [2, 3]}, {"b": [2]}, "part"))) == 2


def test_measured_numbers_times_and_hashes_are_left_out() -> None:
    hashed = "0123456789abcdef" * 4
    assert frozen.plain({"seconds": 1.5, "worst": 0.98765, "text": f"off by 1.234e-07 in 3.2 s, of {hashed}"}) == {
        "worst": 0.99,
        "text": "off by 1.2e-07 in TIME, of HASH",
    }
