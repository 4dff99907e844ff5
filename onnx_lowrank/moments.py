from __future__ import annotations

import numpy as np


def rows(a, axis):
    a = np.moveaxis(a, axis, -1)
    return a.reshape(-1, a.shape[-1])


class Moments:
    def __init__(self, width):
        self.count = 0
        self._s = np.zeros(width)
        self._m = np.zeros((width, width))

    def add(self, x):
        x = np.asarray(x, np.float64)
        if not np.isfinite(x.sum()):
            raise ValueError("not finite")
        self.count += len(x)
        self._s += x.sum(0)
        self._m += x.T @ x

    @property
    def mean(self):
        return self._s / self.count

    @property
    def second(self):
        return self._m / self.count

    @property
    def covariance(self):
        return self.second - np.outer(self.mean, self.mean)
