"""What scores over seeds can carry: intervals, comparisons, importance."""

import bisect
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats
from scipy.special import expit, logit
from statsmodels.stats.weightstats import ttost_ind, ttost_paired

from ctbprn_lib import InputError

MOST_SEEDS = 2**14  # beyond which nobody goes


def mean_interval(scores, level=0.95, nats=False):
    """Mean over seeds with a t interval that stays where scores can be: in [0, 1], or, if they are nats, above 0.

    scores: (R,) one held-out score per seed; scores that are not finite (diverged replicas) are left out.
    level: coverage in (0, 1).  Returns (mean, low, high) in the units of scores.
    Raises InputError for fewer than two finite scores, one where none can be, or a level outside (0, 1).
    Near an end scores are skewed, and the plain interval covers too little and passes it; so its half width h becomes
    h / (m (1 - m)) around logit m, or h / m around log m for nats (the delta method), which changes nothing where h is
    small.
    Source: Student (1908); coverage checked by simulation in tests/test_evidence.py.
    """
    scores = np.asarray(scores, dtype=float)
    scores = scores[np.isfinite(scores)]
    if scores.size < 2 or not 0 < level < 1:
        raise InputError(
            f"an interval needs at least two finite scores and a level in (0, 1), got {scores.size} and {level}"
        )
    if scores.min() < 0 or (scores.max() > 1 and not nats):
        raise InputError(
            f"scores must not be below 0 or, but for nats, above 1; got {scores.min():g}, {scores.max():g}"
        )
    mean, half = scores.mean(), stats.t.ppf((1 + level) / 2, scores.size - 1) * stats.sem(scores)
    if half == 0:
        return float(mean), float(mean), float(mean)
    if nats:
        return float(mean), float(mean * np.exp(-half / mean)), float(mean * np.exp(half / mean))
    half /= mean * (1 - mean)
    return float(mean), float(expit(logit(mean) - half)), float(expit(logit(mean) + half))


def sample_interval(share, n):
    """(low, high) of a share measured on n samples: what so few samples leave open.  Source: Wilson (1927)."""
    interval = stats.binomtest(round(share * n), n).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def holm(p_values):
    """Holm's adjusted p-values, in the order given.  Source: Holm (1979), Scand. J. Statist. 6."""
    p = np.asarray(p_values, dtype=float)  # statsmodels has it too, but collects garbage for 0.3 s at every call
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

    Scores that are not finite are left out (with their partner, if paired). Without any spread p_value is 1.
    Raises InputError for fewer than two finite scores on a side, or pairs of unequal number.
    Source: Welch (1947), Student (1908) for pairs, as scipy.stats has them.
    """
    a, b = _finite(a, b, paired)
    if _no_spread(a, b, paired):  # t is undefined: few test samples, say, on which every seed scores the same
        effect = float(a.mean() - b.mean())
        return Comparison(effect, effect, effect, 1.0)
    test = stats.ttest_rel(a, b) if paired else stats.ttest_ind(a, b, equal_var=False)
    interval = test.confidence_interval(0.95)
    return Comparison(float(a.mean() - b.mean()), float(interval.low), float(interval.high), float(test.pvalue))


def equivalence(a, b, margin, paired=False):
    """p-value against "the means of a and b differ by margin or more"; small: they are equivalent.

    Two one-sided tests, arguments and errors as compare.  Source: Schuirmann (1987), as statsmodels has them.
    """
    a, b = _finite(a, b, paired)
    if _no_spread(a, b, paired):
        return 1.0
    test = ttost_paired(a, b, -margin, margin) if paired else ttost_ind(a, b, -margin, margin, usevar="unequal")
    return float(test[0])


def seeds_needed(sd, margin, alpha, paired=False, power=0.8):
    """Seeds a side with which compare finds a true difference of margin at level alpha in a share power of reports;
    math.inf for more than MOST_SEEDS.

    sd: of one score over seeds, or, if paired, of the differences; in the units of margin.
    """

    def found(n):  # statsmodels has it too, but gives NaN where little is missing to certainty
        freedom, standard_errors = (n - 1, n**0.5) if paired else (2 * n - 2, (n / 2) ** 0.5)
        critical = stats.t.ppf(1 - alpha / 2, freedom)
        return stats.nct.sf(critical, freedom, min(margin / max(sd, 1e-12), 100) * standard_errors)

    enough = 2
    while found(enough) < power:
        enough *= 2
        if enough > MOST_SEEDS:
            return np.inf
    return enough // 2 + bisect.bisect_left(range(enough // 2, enough), power, key=found) if enough > 2 else 2


def _finite(a, b, paired):
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if paired:
        if a.shape != b.shape:
            raise InputError(f"pairs need equal numbers of scores, got {a.size} and {b.size}")
        both = np.isfinite(a) & np.isfinite(b)
        a, b = a[both], b[both]
    a, b = a[np.isfinite(a)], b[np.isfinite(b)]
    if min(a.size, b.size) < 2:
        raise InputError(f"a comparison needs at least two finite scores on each side, got {a.size} and {b.size}")
    return a, b


def _no_spread(a, b, paired):
    return np.ptp(a - b if paired else np.concatenate([a - a.mean(), b - b.mean()])) < 1e-9  # but for rounding


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


def importance(trials, ranking, n_resamples=300, seed=0):
    """How much each hyperparameter separates the better trials from the others, with error bars.

    trials: Optuna's, whose params hold a "placebo" that did nothing; ranking: (trials,) smaller is better.
    Shares add up to 1 and are PED-ANOVA's (Watanabe et al., 2023); the interval comes from resampling trials;
    beats_placebo is True where a share exceeds the placebo's in 97.5 % of the resamples.
    Returns one row a name that varied, largest first: name, importance, low, high, beats_placebo.
    """
    import optuna

    trials = [
        optuna.create_trial(params=trial.params, distributions=trial.distributions, value=float(rank))
        for trial, rank in zip(trials, stats.rankdata(ranking, "ordinal"), strict=True)
    ]
    names = [name for name in trials[0].params if len({trial.params[name] for trial in trials}) > 1]

    def shares(chosen):
        study = optuna.create_study()
        study.add_trials([trials[i] for i in chosen])
        found = optuna.importance.get_param_importances(study, params=names)
        return [found[name] for name in names]

    rng = np.random.default_rng(seed)
    draws = (np.sort(rng.integers(len(trials), size=len(trials))) for _ in range(n_resamples))
    resampled = pd.DataFrame([shares(draw) for draw in draws], columns=names)
    table = pd.DataFrame({"importance": shares(range(len(trials)))}, index=pd.Index(names, name="name"))
    table["low"], table["high"] = resampled.quantile(0.025), resampled.quantile(0.975)
    table["beats_placebo"] = resampled.gt(resampled["placebo"], axis=0).mean() >= 0.975
    return table.sort_values("importance", ascending=False).reset_index()
