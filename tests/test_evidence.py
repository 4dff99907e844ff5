"""How much a fit stands on: positions, the effective rank of their second moment, patches; and who is told."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from onnx_lowrank.evidence import ERRORS, FEW, Evidence, ranks_within
from onnx_lowrank.linalg import Factorization, effective_rank
from onnx_lowrank.outcome import thin_evidence
from onnx_lowrank.patches import enough
from onnx_lowrank.run import Clock, start
from onnx_lowrank.settings import Settings


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_equal_directions_count_as_many_as_they_are(rank: int) -> None:
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((8, 8)))[0][:, :rank]
    assert effective_rank(5.0 * basis @ basis.T) == pytest.approx(rank)


def test_unequal_directions_count_between_one_and_all() -> None:
    assert effective_rank(np.diag([0.5, 0.25, 0.25])) == pytest.approx(2**1.5)
    assert effective_rank(np.diag([1.0, 1e-9, 0.0])) == pytest.approx(1, abs=1e-6)
    assert effective_rank(np.zeros((3, 3))) == 0


def test_few_is_said_of_the_worst_site() -> None:
    known = {"a": Evidence(40, 10, 9.0), "b": Evidence(39, 10, 9.0), "c": Evidence(5, 20, 4.0)}
    (said,) = thin_evidence(known)
    assert said.startswith(f"2 of 3 rewritten sites were fitted to fewer than {FEW} positions")
    assert "(c: 5 for 20)" in said
    assert thin_evidence({"a": known["a"]}) == thin_evidence({}) == []


def test_ranks_of_a_known_spectrum() -> None:
    """It leaves 1, .3, .05, .005, .0005 and nothing: within a tenth from rank 2 on, a hundredth 3, a thousandth 4."""
    values = np.array([0.7, 0.25, 0.045, 0.0045, 0.0005])
    assert ranks_within(Factorization(np.eye(5), values, 1.0)) == (2, 3, 4)
    assert ranks_within(Factorization(np.eye(5), 0 * values, 0.0)) == (0, 0, 0)


def test_a_run_counts_what_it_saw(tmp_path: Path) -> None:
    """A convolution with a grouped one behind it: pixels of the outputs, patches, the widths of single groups."""
    rng = np.random.default_rng(0)
    weights = {"a": (8, 4, 3, 3), "b": (8, 4, 3, 3)}
    nodes = [
        helper.make_node("Conv", ["x", "a"], ["t"], name="one", pads=[1] * 4),
        helper.make_node("Relu", ["t"], ["u"]),
        helper.make_node("Conv", ["u", "b"], ["y"], name="two", group=2),
    ]
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("x", 1, [1, 4, 10, 10])], [helper.make_tensor_value_info("y", 1, None)],
        [numpy_helper.from_array(rng.standard_normal(s).astype(np.float32), n) for n, s in weights.items()],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx")
    data = [{"x": rng.standard_normal((1, 4, 10, 10)).astype(np.float32)} for _ in range(10)]
    run = start(tmp_path / "m.onnx", data, Settings(cache=tmp_path), Clock(lambda *_: None))
    count = sum(1 for _ in run.loaded.calibration)
    one, two = (run.fits[name].evidence for name in ("one", "two"))
    assert one is not None
    assert two is not None
    assert (one.positions, one.width, one.few) == (100 * count, 8, False)
    geometry = next(site.geometry for site in run.loaded.sites if site.name == "one")
    assert one.patches == min(enough(geometry, count), 100) * count
    assert (two.positions, two.width, two.patches) == (64 * count, 4, 0)
    assert 1 < one.effective_rank <= 8
    spectrum = run.fits["one"].factorization
    for error, rank in zip(ERRORS, one.ranks, strict=True):
        assert spectrum.relative(rank) <= error < spectrum.relative(rank - 1)
    assert 1 < two.effective_rank <= 4
    assert dataclasses.replace(one, positions=31).few
