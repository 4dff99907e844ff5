"""Narrower heads against factored queries, keys, values and outputs: figures for decision 078.

python tools/bench_heads.py MODEL.onnx SAMPLES.npz …

Head by head, scores `qᵀk` become `qᵀABᵀk` of a rank (SVD of `S_q^½ S_k^½`, keys centred, as a softmax does not see what
all have in common), and what the heads give is projected in the metric of the site that reads it, its mean kept in that
site's bias: the closed forms of MoDeGPT (arXiv 2408.09632, types II and III). Against them `pivot` on each of the same
sites, in the metric of attention (decision 018), at the same multiply-adds. Printed is the loss of the outputs on
held-out samples, all attentions rewritten at once.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import scipy.linalg

from onnx_lowrank.attention import Attention, attentions
from onnx_lowrank.calibration import fitted
from onnx_lowrank.graph import Graph
from onnx_lowrank.linalg import Array, Metric
from onnx_lowrank.moments import Moments
from onnx_lowrank.rewrite import dense_patch
from onnx_lowrank.run import Clock, Run, start
from onnx_lowrank.runtime import Session, with_outputs
from onnx_lowrank.settings import Settings
from onnx_lowrank.sites import Site

SHARES = (0.875, 0.75, 0.625, 0.5)
SAMPLES = 128
RIDGE = 1e-6

Weights = Mapping[str, tuple[Array, Array]]
"""Weight and bias by site."""


def loss(run: Run, weights: Weights) -> float:
    """Loss on held-out samples with some sites' weights replaced."""
    graph = Graph(run.loaded.file.model, run.loaded.file.folder)
    for site in run.loaded.sites:
        if site.name in weights:
            weight, bias = weights[site.name]
            graph.apply(dense_patch(dataclasses.replace(site, weight=weight, bias=bias), "bench"))
    return run.references.loss(Session(graph.commit(), threads=0, folder=run.loaded.file.folder)).value()


def by_head(run: Run, tensors: list[str], last: list[bool]) -> list[list[Moments]]:
    """Moments of tensors B×H×T×d (B×H×d×T where `last` is not set), head by head."""
    session = Session(with_outputs(run.loaded.file.model, tensors), threads=0, folder=run.loaded.file.folder)
    found: list[list[Moments]] = []
    count = sum(1 for _ in run.loaded.calibration)
    for sample in itertools.islice(run.loaded.calibration, 0, None, max(count // SAMPLES, 1)):
        values = session.run(sample, tensors)
        values = [x if plain else x.swapaxes(-1, -2) for x, plain in zip(values, last, strict=True)]
        found = found or [[Moments(x.shape[3]) for _ in range(x.shape[1])] for x in values]
        for x, moments in zip(values, found, strict=True):
            for head, one in enumerate(moments):
                one.add(x[:, head].reshape(-1, x.shape[3]))
    return found


def scores(query: Moments, key: Moments, rank: int) -> Array:
    """What a head's queries are multiplied by, d×d of a rank."""
    q, k = Metric.of(query.second, RIDGE), Metric.of(key.covariance, RIDGE)
    left, values, right = scipy.linalg.svd(q.root @ k.root)
    return np.asarray((q.inverse @ (left[:, :rank] * values[:rank]) @ right[:rank] @ k.inverse).T)


def outputs(given: Moments, reader: Array, rank: int) -> Array:
    """What a head's values are multiplied by, d×d of a rank; `reader` is N×d."""
    metric = Metric.of(reader.T @ reader, RIDGE)
    basis = scipy.linalg.eigh(metric.root @ given.covariance @ metric.root)[1][:, ::-1][:, :rank]
    return np.asarray(metric.inverse @ basis @ basis.T @ metric.root)


def narrowed(run: Run, found: list[Attention], share: float) -> tuple[Weights, Weights]:
    """Scores, and values with outputs, of all attentions at a share of each head's width."""
    scored: dict[str, tuple[Array, Array]] = {}
    mixed: dict[str, tuple[Array, Array]] = {}
    for one in found:
        assert one.query is not None
        assert one.key is not None
        assert one.value is not None
        assert one.reader is not None
        mix = run.loaded.graph.protos[run.loaded.graph.readers(one.weights)[-1]].output[0]
        queries, keys, mixes = by_head(run, [one.queries, one.keys, mix], [True, False, True])
        width = len(queries[0].mean)
        rank = round(share * width)
        turn = scipy.linalg.block_diag(*(scores(q, k, rank) for q, k in zip(queries, keys, strict=True)))
        scored[one.query.name] = (turn @ one.query.weight, turn @ one.query.bias_vector)
        reader = one.reader.weight.astype(np.float64)
        blocks = np.split(reader, len(mixes), axis=1)
        turn = scipy.linalg.block_diag(*(outputs(m, b, rank) for m, b in zip(mixes, blocks, strict=True)))
        mean = np.concatenate([m.mean for m in mixes])
        mixed[one.value.name] = (turn @ one.value.weight, turn @ one.value.bias_vector)
        mixed[one.reader.name] = (reader, one.reader.bias_vector + reader @ (mean - turn @ mean))
    return scored, mixed


def pivoted(run: Run, sites: list[Site], share: float) -> Weights:
    """The same sites with `pivot` at a share of their multiply-adds."""
    made = {}
    for site in sites:
        outs, ins = site.weight.shape
        half = (outs + ins) / 2
        rank = int(half - np.sqrt(max(half**2 - share * outs * ins, 0)))
        left, right, bias = fitted(site, run.fits[site.name], rank)
        made[site.name] = (left @ right, bias)
    return made


def main() -> None:
    """Print a line for each share."""
    settings = Settings(kinds=("svd", "pivot"), max_loss=0.5, samples=1024)
    run = start(Path(sys.argv[1]), sys.argv[2:], settings, Clock(lambda *_: None))
    found = [a for a in attentions(run.loaded.graph, run.loaded.sites) if a.query and a.key and a.value and a.reader]
    first = [site for a in found for site in (a.query, a.key) if site is not None]
    second = [site for a in found for site in (a.value, a.reader) if site is not None]
    print(f"{len(found)} attentions; share of the multiply-adds: loss of narrower heads, of `pivot`")
    for share in SHARES:
        scored, mixed = narrowed(run, found, share)
        line = [loss(run, w) for w in (scored, pivoted(run, first, share), mixed, pivoted(run, second, share))]
        texts = [f"{value:.5f}" for value in line]
        print(f"{share:g}: QK {texts[0]}, {texts[1]}; VO {texts[2]}, {texts[3]}", flush=True)


if __name__ == "__main__":
    main()
