"""Intervals over seeds, paired tests and their correction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
# Scores are fractions of a few hundred answers: differences of differences below this are rounding, not variance.
SAME = 1e-12


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and the half-width of its interval, which is None where one seed gives no spread."""

    mean: float
    half: float | None
    count: int

    @property
    def above_zero(self) -> bool | None:
        """Whether all of the interval is; None where there is none."""
        return None if self.half is None else self.mean - self.half > 0


@dataclass(frozen=True)
class Paired(Interval):
    """The mean of differences within pairs, and the p of the paired t-test that the true one is 0."""

    p: float | None = None


def interval(values: Sequence[float]) -> Interval | None:
    r"""The mean and $t_{0.975, n-1}\, s / \sqrt n$, where $s^2 = \sum_i (x_i - \bar x)^2 / (n - 1)$.

    >>> round(interval([0.5, 0.6, 0.7]).half, 4)  # t = 4.303, s = 0.1
    0.2484
    """
    sample = np.asarray(values, dtype=float)
    if not sample.size:
        return None
    return Interval(float(sample.mean()), _half(sample), sample.size)


def paired(first: Sequence[float], second: Sequence[float]) -> Paired | None:
    r"""The interval of $d_i = a_i - b_i$ and the p of $t = \bar d \sqrt n / s_d$ on n - 1 degrees of freedom.

    Equal differences have no variance; the test's limit is taken there: p = 1 if they are 0, else p = 0.
    """
    a, b = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if a.shape != b.shape:
        raise ValueError(f"pairs need as many values on each side, got {a.shape} and {b.shape}")
    if not a.size:
        return None
    difference = a - b
    mean = float(difference.mean())
    if a.size < 2:
        p = None
    elif np.ptp(difference) <= SAME:
        p = 1.0 if abs(mean) <= SAME else 0.0
    else:
        p = float(stats.ttest_rel(a, b).pvalue)
    return Paired(mean, _half(difference), a.size, p)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    r"""Holm's step-down correction: $\tilde p_{(i)} = \max_{j \le i} \min(1, (m - j + 1)\, p_{(j)})$ of m tests.

    A test that was not made (None) is not counted.

    >>> holm([0.01, 0.04, None, 0.03])
    [0.03, 0.06, None, 0.06]
    """
    made = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, place) in enumerate(made):
        largest = max(largest, min(1.0, (len(made) - rank) * p))
        corrected[place] = largest
    return corrected


def _half(sample: np.ndarray) -> float | None:
    if sample.size < 2:
        return None
    if np.ptp(sample) <= SAME:
        return 0.0
    t = stats.t.ppf((1 + CONFIDENCE) / 2, sample.size - 1)
    return float(t * sample.std(ddof=1) / math.sqrt(sample.size))
