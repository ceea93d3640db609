"""What scores over seeds can carry: intervals and comparisons."""

from typing import NamedTuple

import numpy as np
import pandas as pd
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


def sample_interval(share, n, level=0.95):
    """(low, high) of a share measured on n samples: what so few samples leave open.  Source: Wilson (1927)."""
    interval = stats.binomtest(round(share * n), n).proportion_ci(level, method="wilson")
    return float(interval.low), float(interval.high)


def holm(p_values):
    """Holm's adjusted p-values, in the order given.  Source: Holm (1979), Scand. J. Statist. 6."""
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p)
    adjusted = np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1))
    out = np.empty_like(p)
    out[order] = np.minimum(adjusted, 1)
    return out


class Comparison(NamedTuple):
    """effect = mean(a) - mean(b), its 95 % interval low..high in the units of the scores, and a two-sided p_value."""

    effect: float
    low: float
    high: float
    p_value: float


def compare(a, b, paired=False):
    """Compare per-replica scores a (R,) and b (R',); paired: the same seeds in the same order.

    Scores that are not finite are left out (with their partner, if paired).
    Raises InputError for fewer than two finite scores on a side, or pairs of unequal number.
    Source: Welch (1947), Student (1908) for pairs, as scipy.stats has them.
    """
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if paired:
        if a.shape != b.shape:
            raise InputError(f"pairs need equal numbers of scores, got {a.size} and {b.size}")
        both = np.isfinite(a) & np.isfinite(b)
        a, b = a[both], b[both]
    a, b = a[np.isfinite(a)], b[np.isfinite(b)]
    if min(a.size, b.size) < 2:
        raise InputError(f"a comparison needs at least two finite scores on each side, got {a.size} and {b.size}")
    if np.ptp(a - b if paired else np.concatenate([a - a.mean(), b - b.mean()])) == 0:  # no spread: t is undefined
        effect = float(a.mean() - b.mean())
        return Comparison(effect, effect, effect, float(effect == 0))
    test = stats.ttest_rel(a, b) if paired else stats.ttest_ind(a, b, equal_var=False)
    interval = test.confidence_interval(0.95)
    return Comparison(float(a.mean() - b.mean()), float(interval.low), float(interval.high), float(test.pvalue))


def like_the_best(scores, best):
    """Indices of scores (trials, R) that a two-sided Welch test does not tell from row best, Holm over all others."""
    others = [i for i in range(len(scores)) if i != best]
    if not others:
        return [best]
    p = holm([compare(scores[i], scores[best]).p_value for i in others])
    return [best, *(i for i, adjusted in zip(others, p, strict=True) if adjusted >= 0.05)]


def trends(trials, names, score):
    """Spearman correlation of each hyperparameter in names with the column score over the rows of trials.

    Returns one row a hyperparameter: rho, n, p_value (permutation test: exact for few trials, else 9,999 draws) and
    p_holm (Holm over names); rho is NaN where a value never varied.
    Trials that a sampler chose are no random draws, so this describes the trials; an ablation measures effects.
    """
    rows, y = [], stats.rankdata(trials[score])
    for name in names:
        x, rho, p = stats.rankdata(trials[name]), np.nan, 1.0
        if len(trials) >= 3 and np.ptp(x) > 0 and np.ptp(y) > 0:
            rho = stats.pearsonr(x, y).statistic
            products = stats.permutation_test(
                (x,), lambda x, axis: (x * y).sum(axis), permutation_type="pairings", vectorized=True, rng=0
            )
            p = products.pvalue
        rows.append({"hyperparameter": name, "rho": rho, "n": len(trials), "p_value": p})
    table = pd.DataFrame(rows)
    return table.assign(p_holm=holm(table["p_value"]))


def pareto_front(cost, gain):
    """Boolean (n,): True where no other point costs no more and gains no less, and differs."""
    cost, gain = np.asarray(cost, dtype=float), np.asarray(gain, dtype=float)
    no_worse = (cost[None] <= cost[:, None]) & (gain[None] >= gain[:, None])
    better = no_worse & ((cost[None] < cost[:, None]) | (gain[None] > gain[:, None]))
    return ~better.any(1)
