"""A synthetic speech-like signal, no recording: a buzzing voice through formants, syllables, pauses, and noise."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt
from scipy.signal import lfilter

__all__ = ["RATE", "speech_like", "windows"]

RATE: Final = 16000
_HOP, _CONTEXT = 512, 64
_VOWELS: Final = ((730, 1090, 2440), (270, 2290, 3010), (300, 870, 2240), (530, 1840, 2480), (570, 840, 2410))

Signal = npt.NDArray[np.float32]


def speech_like(rng: np.random.Generator, seconds: float) -> Signal:
    """Phrases of two to eight syllables between pauses, in changing noise."""
    total, parts, length = int(seconds * RATE), list[npt.NDArray[Any]](), 0
    while length < total:
        pitch, loud = rng.uniform(90, 230), rng.uniform(0.1, 0.5)
        phrase = [_syllable(rng, pitch) * loud for _ in range(rng.integers(2, 9))]
        parts += [*phrase, np.zeros(int(rng.uniform(0.2, 1.2) * RATE))]
        length += sum(len(part) for part in phrase) + len(parts[-1])
    clean = np.concatenate(parts)[:total]
    level = np.repeat(rng.uniform(0.0, 0.04, total // RATE + 1), RATE)[:total]
    return (clean + level * rng.normal(0, 1, total)).astype(np.float32)


def windows(signal: Signal) -> Signal:
    """Windows of 512 samples, each with the 64 before it (n × 576)."""
    padded = np.concatenate([np.zeros(_CONTEXT, np.float32), signal])
    count = len(signal) // _HOP
    return np.stack([padded[k * _HOP : k * _HOP + _CONTEXT + _HOP] for k in range(count)])


def _syllable(rng: np.random.Generator, pitch: float) -> npt.NDArray[Any]:
    """A hiss, then a vowel, peak 1."""
    hiss = rng.normal(0, 0.25, int(rng.uniform(0.02, 0.09) * RATE))
    time = np.arange(int(rng.uniform(0.12, 0.3) * RATE)) / RATE
    glide = pitch * (1 + rng.uniform(-0.15, 0.15) * time / time[-1] + 0.01 * np.sin(2 * np.pi * 5 * time))
    sound: npt.NDArray[Any] = np.diff(np.floor(np.cumsum(glide) / RATE), prepend=0.0) + rng.normal(0, 0.01, len(time))
    for formant in _VOWELS[int(rng.integers(len(_VOWELS)))]:
        radius = np.exp(-np.pi * rng.uniform(60, 120) / RATE)
        turn = 2 * np.pi * formant * rng.uniform(0.92, 1.08) / RATE
        sound = lfilter([1.0], [1.0, -2 * radius * np.cos(turn), radius**2], sound)
    vowel = sound * np.hanning(len(sound)) ** 0.5
    return np.concatenate([hiss * np.hanning(len(hiss)), vowel / (np.abs(vowel).max() + 1e-9)])
