"""Samples: every kind of source, every refusal, streaming, re-iteration, the held-out share."""

from __future__ import annotations

import gc
import itertools
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_lowrank.data import Source, held_out, open_source, split
from onnx_lowrank.errors import DataError, SettingsError
from onnx_lowrank.inputs import InputSpec

IMAGE = InputSpec("image", np.dtype(np.float32), ("n", 3, "h", "w"))
IDS = InputSpec("ids", np.dtype(np.int64), (None, "seq"))
TEXT = InputSpec("text", np.dtype(object), ("n",))
X = np.random.default_rng(0).standard_normal((5, 3, 4, 4)).astype(np.float32)
I = np.arange(10).reshape(5, 2)  # noqa: E741
LOADER = """
import numpy as np
def samples():
    for i in range(3):
        yield {"image": np.full((1, 3, 2, 2), i, np.float32)}
class Reader:
    def __init__(self): self.feeds = samples()
    def get_next(self): return next(self.feeds, None)
def reader(): return Reader()
def broken():
    yield next(samples())
    raise ValueError("no disk\\nleft")
def one(): return next(samples())
def empty(): return []
"""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def rows(source: Source, name: str = "image") -> Any:
    """All samples of an input, after checking that a second iteration gives the same."""
    first, again = list(source), list(source)
    np.testing.assert_equal(again, first)
    return np.concatenate([sample[name] for sample in first])


def message(data: Any, *specs: InputSpec, error: type[Exception] = DataError, **options: Any) -> str:
    """The one line with which the data is refused."""
    with pytest.raises(error) as caught:
        list(open_source(specs or (IMAGE,), data, **options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def opening(data: Any, *specs: InputSpec) -> str:
    """The one line with which the data is refused before any sample is read."""
    with pytest.raises(DataError) as caught:
        open_source(specs or (IMAGE,), data)
    return str(caught.value)


def test_an_input_reads_as_its_name_dtype_and_shape() -> None:
    assert str(IMAGE) == "image (float32, n×3×h×w)"
    assert str(IDS) == "ids (int64, ?×seq)"
    assert str(InputSpec("sr", np.dtype(np.int64), ())) == "sr (int64, scalar)"


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_gives_one_row_a_sample_with_the_batch_axis_kept(save: Callable[..., None]) -> None:
    save("x.npz", image=X, ids=np.asfortranarray(I))
    source = open_source([IMAGE, IDS], "x.npz")
    np.testing.assert_array_equal(rows(source), X)
    np.testing.assert_array_equal(rows(source, "ids"), I)
    assert (source.description, source.synthetic) == ("x.npz", False)


def test_an_array_with_one_axis_more_holds_whole_inputs() -> None:
    state, rate = InputSpec("state", np.dtype(np.float32), (2, "n", 4)), InputSpec("sr", np.dtype(np.int64), ())
    np.savez("x.npz", state=np.ones((5, 2, 1, 4), np.float32), sr=np.arange(5))
    samples = list(open_source([state, rate], "x.npz"))
    assert samples[3]["state"].shape == (2, 1, 4)
    assert [int(sample["sr"]) for sample in samples] == [0, 1, 2, 3, 4]


def test_a_fixed_batch_takes_so_many_rows_a_sample() -> None:
    fixed = InputSpec("image", np.dtype(np.float32), (2, 3, 4, 4))
    np.save("x.npy", X[:4])
    np.save("odd.npy", X)
    assert [sample["image"].shape for sample in open_source([fixed], "x.npy")] == [(2, 3, 4, 4)] * 2
    assert "has 5 rows, the model takes 2 at a time" in opening("odd.npy", fixed)


def test_a_folder_of_npz_files_is_read_in_the_order_of_names() -> None:
    Path("d").mkdir()
    np.savez("d/b.npz", image=X[2:])
    np.savez("d/a.npz", image=X[:2])
    np.testing.assert_array_equal(rows(open_source([IMAGE], Path("d"))), X)


def test_a_folder_of_npy_files_serves_a_model_with_one_input() -> None:
    Path("d").mkdir()
    np.save("d/b.npy", X[2:])
    np.save("d/a.npy", X[:2])
    np.testing.assert_array_equal(rows(open_source([IMAGE], ["d"])), X)
    assert "which input is it?" in opening("d", IMAGE, IDS)


def test_npy_files_are_given_input_by_input_even_when_the_name_has_a_colon() -> None:
    np.save("x.npy", X)
    np.save("i.npy", I)
    scoped = InputSpec("ids:0", IDS.dtype, IDS.shape)
    source = open_source([IMAGE, scoped], ["image:x.npy", "ids:0:i.npy"])
    np.testing.assert_array_equal(rows(source), X)
    np.testing.assert_array_equal(rows(source, "ids:0"), I)


def test_a_plain_npy_serves_a_model_with_one_input() -> None:
    np.save("x.npy", X)
    np.testing.assert_array_equal(rows(open_source([IMAGE], "x.npy")), X)


@pytest.mark.parametrize("name", ["samples", "reader"])
def test_a_loader_is_called_anew_for_every_iteration(name: str) -> None:
    Path("loader.py").write_text(LOADER)
    assert rows(open_source([IMAGE], [f"loader.py:{name}"]))[:, 0, 0, 0].tolist() == [0, 1, 2]


def test_a_list_of_dicts_is_read_as_it_is() -> None:
    np.testing.assert_array_equal(rows(open_source([IMAGE], [{"image": x[None]} for x in X])), X)


def test_a_function_that_returns_an_iterable_is_called_anew() -> None:
    np.testing.assert_array_equal(rows(open_source([IMAGE], lambda: ({"image": x[None]} for x in X))), X)


def test_a_generator_is_spooled_so_that_it_can_be_read_again() -> None:
    source = open_source([IMAGE], ({"image": x[None]} for x in X))
    np.testing.assert_array_equal(next(iter(source))["image"], X[:1])
    np.testing.assert_array_equal(rows(source), X)
    for one, other in zip(source, source, strict=True):
        np.testing.assert_array_equal(one["image"], other["image"])


def test_a_calibration_data_reader_is_spooled() -> None:
    class Reader:
        feeds = iter([{"image": x[None]} for x in X])

        def get_next(self) -> Any:
            return next(self.feeds, None)

    np.testing.assert_array_equal(rows(open_source([IMAGE], Reader())), X)  # type: ignore[arg-type]


def test_strings_pass_in_dicts_in_files_and_through_the_spool() -> None:
    words = np.array(["a", "böse"], dtype=object)
    np.savez("x.npz", text=words.astype(str))
    for data in ["x.npz", [{"text": words[:1]}, {"text": words[1:]}], iter([{"text": words}])]:
        source = open_source([TEXT], data)  # type: ignore[arg-type]
        assert rows(source, "text").tolist() == words.tolist()
        assert next(iter(source))["text"].dtype == object


@pytest.mark.parametrize("kind", ["npz", "list", "generator"])
def test_the_limit_holds(kind: str) -> None:
    feeds = [{"image": x[None]} for x in X]
    np.savez("x.npz", image=X)
    data: Any = {"npz": "x.npz", "list": feeds, "generator": iter(feeds)}[kind]
    np.testing.assert_array_equal(rows(open_source([IMAGE], data, limit=3)), X[:3])


def test_unknown_and_missing_names_are_refused_with_a_suggestion() -> None:
    np.savez("x.npz", imgae=X)
    assert opening("x.npz") == (
        "x.npz: 'imgae' is not an input of the model; its inputs are image (float32, n×3×h×w); did you mean 'image'?"
    )
    np.savez("y.npz", image=X)
    assert "y.npz: input 'ids' is missing" in opening("y.npz", IMAGE, IDS)
    np.save("x.npy", X)
    assert "'imag' is not an input" in opening("imag:x.npy")
    assert "data, sample 0: 'x' is not an input" in message([{"x": X}])


def test_another_dtype_is_refused_with_the_conversion() -> None:
    np.savez("x.npz", image=X.astype(np.float64))
    assert "input 'image' is float64" in opening("x.npz")
    assert ".astype('float32')" in opening("x.npz")
    assert ".astype(object)" in message([{"text": np.zeros(1)}], TEXT)


def test_another_rank_or_fixed_dim_is_refused() -> None:
    np.savez("x.npz", image=X[:, 0, 0])
    np.savez("y.npz", image=X[:, :2])
    assert "has 2 axes" in opening("x.npz")
    assert "has shape (1, 2, 4, 4) in one sample" in opening("y.npz")
    assert "sample 1: input 'image' has shape (3, 4, 4)" in message([{"image": X}, {"image": X[0]}])


def test_different_numbers_of_samples_are_refused() -> None:
    np.savez("x.npz", image=X, ids=I[:4])
    assert "different numbers of samples (image 5, ids 4)" in opening("x.npz", IMAGE, IDS)


def test_zero_samples_are_refused() -> None:
    np.savez("x.npz", image=X[:0])
    assert "x.npz: no samples" in opening("x.npz")
    Path("loader.py").write_text(LOADER)
    assert "loader.py:empty: no samples" in message("loader.py:empty")
    assert "no samples" in message([])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused_with_file_input_and_sample(bad: float) -> None:
    values = X.copy()
    values[3, 1, 2, 2] = bad
    np.savez("x.npz", image=values)
    assert "x.npz, sample 3: input 'image' holds NaN or Inf" in message("x.npz")


def test_a_fault_in_a_spooled_stream_is_not_forgotten() -> None:
    source = open_source([IMAGE], iter([{"image": X}, {"image": X * np.float32(np.nan)}, {"image": X}]))
    for _ in range(2):
        with pytest.raises(DataError, match=r"sample 1: .* NaN"):
            list(source)


def test_a_missing_file_and_an_unsupported_suffix_are_refused() -> None:
    Path("x.csv").write_text("1")
    Path("d").mkdir()
    assert "nope.npz: no such file" in opening("nope.npz")
    assert "nope.npy: no such file" in opening("image:nope.npy")
    assert "nope.py: no such file" in opening("nope.py:f")
    assert "unsupported file type '.csv'" in opening("x.csv")
    assert "d: the folder holds no .npz" in opening("d")
    np.save("d/x.npy", X)
    np.savez("d/x.npz", image=X)
    assert "holds both" in opening("d")


def test_a_mix_of_kinds_is_refused() -> None:
    np.save("x.npy", X)
    Path("loader.py").write_text(LOADER)
    assert "not a mix" in opening(["image:x.npy", "x.npy"])
    assert "give it alone" in opening(["loader.py:samples", "x.npy"])


def test_a_damaged_file_is_refused() -> None:
    np.savez("x.npz", image=X)
    np.save("x.npy", X)
    whole = Path("x.npz").read_bytes()
    Path("cut.npz").write_bytes(whole[:200])
    Path("flipped.npz").write_bytes(whole[:400] + bytes([whole[400] ^ 255]) + whole[401:])
    Path("cut.npy").write_bytes(Path("x.npy").read_bytes()[:-8])
    Path("text.npy").write_text("hello, this is no array")
    for name in ["cut.npz", "cut.npy", "text.npy"]:
        assert f"{name}: cannot be read" in opening(name)
    assert "flipped.npz: cannot be read" in message("flipped.npz")


def test_pickled_object_arrays_are_refused() -> None:
    np.savez("x.npz", image=np.array([{}], dtype=object))
    np.save("x.npy", np.array([{}], dtype=object), allow_pickle=True)
    assert "pickled object array" in opening("x.npz")
    assert "pickled object array" in opening("x.npy")


def test_a_fault_in_a_loader_names_its_line() -> None:
    Path("loader.py").write_text(LOADER)
    assert "loader.py:12: ValueError: no disk left" in message("loader.py:broken")
    assert "is a dict; give dicts" in message("loader.py:one")
    Path("bad.py").write_text("import nothing_of_that_name\n")
    assert "bad.py:1: ModuleNotFoundError" in opening("bad.py:f")
    Path("worse.py").write_text("\ndef f(:\n")
    assert "worse.py:2: SyntaxError" in opening("worse.py:f")


def test_a_missing_function_gets_a_suggestion() -> None:
    Path("loader.py").write_text(LOADER)
    assert "has no function 'sampels'" in opening("loader.py:sampels")
    assert "did you mean 'samples'?" in opening("loader.py:sampels")


def test_data_that_is_not_samples_is_refused() -> None:
    assert "is a dict" in message({"image": X})
    assert "is a ndarray" in message(X)
    assert "is a int" in message(3)
    assert "sample 0: is a ndarray" in message([X])
    assert "input 'image' is a list; give a numpy array" in message([{"image": X.tolist()}])


def test_shapes_are_refused_along_with_data() -> None:
    text = message([{"image": X}], error=SettingsError, shapes={"image": (1, 3, 4, 4)})
    assert "--shape only shapes synthetic inputs" in text


def peak(data: Any) -> int:
    source = open_source([IMAGE], data)
    tracemalloc.start()
    for _ in source:
        pass
    used = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return used


def feeds(count: int) -> Iterator[dict[str, Any]]:
    return ({"image": np.ones((1, 3, 64, 64), np.float32)} for _ in range(count))


def test_peak_memory_does_not_grow_with_the_number_of_samples() -> None:
    for count in (20, 200):
        np.savez_compressed(f"{count}.npz", image=np.ones((count, 3, 64, 64), np.float32))
    peak("20.npz")
    assert peak("200.npz") < peak("20.npz") + 200_000  # four samples; growth would show as 180
    assert peak(feeds(200)) < peak(feeds(20)) + 200_000


def test_temporary_files_go_with_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    np.savez("x.npz", image=X)
    for data in ("x.npz", feeds(3)):
        source = open_source([IMAGE], data)
        views = split(source)
        del source
        assert len(list(views[0])) > 1
        assert list((tmp_path / "tmp").iterdir())
        del views
        gc.collect()
        assert not list((tmp_path / "tmp").iterdir())
    source = open_source([IMAGE], "x.npz")
    source.close()
    assert not list((tmp_path / "tmp").iterdir())


@given(count=st.integers(2, 40))
def test_calibration_and_held_out_are_disjoint_and_complete(count: int) -> None:
    def numbers(source: Source) -> list[int]:
        return [int(sample["ids"][0, 0]) for sample in source]

    data = [{"ids": np.array([[i]])} for i in range(count)]
    calibration, apart, shared = split(open_source([IDS], data))
    assert not shared
    if count < 4:
        assert numbers(apart) == [count - 1]
    for start in range(0, count - 3, 4):
        assert sum(start <= number < start + 4 for number in numbers(apart)) == 1
    assert sorted(numbers(calibration) + numbers(apart)) == list(range(count))
    assert numbers(calibration) == numbers(calibration)


def test_what_alternates_is_held_out_of_every_sort() -> None:
    apart = [index for index in range(64) if held_out(index)]
    assert [sum(index % 2 == phase for index in apart) for phase in range(2)] == [8, 8]
    assert [sum(index % 4 == phase for index in apart) for phase in range(4)] == [4, 4, 4, 4]
    assert [sum(index // 4 == four for index in apart) for four in range(16)] == [1] * 16


def test_a_single_sample_serves_both_and_says_so() -> None:
    calibration, apart, shared = split(open_source([IDS], [{"ids": np.array([[7]])}]))
    assert shared
    assert len(list(calibration)) == len(list(apart)) == 1


def test_splitting_reads_at_most_four_samples() -> None:
    endless = ({"ids": np.array([[i]])} for i in itertools.count())
    calibration, _, _ = split(open_source([IDS], endless, limit=1 << 40))
    assert int(next(iter(calibration))["ids"][0, 0]) == 0
    assert int(next(endless)["ids"][0, 0]) == 4
