"""The zoo's catalogue: pinned entries, a fetch that trusts nothing, inputs of the right shapes. No network."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnx_lowrank.errors import ModelError, RuntimeMissing, SettingsError
from onnx_lowrank.models import CATALOGUE, Entry, find, get, inputs, packages, photos, speech
from onnx_lowrank.models import catalogue as catalogue_module

MODEL = b"an ONNX file"
MEMBER = "fake/model.onnx"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def two_samples(_model: Path, *, count: int = 2, fresh: bool = False) -> inputs.Inputs:
    del fresh
    return {"x": np.arange(3 * count, dtype=np.float32).reshape(count, 3)}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Entry:
    """A catalogue of one model, in a wheel that `pip` finds on this disk."""
    wheel = tmp_path / "index" / "fake-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(MEMBER, MODEL)
        archive.writestr("fake/evil.py", "raise SystemExit")
    hashes = sha256(wheel.read_bytes()), sha256(MODEL)
    entry = Entry("tiny", "fake", "1.0", hashes[0], MEMBER, hashes[1], "a fake", "none", two_samples, pictures=False)

    def copy(asked: packages.Wheel, folder: Path) -> Path:
        assert asked.requirement == "fake==1.0"
        return _copy(wheel, folder)

    monkeypatch.setattr(packages, "pip_download", copy)
    monkeypatch.setattr(catalogue_module, "CATALOGUE", (entry,))
    return entry


def _copy(wheel: Path, folder: Path) -> Path:
    target = folder / wheel.name
    target.write_bytes(wheel.read_bytes())
    return target


def replace(monkeypatch: pytest.MonkeyPatch, entry: Entry, **changes: Any) -> None:
    monkeypatch.setattr(catalogue_module, "CATALOGUE", (dataclasses.replace(entry, **changes),))


# --- the catalogue


def test_names_are_unique_and_usable_as_file_names() -> None:
    names = [entry.name for entry in CATALOGUE]
    assert len(set(names)) == len(names) == 13
    assert all(re.fullmatch(r"[a-z0-9_-]+", name) for name in names)


@pytest.mark.parametrize("entry", CATALOGUE, ids=lambda entry: entry.name)
def test_every_entry_is_pinned(entry: Entry) -> None:
    assert re.fullmatch(r"[0-9a-f]{64}", entry.wheel_sha256)
    assert re.fullmatch(r"[0-9a-f]{64}", entry.sha256)
    assert re.fullmatch(r"\d+(\.\d+)+", entry.version)
    assert entry.member.endswith(".onnx")
    assert entry.description
    assert entry.task


def test_a_package_has_one_version_and_one_hash() -> None:
    wheels = {entry.package: entry.wheel for entry in CATALOGUE}
    assert all(entry.wheel == wheels[entry.package] for entry in CATALOGUE)


def test_every_model_is_another_file() -> None:
    assert len({entry.sha256 for entry in CATALOGUE}) == len(CATALOGUE)


@pytest.mark.parametrize("entry", [e for e in CATALOGUE if e.package == "silero-vad"], ids=lambda e: e.name)
def test_synthetic_inputs_are_called_synthetic(entry: Entry) -> None:
    assert "synthetic speech-like signal" in entry.description


@pytest.mark.parametrize(("typo", "meant"), [("vgg-16", "vgg16"), ("ppocr_rec", "ppocr-rec"), ("Magika", "magika")])
def test_a_typo_names_the_nearest_model(typo: str, meant: str) -> None:
    with pytest.raises(SettingsError, match=f"did you mean '{meant}'"):
        find(typo)


@pytest.mark.usefixtures("fake")
def test_an_unknown_name_downloads_nothing(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="the zoo has no model 'nonsense'"):
        get("nonsense", tmp_path / "zoo")
    assert not (tmp_path / "zoo").exists()


def test_it_is_no_top_level_module() -> None:
    root = Path(packages.__file__).resolve().parent.parent
    run = subprocess.run([sys.executable, "-c", "import models"], cwd=root, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "import onnx_lowrank.models" in run.stderr


# --- get


@pytest.mark.usefixtures("fake")
def test_a_model_and_its_inputs_are_written(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    fetched = get("tiny", tmp_path / "deep" / "zoo", progress=lambda *step: seen.append(step))
    assert fetched.model.read_bytes() == MODEL
    np.testing.assert_array_equal(np.load(fetched.inputs)["x"], two_samples(fetched.model)["x"])
    assert sorted(path.name for path in fetched.model.parent.iterdir()) == ["tiny.npz", "tiny.onnx"]
    assert seen == [("get tiny", done, 2) for done in range(3)]


@pytest.mark.usefixtures("fake")
def test_what_is_there_is_not_downloaded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = get("tiny", tmp_path)
    before = first.inputs.stat().st_mtime_ns
    monkeypatch.setattr(packages, "pip_download", None)
    assert get("tiny", str(tmp_path)) == first
    assert first.inputs.stat().st_mtime_ns == before


@pytest.mark.usefixtures("fake")
def test_missing_inputs_alone_are_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    get("tiny", tmp_path).inputs.unlink()
    monkeypatch.setattr(packages, "pip_download", None)
    assert get("tiny", tmp_path).inputs.exists()


@pytest.mark.usefixtures("fake")
def test_as_many_samples_are_made_as_asked_for_and_none_are_replaced(tmp_path: Path) -> None:
    assert np.load(get("tiny", tmp_path, samples=5).inputs)["x"].shape == (5, 3)
    with pytest.raises(SettingsError, match=r"tiny.npz' exists; move it away to make 7 samples"):
        get("tiny", tmp_path, samples=7)
    assert np.load(get("tiny", tmp_path).inputs)["x"].shape == (5, 3)


@pytest.mark.parametrize("field", ["wheel_sha256", "sha256"])
def test_a_wrong_hash_is_refused_and_leaves_nothing(
    field: str, fake: Entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace(monkeypatch, fake, **{field: "0" * 64})
    with pytest.raises(ModelError, match="the catalogue pins 000000000000…; it is not used") as caught:
        get("tiny", tmp_path / "zoo")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "zoo").exists()


def test_a_wheel_without_the_model_is_refused(fake: Entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace(monkeypatch, fake, member="fake/other.onnx")
    with pytest.raises(ModelError, match=r"cannot read 'fake/other\.onnx'"):
        get("tiny", tmp_path / "zoo")


@pytest.mark.usefixtures("fake")
def test_another_file_of_that_name_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "tiny.onnx").write_bytes(b"mine")
    with pytest.raises(SettingsError, match="is not the zoo's tiny; move it away"):
        get("tiny", tmp_path)
    assert (tmp_path / "tiny.onnx").read_bytes() == b"mine"


def test_pips_failure_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        return subprocess.CompletedProcess(command, 1, "", "WARNING: slow\nERROR: No matching distribution\n\n")

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(ModelError, match=r"^pip cannot download magika==1\.0\.3: No matching distribution$"):
        get("magika", tmp_path)
    assert not list(tmp_path.iterdir())


def test_without_pillow_nothing_is_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setattr(packages, "pip_download", None)
    with pytest.raises(RuntimeMissing, match=r"pip install 'onnx-lowrank\[zoo\]'"):
        get("vgg16", tmp_path)


# --- inputs that need no download


@pytest.mark.parametrize(
    ("maker", "name", "shape", "dtype"),
    [
        (inputs.text_lines, "x", (4, 3, 48, 320), "float32"),
        (inputs.turned_lines, "x", (4, 3, 48, 192), "float32"),
        (inputs.captchas, "input1", (4, 1, 64, 176), "float32"),
        (inputs.files, "bytes", (4, 2048), "int32"),
    ],
)
def test_inputs_have_the_models_shape(maker: Any, name: str, shape: tuple[int, ...], dtype: str) -> None:
    made = maker(Path("unused"), count=4)
    assert list(made) == [name]
    assert (made[name].shape, str(made[name].dtype)) == (shape, dtype)
    assert len({row.tobytes() for row in made[name]}) == 4
    np.testing.assert_array_equal(made[name], maker(Path("unused"), count=4)[name])


def test_pictures_stay_in_range(monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)
    monkeypatch.setattr(photos, "photographs", lambda: (Image.fromarray(noise),) * 2)
    monkeypatch.setattr(photos, "backgrounds", photos.photographs)
    crops = inputs.photo_crops(Path("unused"), count=3, side=24)["input"]
    assert (crops.shape, str(crops.dtype)) == ((3, 24, 24, 3), "float32")
    assert 0 <= crops.min() < crops.max() <= 1
    pages = inputs.pages(Path("unused"), count=2, side=160)["x"]
    assert (pages.shape, str(pages.dtype)) == ((2, 3, 160, 160), "float32")


def test_every_picture_is_used_equally_often() -> None:
    from PIL import Image

    plain = [Image.new("RGB", (20, 20), (200 * k, 0, 0)) for k in range(2)]
    made = photos.crops(np.random.default_rng(0), plain, 8, 4)
    assert sorted(made[:, 0, 0, 0] > 0) == [False] * 4 + [True] * 4


def test_the_signal_is_speech_like_in_loudness_and_pauses() -> None:
    signal = speech.speech_like(np.random.default_rng(0), 10)
    assert (signal.shape, str(signal.dtype)) == ((160000,), "float32")
    frames = speech.windows(signal)
    assert frames.shape == (312, 576)
    np.testing.assert_array_equal(frames[1][:64], frames[0][-64:])
    loud = np.sqrt((frames**2).mean(1))
    assert loud.max() < 1
    assert 0.1 < (loud < 0.04).mean() < 0.9


def test_padding_of_a_short_file_is_256(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    short = tmp_path / "a.txt"
    short.write_bytes(b"  words  ")
    monkeypatch.setattr(inputs, "_library_files", lambda count, _fresh: [short] * count)
    row = inputs.files(Path("unused"), count=1)["bytes"][0]
    assert bytes(row[:7].tolist()) == b"words  "
    assert bytes(row[-7:].tolist()) == b"  words"
    assert (row[7:-7] == 256).all()


@pytest.mark.parametrize("maker", [inputs.photo_crops, inputs.text_lines, inputs.captchas, inputs.files])
def test_fresh_samples_are_others_of_the_same_sort(maker: Any) -> None:
    (old,), (new,) = (maker(Path("model.onnx"), count=4, fresh=fresh).values() for fresh in (False, True))
    assert old.shape == new.shape
    assert all((a != b).any() for a in old for b in new)
