"""Saving: one weight at a time, and whole or not at all."""

from __future__ import annotations

import os
import stat
import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.backend.test.case.node import collect_testcases

from bnfold.backends.onnx.files import save as saving
from bnfold.backends.onnx.files.load import from_proto, load, save
from bnfold.errors import InputError, ModelError, UnsupportedError, UsageError
from tests.backends.onnx.test_round_trip import everything
from tests.conftest import small_model


def megabytes(count: int) -> ir.Model:
    """A model whose weights are made on demand, a megabyte each; `made` in the graph's meta counts."""
    model = from_proto(small_model(fold="none"))
    made: list[int] = []

    def make(i: int) -> ir.Tensor[Any]:
        made.append(i)
        return ir.Tensor(np.full((1 << 18,), i, np.float32))

    for i in range(count):
        weight = ir.LazyTensor(lambda i=i: make(i), ir.DataType.FLOAT, ir.Shape([1 << 18]), name=f"w{i}")
        model.graph.register_initializer(ir.Value(name=f"w{i}", const_value=weight))
    model.graph.meta["made"] = made
    return model


@pytest.mark.parametrize("outside", [False, True])
def test_each_weight_is_asked_for_once_and_held_alone(tmp_path: Path, outside: bool) -> None:
    model = megabytes(40)
    model.graph.meta[saving.EXTERNAL] = outside
    tracemalloc.start()
    save(model, tmp_path / "m.onnx")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert model.graph.meta["made"] == list(range(40))
    assert peak < 4 << 20
    assert (tmp_path / "m.onnx.data").exists() == outside
    back = load(tmp_path / "m.onnx").graph.initializers
    for i in (0, 39):
        np.testing.assert_array_equal(back[f"w{i}"].const_value.numpy(), np.full(1 << 18, i, np.float32))


def test_loading_holds_the_file_once(tmp_path: Path) -> None:
    save(megabytes(40), tmp_path / "m.onnx")
    tracemalloc.start()
    model = load(tmp_path / "m.onnx")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 44 << 20
    assert model.graph.initializers["w7"].const_value is not None


def test_a_large_model_goes_into_two_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "ONE_FILE", 1 << 20)
    save(megabytes(2), tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").stat().st_size < 10_000
    assert (tmp_path / "m.onnx.data").stat().st_size == 2 << 20
    onnx.checker.check_model(tmp_path / "m.onnx")


def test_saving_changes_nothing(tmp_path: Path) -> None:
    model = from_proto(small_model())
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    save(model, tmp_path / "m.onnx")
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_a_weight_without_data_is_refused(tmp_path: Path) -> None:
    model = from_proto(small_model())
    model.graph.register_initializer(ir.Value(name="hollow", const_value=ir.tensor([1.0])))
    model.graph.initializers["hollow"].const_value = None
    with pytest.raises(ModelError, match="weight 'hollow' has no data"):
        save(model, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_more_weights_in_subgraphs_than_a_file_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "ONE_FILE", -(1 << 27))
    model = from_proto(everything())
    with pytest.raises(UnsupportedError, match="the weights within subgraphs pass 2 GB"):
        save(model, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


# --- whole or not at all -------------------------------------------------------------------------------------------------------------


def test_an_existing_file_is_kept_without_force(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_text("mine")
    model = from_proto(small_model())
    with pytest.raises(UsageError, match=r"m.onnx: the file exists; give another name, or --force to overwrite it"):
        save(model, tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").read_text() == "mine"
    save(model, tmp_path / "m.onnx", force=True)
    assert onnx.load(tmp_path / "m.onnx") == small_model()
    (tmp_path / "big.onnx.data").write_text("mine")
    with pytest.raises(UsageError, match=r"big.onnx.data: the file exists"):
        _save_outside(model, tmp_path / "big.onnx")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["big.onnx.data", "m.onnx"]


def _save_outside(model: ir.Model, path: Path, *, force: bool = False) -> None:
    model.graph.meta[saving.EXTERNAL] = True
    model.graph.register_initializer(ir.Value(name="big", const_value=ir.Tensor(np.ones(2000, np.float32))))
    save(model, path, force=force)


@pytest.mark.parametrize("failing", [1, 2])
def test_a_failure_between_the_files_leaves_both_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    path = tmp_path / "m.onnx"
    _save_outside(from_proto(small_model()), path)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    calls, replace = [0], os.replace

    def faulty(a: Path, b: Path) -> None:
        calls[0] += 1
        if calls[0] == failing:
            raise OSError("no luck")
        replace(a, b)

    monkeypatch.setattr(os, "replace", faulty)
    with pytest.raises(InputError, match=r"m.onnx: can't be written \(no luck\)"):
        _save_outside(from_proto(small_model(seed=1)), path, force=True)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before


def test_a_reader_sees_the_old_files_or_the_new_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every step in which something changes its place, three times over."""
    path, replace, unlink = tmp_path / "m.onnx", os.replace, Path.unlink
    seen: list[tuple[bool, float]] = []

    def look() -> None:
        if path.exists():
            found = load(path)
            big = found.graph.initializers["big"].const_value
            seen.append((found.graph.doc_string == str(big.numpy()[0]), float(big.numpy()[0])))

    def watched(a: Path, b: Path) -> None:
        look()
        replace(a, b)
        look()

    def gone(file: Path, missing_ok: bool = False) -> None:
        look()
        unlink(file, missing_ok)
        look()

    monkeypatch.setattr(os, "replace", watched)
    monkeypatch.setattr(Path, "unlink", gone)
    for turn in range(4):
        model = from_proto(small_model())
        model.graph.doc_string, model.graph.meta[saving.EXTERNAL] = str(np.float32(turn)), True
        model.graph.register_initializer(ir.Value(name="big", const_value=ir.Tensor(np.full(2000, turn, np.float32))))
        save(model, path, force=True)
        assert sorted(f.name for f in tmp_path.iterdir()) == ["m.onnx", f"m.onnx{'.1' * (turn % 2)}.data"]
    assert all(whole for whole, _ in seen)
    assert {value for _, value in seen} == {0.0, 1.0, 2.0, 3.0}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_weight_that_fails_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def fail() -> ir.Tensor[Any]:
        raise error

    for outside in (False, True):
        model = megabytes(1)
        model.graph.meta[saving.EXTERNAL] = outside
        weight = ir.LazyTensor(fail, ir.DataType.FLOAT, ir.Shape([1 << 18]), name="bad")
        model.graph.register_initializer(ir.Value(name="bad", const_value=weight))
        with pytest.raises(error):
            save(model, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_a_weight_of_another_size_than_announced_is_a_defect(tmp_path: Path) -> None:
    model = megabytes(0)
    weight = ir.LazyTensor(lambda: ir.Tensor(np.zeros(3, np.float32)), ir.DataType.FLOAT, ir.Shape([4]), name="w")
    model.graph.register_initializer(ir.Value(name="w", const_value=weight))
    with pytest.raises(RuntimeError, match="weight w has 12 bytes, 16 were announced"):
        save(model, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    model = from_proto(small_model())
    with pytest.raises(UsageError, match="a folder; name a file in it"):
        save(model, tmp_path, force=True)
    with pytest.raises(InputError, match=r"nowhere/m.onnx: can't be written \(No such file or directory\); choose another folder"):
        save(model, tmp_path / "nowhere" / "m.onnx")


def test_a_link_is_followed_and_the_mask_obeyed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link.onnx").symlink_to(tmp_path / "real" / "m.onnx")
    mask = os.umask(0o027)
    try:
        save(from_proto(small_model()), tmp_path / "link.onnx")
    finally:
        os.umask(mask)
    assert (tmp_path / "link.onnx").is_symlink()
    assert stat.S_IMODE((tmp_path / "real" / "m.onnx").stat().st_mode) == 0o640
    assert load(tmp_path / "link.onnx").graph.initializers.keys() == from_proto(small_model()).graph.initializers.keys()


@pytest.mark.slow
def test_what_onnx_tests_its_operators_with_is_read() -> None:
    """No node of ONNX's own tests is refused as invalid."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        cases = collect_testcases(None)
    models = {case.name: case.model for case in cases if case.model is not None}
    for model in models.values():
        from_proto(model)
    assert len(models) > 1000
