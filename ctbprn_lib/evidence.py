"""What scores over seeds can show: intervals, comparisons, trends and importance.

Numbers go in and numbers come out; nothing here reads files or trains.
"""

import bisect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import optuna
import pandas as pd
from numpy.typing import ArrayLike
from scipy import stats
from scipy.special import expit, logit
from statsmodels.stats.weightstats import ttost_ind, ttost_paired

from ctbprn_lib import InputError

MOST_SEEDS = 2**14  # seeds_needed looks no further
MARGIN = 0.01  # the smallest difference of accuracy (or of the share routed well) that anybody should care about
LEVEL = 0.05  # of all tests of a report together
BETTER, WORSE, SAME = "better", "worse", "the same within one point"  # of a level, or of one thing beside another
SUPPORTED, REFUTED, UNDECIDED, NOT_TESTED = "supported", "refuted", "undecided", "not tested yet"  # of a claim


def mean_interval(scores: ArrayLike, level: float = 0.95, nats: bool = False) -> tuple[float, float, float]:
    """Mean over seeds with a t interval that stays within the range of the scores.

    scores: (R,) one held-out score per seed; scores that are not finite (diverged replicas) are left out.
    level: coverage in (0, 1). nats: True for cross-entropies, which are never below 0; else scores lie in [0, 1].
    Returns (mean, low, high) in the units of scores.
    Raises InputError for fewer than two finite scores, for a score outside the range, or a level outside (0, 1).
    Near an end of the range scores are skewed. The plain interval m - h to m + h then covers too little, and it can
    leave the range. So the half width h is taken to another scale by the delta method: to h / (m (1 - m)) around
    logit m, or to h / m around log m for nats. Where h is small, this changes almost nothing.
    Source: Student (1908); coverage checked by simulation in tests/test_evidence.py.
    """
    values = np.asarray(scores, dtype=float)
    values = values[np.isfinite(values)]
    if values.size < 2 or not 0 < level < 1:
        raise InputError(
            f"an interval needs at least two finite scores and a level in (0, 1), got {values.size} and {level}"
        )
    if values.min() < 0 or (values.max() > 1 and not nats):
        raise InputError(
            f"scores must not be below 0 or, but for nats, above 1; got {values.min():g}, {values.max():g}"
        )
    mean = values.mean()
    half = stats.t.ppf((1 + level) / 2, values.size - 1) * stats.sem(values)
    if half == 0:
        return float(mean), float(mean), float(mean)
    if nats:
        return float(mean), float(mean * np.exp(-half / mean)), float(mean * np.exp(half / mean))
    half /= mean * (1 - mean)
    return float(mean), float(expit(logit(mean) - half)), float(expit(logit(mean) + half))


def sample_interval(share: float, n: int) -> tuple[float, float]:
    """The 95 % interval (low, high) of a share in [0, 1] that was measured on n samples.  Source: Wilson (1927)."""
    interval = stats.binomtest(round(share * n), n).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def holm(p_values: ArrayLike) -> np.ndarray:
    """Holm's adjusted p-values, in the order of p_values (n,).  Source: Holm (1979), Scand. J. Statist. 6."""
    p = np.asarray(p_values, dtype=float)  # statsmodels has it too, but collects garbage for 0.3 s at every call
    order = np.argsort(p)
    adjusted = np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1))
    result = np.empty_like(p)
    result[order] = np.minimum(adjusted, 1)
    return result


class Comparison(NamedTuple):
    """A difference of two means: effect = mean(a) - mean(b), in the units of the scores.

    low, high: its 95 % interval. p_value: two-sided, against no difference.
    """

    effect: float
    low: float
    high: float
    p_value: float


def compare(a: ArrayLike, b: ArrayLike, paired: bool = False) -> Comparison:
    """Compare the scores of two configurations over seeds.

    a: (R,) and b: (R',) one score per seed. paired: True if both have the same seeds in the same order.
    Scores that are not finite are left out (with their partner, if paired). If the scores do not spread at all,
    p_value is 1.
    Raises InputError for fewer than two finite scores on a side, or for pairs of unequal number.
    Source: Welch (1947), Student (1908) for pairs, as scipy.stats has them.
    """
    a, b = _finite(a, b, paired)
    if _no_spread(a, b, paired):  # t is undefined, for example if every seed scores the same on few test samples
        effect = float(a.mean() - b.mean())
        return Comparison(effect, effect, effect, 1.0)
    test = stats.ttest_rel(a, b) if paired else stats.ttest_ind(a, b, equal_var=False)
    interval = test.confidence_interval(0.95)
    return Comparison(float(a.mean() - b.mean()), float(interval.low), float(interval.high), float(test.pvalue))


def equivalence(a: ArrayLike, b: ArrayLike, margin: float, paired: bool = False) -> float:
    """The p-value against "the means of a and b differ by margin or more". If it is small, they are equivalent.

    a, b, paired and the errors are those of compare; margin is in the units of the scores. If the scores do not spread
    at all, the p-value is 1.
    Source: the two one-sided tests of Schuirmann (1987), as statsmodels has them.
    """
    a, b = _finite(a, b, paired)
    if _no_spread(a, b, paired):
        return 1.0
    test = ttost_paired(a, b, -margin, margin) if paired else ttost_ind(a, b, -margin, margin, usevar="unequal")
    return float(test[0])


def seeds_needed(sd: float, margin: float, alpha: float, paired: bool = False, power: float = 0.8) -> float:
    """The number of seeds on each side with which compare finds a true difference of margin.

    sd: standard deviation of one score over seeds or, if paired, of the differences; in the units of margin.
    alpha: the level of the test. power: the share of reports in which the difference shall be found.
    Returns a whole number of at least 2, or math.inf if more than MOST_SEEDS are needed.
    """

    def power_of(n: int) -> float:  # statsmodels has it too, but gives NaN where the power is nearly 1
        freedom, standard_errors = (n - 1, n**0.5) if paired else (2 * n - 2, (n / 2) ** 0.5)
        critical = stats.t.ppf(1 - alpha / 2, freedom)
        effect = min(margin / max(sd, 1e-12), 100)
        return float(stats.nct.sf(critical, freedom, effect * standard_errors))

    if power_of(2) >= power:
        return 2
    enough = 4
    while power_of(enough) < power:
        enough *= 2
        if enough > MOST_SEEDS:
            return math.inf
    too_few = enough // 2
    return too_few + bisect.bisect_left(range(too_few, enough), power, key=power_of)


def _finite(a: ArrayLike, b: ArrayLike, paired: bool) -> tuple[np.ndarray, np.ndarray]:
    """The finite scores of both sides; if paired, only pairs of which both are finite."""
    left, right = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if paired:
        if left.shape != right.shape:
            raise InputError(f"pairs need equal numbers of scores, got {left.size} and {right.size}")
        both = np.isfinite(left) & np.isfinite(right)
        left, right = left[both], right[both]
    left, right = left[np.isfinite(left)], right[np.isfinite(right)]
    if min(left.size, right.size) < 2:
        raise InputError(
            f"a comparison needs at least two finite scores on each side, got {left.size} and {right.size}"
        )
    return left, right


def _no_spread(a: np.ndarray, b: np.ndarray, paired: bool) -> bool:
    """Whether what the t test is about does not vary, apart from rounding."""
    varies = a - b if paired else np.concatenate([a - a.mean(), b - b.mean()])
    return bool(np.ptp(varies) < 1e-9)


def like_the_best(scores: Sequence[ArrayLike] | np.ndarray, best: int) -> list[int]:
    """The trials whose scores cannot be told from those of the best trial.

    scores: (trials, R) one score per seed. best: the index of the best trial.
    Returns best, then the indices of the trials for which compare gives an adjusted p-value of 0.05 or more (Holm,
    over all other trials).
    """
    others = [i for i in range(len(scores)) if i != best]
    if not others:
        return [best]
    p = holm([compare(scores[i], scores[best]).p_value for i in others])
    return [best, *(i for i, adjusted in zip(others, p, strict=True) if adjusted >= 0.05)]


def trends(trials: pd.DataFrame, names: Iterable[str], score: str) -> pd.DataFrame:
    """The rank correlation (Spearman) of each hyperparameter with a score over trials.

    trials: one row for each trial. names: the columns of the hyperparameters. score: the column of the score.
    Returns one row for each hyperparameter with the columns hyperparameter, rho (NaN where nothing varies, or for fewer
    than three trials), n (trials), p_value (a permutation test: exact for few trials, else 9,999 draws) and p_holm
    (Holm over names).
    A sampler does not choose trials at random, so this describes the trials; only an ablation measures effects.
    """
    rows = []
    y = stats.rankdata(trials[score])
    for name in names:
        x = stats.rankdata(trials[name])
        rho, p_value = np.nan, 1.0
        if len(trials) >= 3 and np.ptp(x) > 0 and np.ptp(y) > 0:
            rho = stats.pearsonr(x, y).statistic
            test = stats.permutation_test(
                (x,), _sum_of_products_with(y), permutation_type="pairings", vectorized=True, rng=0
            )
            p_value = test.pvalue
        rows.append({"hyperparameter": name, "rho": rho, "n": len(trials), "p_value": p_value})
    table = pd.DataFrame(rows)
    return table.assign(p_holm=holm(table["p_value"]))


def _sum_of_products_with(y: np.ndarray) -> Callable[[np.ndarray, int], np.ndarray]:
    """The statistic of the permutation test: for permutations of x it orders as the correlation does."""
    return lambda x, axis: (x * y).sum(axis)


def pareto_front(cost: ArrayLike, gain: ArrayLike) -> np.ndarray:
    """Boolean (n,): whether no other point is better.  cost, gain: (n,).

    A point is better if it costs no more and gains no less, and differs in one of the two.
    """
    costs, gains = np.asarray(cost, dtype=float), np.asarray(gain, dtype=float)
    # (n,n): [i, j] compares point j with point i
    no_worse = (costs[None] <= costs[:, None]) & (gains[None] >= gains[:, None])
    differs = (costs[None] < costs[:, None]) | (gains[None] > gains[:, None])
    return np.asarray(~(no_worse & differs).any(1))


def importance(
    trials: Sequence[optuna.trial.FrozenTrial], ranking: ArrayLike, n_resamples: int = 300, seed: int = 0
) -> pd.DataFrame:
    """How much each hyperparameter separates the better trials from the others, with intervals.

    trials: their params hold a "placebo" that did nothing. ranking: (trials,) where smaller is better.
    Returns one row for each hyperparameter that varied, the largest importance first, with the columns name, importance
    (shares that add up to 1), low and high (95 % interval from resampled trials) and beats_placebo (whether the share
    is above the placebo's in at least 97.5 % of the resamples).
    Source: PED-ANOVA (Watanabe et al., 2023), as Optuna has it.
    """
    ranks = stats.rankdata(ranking, "ordinal")
    ranked = [
        optuna.create_trial(params=trial.params, distributions=trial.distributions, value=float(rank))
        for trial, rank in zip(trials, ranks, strict=True)
    ]
    names = [name for name in ranked[0].params if len({trial.params[name] for trial in ranked}) > 1]

    def shares(indices: Iterable[int]) -> list[float]:
        study = optuna.create_study()
        study.add_trials([ranked[i] for i in indices])
        importances = optuna.importance.get_param_importances(study, params=names)
        return [importances[name] for name in names]

    rng = np.random.default_rng(seed)
    draws = [np.sort(rng.integers(len(ranked), size=len(ranked))) for _ in range(n_resamples)]
    resampled = pd.DataFrame([shares(draw) for draw in draws], columns=names)
    table = pd.DataFrame({"importance": shares(range(len(ranked)))}, index=pd.Index(names, name="name"))
    table["low"], table["high"] = resampled.quantile(0.025), resampled.quantile(0.975)
    table["beats_placebo"] = resampled.gt(resampled["placebo"], axis=0).mean() >= 0.975
    return table.sort_values("importance", ascending=False).reset_index()


def verdict_on_effect(effect: float, p_value: float, p_equivalence: float, lower_is_better: bool = False) -> str:
    """What a comparison of a with b says of a: BETTER, WORSE, SAME or UNDECIDED.

    effect: mean(a) - mean(b). p_value, p_equivalence: adjusted; p_equivalence is NaN where equivalence is not tested.
    """
    if p_equivalence < LEVEL:
        return SAME
    if p_value >= LEVEL:
        return UNDECIDED
    return BETTER if (effect < 0) == lower_is_better else WORSE


def verdict_on_claim(verdicts: Iterable[str]) -> str:
    """What the verdicts on a thing beside each of its rivals say of the claim that it is good.

    Being worse than one rival refutes the claim. Being better than some, and the same as the others, supports it.
    Returns SUPPORTED, REFUTED, SAME or UNDECIDED.
    """
    found = set(verdicts)
    if WORSE in found:
        return REFUTED
    if UNDECIDED in found:
        return UNDECIDED
    return SAME if found == {SAME} else SUPPORTED


def verdict_on_score(published: float, low: float, high: float) -> str:
    """Whether a published accuracy holds, given the 95 % interval of its replication.

    It is refuted outside the interval, and supported if the whole interval lies within MARGIN of it.
    """
    if not low <= published <= high:
        return REFUTED
    return SUPPORTED if max(published - low, high - published) <= MARGIN else UNDECIDED
