"""What scores over seeds can carry: intervals and comparisons."""

import numpy as np
from scipy import stats

from ctbprn_lib import InputError


def mean_interval(scores, level=0.95):
    """Mean over seeds with a t interval.

    scores: (R,) one held-out score per seed; scores that are not finite (diverged replicas) are left out.
    level: coverage in (0, 1).  Returns (mean, low, high) in the units of scores.
    Raises InputError for fewer than two finite scores or a level outside (0, 1).
    Source: Student (1908); coverage checked by simulation in tests/test_evidence.py.
    """
    scores = np.asarray(scores, dtype=float)
    scores = scores[np.isfinite(scores)]
    if scores.size < 2 or not 0 < level < 1:
        raise InputError(
            f"an interval needs at least two finite scores and a level in (0, 1), got {scores.size} and {level}"
        )
    mean, half = scores.mean(), stats.t.ppf((1 + level) / 2, scores.size - 1) * stats.sem(scores)
    return float(mean), float(mean - half), float(mean + half)


def holm(p_values):
    """Holm's adjusted p-values, in the order given.  Source: Holm (1979), Scand. J. Statist. 6."""
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p)
    adjusted = np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1))
    out = np.empty_like(p)
    out[order] = np.minimum(adjusted, 1)
    return out
