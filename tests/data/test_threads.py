"""Two threads that open data at once get each their own, and leave the process as it was."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from tabular import PICTURES, ROWS, A, images, shades, tar, write

from bnfold.data import open_data
from bnfold.data.open import importable, module_of

CODE = """
import sys, time
from dataclasses import dataclass
time.sleep(0.05)  # the other thread has its turn meanwhile
from {beside} import A
@dataclass
class Kept:
    value: int = {value}
def batches():
    yield A
"""


def at_once(*calls):
    gate = threading.Barrier(len(calls))

    def run(call):
        gate.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return [result.result() for result in [pool.submit(run, call) for call in calls]]


def test_files_of_one_name_in_two_folders(tmp_path):
    before = list(sys.path)
    for number in range(2):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        (folder / "load.py").write_text(CODE.format(beside=f"beside_{number}", value=number))
        (folder / f"beside_{number}.py").write_text(f"import numpy as np\nA = np.full((2, 3), {number}, 'float32')\n")
    for _ in range(3):
        found = at_once(*(lambda n=n: list(open_data(f"{tmp_path}/{n}/load.py:batches", ROWS)) for n in range(2)))
        assert [float(batch["x"][0, 0]) for (batch,) in found] == [0, 1]
    modules = at_once(*(lambda n=n: module_of(tmp_path / f"{n}" / "load.py", "test") for n in range(2)))
    assert [pickle.loads(pickle.dumps(module.Kept())) == module.Kept(number) for number, module in enumerate(modules)] == [True, True]
    assert sys.path == before


def test_a_folder_is_searched_no_longer_than_it_is_imported_from(tmp_path):
    before = list(sys.path)
    with importable(tmp_path):
        sys.path.remove(str(tmp_path))  # as a user's module may
    assert sys.path == before
    (tmp_path / "fails.py").write_text("raise OSError('no disk')\n")
    try:
        module_of(tmp_path / "fails.py", "test")
    except OSError:
        assert sys.path == before


def test_tables(tmp_path):
    variables = dict(os.environ)
    tables = [tar(tmp_path / "a.tar", 0, 20), tmp_path / "b.parquet", tmp_path / "saved"]
    images(0, 20).to_parquet(tables[1])
    images(0, 20).save_to_disk(tables[2])
    calls = [lambda path=path: shades(open_data(str(path), PICTURES, batch_size=3)) for path in tables]
    rows = write(tmp_path / "rows.parquet", x=A)
    *found, array = at_once(*calls, lambda: np.concatenate([batch["x"] for batch in open_data(rows, ROWS)]))
    assert found == [list(range(20))] * 3
    assert (array == A).all()
    assert dict(os.environ) == variables


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_fork_while_another_thread_imports(tmp_path):
    """In a process of its own: forking one with threads is what is tried."""
    (tmp_path / "slow.py").write_text("import time\ntime.sleep(0.5)\n")
    (tmp_path / "quick.py").write_text("A = 3\n")
    code = f"""
import os, signal, threading, time
from pathlib import Path
from bnfold.data.open import module_of
folder = Path({str(tmp_path)!r})
thread = threading.Thread(target=module_of, args=(folder / "slow.py", "test"))
thread.start()
time.sleep(0.2)
child = os.fork()
if child == 0:
    signal.alarm(20)
    os._exit(module_of(folder / "quick.py", "test").A)
thread.join()
os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code]).returncode == 3
