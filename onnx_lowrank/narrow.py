"""Which channels of a hidden layer to keep, and what the site that reads them becomes (Nyström; ALGORITHMS §2).

With `C = E[xxᵀ]` of what enters a site `y = W x`, the best weight that reads the channels S alone is
`W C[:,S] C[S,S]⁻¹` (MoDeGPT type I, arXiv 2408.09632; He et al. 2017). Channels go one by one, each time the one whose
loss the others make up for best (Optimal Brain Surgeon, Hassibi & Stork 1993, for whole channels).
"""

from __future__ import annotations

import dataclasses

import numpy as np
import scipy.linalg

from onnx_lowrank.linalg import Array, Index, from_half, half_of

_LEAST = 0.125  # of the channels: no order is found below this width
_FLOOR = 1e-6  # of the mean power of an entry of x: least power in any direction, for dead and equal channels
_STALE = 8  # matrices shrink when one part in so many is gone


@dataclasses.dataclass(frozen=True)
class Narrow:
    """A site that reads fewer channels, at every width.

    Attributes:
        producer: name of the site whose output the channels are.
        order: channels, the first to go last; those before `least` are not ordered.
        errors: relative error of the site's output by width, from `least` to all channels.
        half: C, K×K, centred where the site's mean is corrected, positive definite: its upper triangle row by row.
        mean: E[x], K.
        taps: entries of x that a channel has: 1, or those of a convolution's kernel.
    """

    producer: str
    order: Index
    errors: Array
    half: Array
    mean: Array
    taps: int

    @property
    def second(self) -> Array:
        """C, K×K: made anew each time, as layers of a large model would hold hundreds of megabytes."""
        return from_half(self.half, len(self.mean))

    @property
    def least(self) -> int:
        """The smallest width."""
        return len(self.order) + 1 - len(self.errors)

    def relative(self, width: int) -> float:
        """Relative error of the site's output when it reads `width` channels; 1 below the smallest width."""
        return float(self.errors[width - self.least]) if width >= self.least else 1.0

    def kept(self, width: int) -> Index:
        """The channels that are kept, ascending."""
        return np.sort(self.order[:width])

    def columns(self, width: int) -> Index:
        """The columns of the weight that read the kept channels, ascending."""
        return _columns(self.kept(width), self.taps)

    def weight(self, weight: Array, width: int) -> Array:
        """`W C[:,S] C[S,S]⁻¹`, N×(width·taps): of the weight W (N×K), fitted to the kept channels alone."""
        kept = self.columns(width)
        gone, second = np.setdiff1d(np.arange(len(self.mean)), kept), self.second
        inner = second[np.ix_(kept, kept)]
        outer = second[np.ix_(kept, gone)] @ weight[:, gone].T
        return np.asarray(weight[:, kept] + scipy.linalg.solve(inner, outer, assume_a="pos").T)

    def scattered(self, weight: Array, width: int) -> Array:
        """The same weight at its full size N×K: columns of channels that go are zero."""
        full = np.zeros_like(weight)
        full[:, self.columns(width)] = self.weight(weight, width)
        return full


def narrowed(producer: str, weight: Array, second: Array, mean: Array, taps: int) -> Narrow:
    """Order the channels that a weight reads.

    Args:
        weight: W, N×K; errors count in its rows, so a metric of the output may be multiplied into it.
        second: of x, K×K, K channels × taps, taps last.
    """
    values, vectors = scipy.linalg.eigh(second)
    values = np.maximum(values, _FLOOR * max(float(values.mean()), np.finfo(np.float64).tiny / _FLOOR))
    regular = (vectors * values) @ vectors.T
    total = float(np.einsum("ij,ij->", weight @ regular, weight))
    gone, costs = _eliminated((vectors / values) @ vectors.T, weight.copy(), taps)
    channels = len(second) // taps
    order = np.concatenate([np.setdiff1d(np.arange(channels), gone), gone[::-1]]).astype(np.intp)
    errors = np.concatenate([[0.0], np.cumsum(costs)])[::-1]
    errors = errors / total if second.any() and total > 0 else 0 * errors
    return Narrow(producer, order, errors, half_of(regular), mean, taps)


def _columns(channels: Index, taps: int) -> Index:
    return (channels[:, None] * taps + np.arange(taps)).reshape(-1)


def _eliminated(precision: Array, weight: Array, taps: int) -> tuple[Index, Array]:
    """The channels that go, in their order, and the error that each adds; both arrays are used up.

    Removing the columns b adds `tr(W_b P_bb⁻¹ W_bᵀ)` for `P = C⁻¹`; what is left of W and P is again the best weight
    and the precision of the channels that are left.
    """
    left = np.arange(len(precision) // taps)
    least = max(int(_LEAST * len(left)), 1)
    alive, gone, costs = np.ones(len(left), bool), [], []
    for _ in range(len(left) - least):
        cost = np.where(alive, _costs(precision, weight, taps), np.inf)
        worst = int(cost.argmin())
        gone.append(left[worst])
        costs.append(max(float(cost[worst]), 0.0))
        alive[worst] = False
        block = _columns(np.array([worst]), taps)
        across = precision[:, block]
        step = scipy.linalg.solve(across[block], across.T, assume_a="pos")
        weight -= weight[:, block] @ step
        precision -= across @ step
        precision[np.ix_(block, block)] = np.eye(taps)
        if (~alive).sum() * _STALE > len(alive):
            columns = _columns(np.flatnonzero(alive), taps)
            precision, weight = precision[np.ix_(columns, columns)].copy(), weight[:, columns].copy()
            left, alive = left[alive], alive[alive]
    return np.array(gone, np.intp), np.array(costs)


def _costs(precision: Array, weight: Array, taps: int) -> Array:
    """Error that the removal of each channel adds."""
    if taps == 1:
        return np.asarray(np.einsum("nk,nk->k", weight, weight) / np.diag(precision))
    channels = len(precision) // taps
    index = np.arange(channels)
    blocks = precision.reshape(channels, taps, channels, taps)[index, :, index, :]
    by_channel = weight.reshape(len(weight), channels, taps).transpose(1, 2, 0)
    grams = by_channel @ by_channel.transpose(0, 2, 1)
    return np.asarray(np.einsum("cij,cji->c", np.linalg.inv(blocks), grams))
