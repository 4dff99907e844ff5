"""What the runtime's own profile says of the sites, and how it corrects the tables."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

from onnx_lowrank.allocate import Candidate, Choices
from onnx_lowrank.insitu import by_site, corrected, dense_shares, factors, pace, tails
from onnx_lowrank.plan import Decision
from onnx_lowrank.prepare import load
from onnx_lowrank.settings import Settings

MODEL = """<ir_version: 8, opset_import: ["" : 17]>
g (float[n, 32] x) => (float[n, 32] y) <float[1] c = {0}> {
    t = MatMul(x, a)
    u = Relu(t)
    y = MatMul(u, b)
}"""


def choices(node: str) -> Choices:
    candidates = (Candidate("svd", 8, 0.1, 2.0, 0.1), Candidate("svd", 16, 0.01, 8.0, 0.01))
    return Choices(Decision(node, "MatMul", (32, 32), ms_before=10.0), candidates, candidates)


def test_a_corrected_prediction_is_what_the_race_measured() -> None:
    """40 of 50 ms are the site's, of which 3 of 13 are left."""
    decision = choices("a").become(choices("a").candidates[0])
    race = {"before": 50.0, "after": 13.0}
    (found,) = corrected([choices("a")], factors((decision,), {"a": 40.0}, {"a": 3.0}))
    saved = (found.dense.ms_before or 0.0) - found.candidates[0].ms
    assert race["before"] - saved == pytest.approx(race["after"])


def test_the_pace_is_that_of_all_sites_that_both_know() -> None:
    decisions = [choices("a").become(choices("a").candidates[0]), choices("b").dense, choices("unseen").dense]
    assert pace(decisions, {"a": 12.0, "b": 18.0, "other": 70.0}) == pytest.approx(1.5)
    assert pace(decisions, {}) == 1.0


def test_a_node_belongs_to_the_site_whose_name_it_starts_with(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    model = onnx.parser.parse_model(MODEL)
    rng = np.random.default_rng(0)
    for name in "ab":
        model.graph.initializer.append(
            onnx.numpy_helper.from_array(rng.standard_normal((32, 32)).astype(np.float32), name)
        )
    model.graph.node[0].name, model.graph.node[2].name = "block", "block/inner"
    onnx.save(model, path)
    settings = Settings(cache=tmp_path)
    data = [{"x": rng.standard_normal((8192, 32)).astype(np.float32)} for _ in range(4)]  # many whole microseconds
    loaded = load(path, data, settings, lambda *_: None)
    known = dense_shares(loaded, settings)
    assert set(known) == {"block", "block/inner"}
    assert all(share > 0 for share in known.values())
    assert sum(known.values()) < 1  # the Relu takes some too
    named = {"block/dense": 1.0, "block/inner/dense": 2.0, "block/inner/bias": 0.5, "other": 9.0}
    assert by_site(named, loaded.sites, {}) == {"block": 1.0, "block/inner": 2.5}
    assert tails(loaded) == {"t": "block", "u": "block", "y": "block/inner"}
    assert by_site({"u_nchwc": 4.0}, loaded.sites, tails(loaded)) == {"block": 4.0}


def test_what_a_rewrite_costs_elsewhere_counts_for_every_candidate_of_its_site() -> None:
    found, untouched = corrected([choices("a"), choices("b")], {}, {"a": 2.5})
    assert found.dense.ms_before == 10.0
    assert [c.ms for c in found.candidates] == [4.5]  # the slower one would take longer than the dense weight
    assert [c.ms for c in found.timed] == [4.5, 10.5]
    assert untouched == choices("b")
    (both,) = corrected([choices("a")], {"a": (2.0, 1.5)}, {"a": 1.0})
    assert [c.ms for c in both.candidates] == pytest.approx([4.0, 13.0])


def test_the_profile_scales_what_it_shows() -> None:
    decisions = (choices("a").become(choices("a").candidates[0]), choices("b").stay())
    known = factors(decisions, {"a": 20.0, "b": 5.0}, {"a": 3.0, "b": 5.0})
    assert list(known) == ["a"]
    assert known["a"] == pytest.approx((2.0, 1.5))
    found, untouched = corrected([choices("a"), choices("b")], known)
    assert found.dense.ms_before == pytest.approx(20.0)
    assert [c.ms for c in found.candidates] == pytest.approx([3.0, 12.0])
    assert untouched == choices("b")


def test_what_is_not_faster_in_the_model_is_no_candidate() -> None:
    (found,) = corrected([choices("a")], {"a": (0.5, 1.0)})
    assert [c.rank for c in found.candidates] == [8]
    assert [c.rank for c in found.timed] == [8, 16]


def test_a_site_that_the_profile_does_not_show_is_left_out() -> None:
    decision = choices("a").become(choices("a").candidates[0])
    assert factors((decision,), {}, {"a": 1.0}) == {}
