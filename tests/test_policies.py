"""Baselines: what each of them looks at, on small tables."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg

from onnx_lowrank.allocate import Candidate, Choices
from onnx_lowrank.linalg import Array, evb_rank
from onnx_lowrank.plan import Decision
from onnx_lowrank.policies import POLICIES
from onnx_lowrank.settings import POLICY_NAMES
from onnx_lowrank.sites import Why

RANKS = (8, 16, 24, 32, 40, 48)


def choice(name: str, errors: dict[int, float], slope: float = 1.0, blocked: bool = True) -> Choices:
    """A 128×128 site; ranks off the multiples of 16 are slow when `blocked`."""
    timed = []
    for rank, error in errors.items():
        ms = (rank if rank % 16 == 0 or not blocked else rank + 24) / 64
        timed.append(Candidate("svd", rank, error, ms, slope * error, macs=rank * 2560, weights=rank * 256))
    faster = tuple(k for k in timed if k.ms < 1 and k.rank % 16 == 0)
    dense = Decision(name, "MatMul", (128, 128), ms_before=1.0)
    return Choices(dense, faster, tuple(timed), macs=163840, weights=16384)


FLAT = {rank: 0.5 - rank / 100 for rank in RANKS}
STEEP = {rank: 0.5 ** (rank / 4) for rank in RANKS}
SITES = [choice("flat", FLAT), choice("steep", STEEP)]


def spectra() -> dict[str, Array]:
    return {"flat": np.linspace(1.0, 0.5, 128), "steep": np.power(0.7, np.arange(128), dtype=np.float64)}


def test_every_name_is_a_policy() -> None:
    assert tuple(POLICIES) == POLICY_NAMES


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_plans_are_valid_and_go_from_mild_to_aggressive(name: str) -> None:
    plans = POLICIES[name](SITES, spectra)
    kinds = {(c.dense.node, k.kind, k.rank) for c in SITES for k in c.timed}
    assert plans
    for loss, decisions in plans:
        assert [d.node for d in decisions] == ["flat", "steep"]
        assert all((d.node, d.kind, d.rank) in kinds for d in decisions if d.kind)
        assert all(d.why is not None for d in decisions if not d.kind)
        assert loss == pytest.approx(sum(d.loss or 0.0 for d in decisions))
    if name not in ("staircase", "vbmf"):  # the seed's Algorithm 1 has no accuracy term
        assert [loss for loss, _ in plans] == sorted(loss for loss, _ in plans)


def ranks(name: str) -> list[tuple[int | None, int | None]]:
    return [(d[0].rank, d[1].rank) for _, d in POLICIES[name](SITES, spectra)]


def test_uniform_gives_all_sites_one_ratio() -> None:
    assert all(a == b for a, b in ranks("uniform"))


def test_energy_gives_the_flat_spectrum_more_rank() -> None:
    assert all(a is None or (b is not None and a >= b) for a, b in ranks("energy"))


def test_staircase_takes_the_rank_above_the_largest_drop() -> None:
    # At three quarters of the weights the window holds 32, 40 and 48: 0.5, 1.0 and 0.75 ms.
    assert (32, 32) in ranks("staircase")
    assert 40 not in {rank for pair in ranks("staircase") for rank in pair}


def test_staircase_keeps_dense_what_is_not_faster() -> None:
    slow = Choices(SITES[0].dense, (), tuple(k for k in SITES[0].timed if k.ms > 1.0), 163840, 16384)
    assert POLICIES["staircase"]([slow], spectra) == []


def test_knapsack_never_takes_what_is_not_faster() -> None:
    assert {rank for pair in ranks("knapsack") for rank in pair} <= {None, 16, 32, 48}


def test_flops_does_not_look_at_time() -> None:
    assert {8, 24, 40} & {rank for pair in ranks("flops") for rank in pair}


def test_a_site_with_a_reason_keeps_it() -> None:
    small = Choices(Decision("tiny", "MatMul", (2, 2)).keep(Why.TOO_SMALL), ())
    for name in POLICY_NAMES:
        for _, decisions in POLICIES[name]([*SITES, small], lambda: {**spectra(), "tiny": np.ones(2)}):
            assert decisions[2].why is Why.TOO_SMALL


@pytest.mark.parametrize("rank", [1, 5, 20])
def test_the_rank_of_a_low_rank_matrix_in_noise_is_found(rank: int) -> None:
    rng = np.random.default_rng(rank)
    signal = rng.standard_normal((100, rank)) @ rng.standard_normal((rank, 300))
    noisy = signal + 0.3 * rng.standard_normal((100, 300))
    assert evb_rank(scipy.linalg.svdvals(noisy), 300) == rank


def test_noise_has_rank_nothing() -> None:
    noise = np.random.default_rng(0).standard_normal((100, 300))
    assert evb_rank(scipy.linalg.svdvals(noise), 300) == 0
    assert evb_rank(np.zeros(5), 9) == 0
