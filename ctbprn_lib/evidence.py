"""What scores over seeds can show: intervals, comparisons, trends and importance.

Numbers go in and numbers come out; nothing here reads files or trains.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import optuna
import pandas as pd
from numpy.typing import ArrayLike
from scipy.special import expit, logit, stdtr, stdtrit

from ctbprn_lib import InputError

MARGIN = 0.01  # the smallest difference of accuracy (or of the share routed well) that anybody should care about
LEVEL = 0.05  # of all tests of a report together
BETTER, WORSE, SAME = "better", "worse", "the same within one point"  # of a level, or of one thing beside another
SUPPORTED, REFUTED, UNDECIDED, NOT_TESTED = "supported", "refuted", "undecided", "not tested yet"  # of a claim
AT_MOST = "at most"  # so many points: there is no verdict, but a bound that a reader can act on
USEFUL_BOUND = 3  # margins: where a difference may be larger than this, the question is called undecided
POWER_QUANTILE = 0.84  # of the normal distribution: predicted numbers of seeds decide in 80 % of cases


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
    half = stdtrit(values.size - 1, (1 + level) / 2) * values.std(ddof=1) / np.sqrt(values.size)
    if half == 0:
        return float(mean), float(mean), float(mean)
    if nats:
        return float(mean), float(mean * np.exp(-half / mean)), float(mean * np.exp(half / mean))
    half /= mean * (1 - mean)
    return float(mean), float(expit(logit(mean) - half)), float(expit(logit(mean) + half))


def sample_interval(share: float, n: int) -> tuple[float, float]:
    """The 95 % interval (low, high) of a share in [0, 1] that was measured on n samples.  Source: Wilson (1927)."""
    z = NormalDist().inv_cdf(0.975)
    p = round(share * n) / n
    middle, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    low, high = ((middle + side) / (1 + z**2 / n) for side in (-half, half))
    return (low if p > 0 else 0.0), (high if p < 1 else 1.0)


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
    Source: Welch (1947), Student (1908) for pairs.
    """
    a, b = _finite(a, b, paired)
    if _no_spread(a, b, paired):  # t is undefined, for example if every seed scores the same on few test samples
        same = float(a.mean() - b.mean())
        return Comparison(same, same, same, 1.0)
    effect, variance, df = _difference(a, b, paired)
    error = np.sqrt(variance)
    half = stdtrit(df, 0.975) * error
    return Comparison(*map(float, (effect, effect - half, effect + half, 2 * stdtr(df, -abs(effect) / error))))


def equivalence(a: ArrayLike, b: ArrayLike, margin: float, paired: bool = False) -> float:
    """The p-value against "the means of a and b differ by margin or more". If it is small, they are equivalent.

    a, b, paired and the errors are those of compare; margin is in the units of the scores. If the scores do not spread
    at all, the p-value is 1.
    Source: the two one-sided tests of Schuirmann (1987).
    """
    a, b = _finite(a, b, paired)
    if _no_spread(a, b, paired):
        return 1.0
    effect, variance, df = _difference(a, b, paired)
    return float(stdtr(df, (abs(effect) - margin) / np.sqrt(variance)))


def _difference(a: np.ndarray, b: np.ndarray, paired: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """mean(a) - mean(b) over the last axis, the variance of that, and its degrees of freedom, each (...)."""
    effect = np.asarray(a.mean(-1) - b.mean(-1))
    if paired:
        n = a.shape[-1]
        return effect, (a - b).var(-1, ddof=1) / n, np.full_like(effect, n - 1)
    of_a, of_b = (side.var(-1, ddof=1) / side.shape[-1] for side in (a, b))
    n, m = a.shape[-1] - 1, b.shape[-1] - 1
    squares = of_a**2 / n + of_b**2 / m
    df = np.divide((of_a + of_b) ** 2, squares, out=np.full_like(effect, min(n, m)), where=squares > 0)
    return effect, of_a + of_b, df


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
    from scipy import stats  # here, because it takes half a second, which every worker would wait for

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
    ranks = 1 + np.argsort(np.argsort(ranking, kind="stable"))
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


@dataclass(frozen=True)
class Schedule:
    """After how many seeds a contrast is looked at, and which part of its level each look may spend.

    looks: whole numbers of seeds on each side, of at least 2, rising. weights: one for each look, positive, at most 1
    together. A p-value is valid at each fixed number of seeds, so P(p / weight <= a at some look) is at most the sum of
    weight times a, which is at most a, whatever decides which contrast is given its next look (Bonferroni over looks).
    Raises InputError for anything else.
    """

    looks: tuple[int, ...] = (8, 16, 32, 64, 128)
    weights: tuple[float, ...] = (0.4, 0.2, 0.2, 0.1, 0.1)

    def __post_init__(self) -> None:
        whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 2 for n in self.looks)
        if not self.looks or not whole:
            raise InputError(f"looks must be whole numbers of seeds of at least 2, got {self.looks}")
        if list(self.looks) != sorted(set(self.looks)):
            raise InputError(f"looks must rise from one to the next, got {self.looks}")
        if len(self.weights) != len(self.looks):
            raise InputError(f"each of the {len(self.looks)} looks needs one weight, got {len(self.weights)}")
        if not all(weight > 0 for weight in self.weights) or sum(self.weights) > 1 + 1e-9:
            raise InputError(f"weights must be above 0 and at most 1 together, got {self.weights}")

    def after(self, n_seeds: int) -> list[tuple[int, float]]:
        """(seeds, weight) of each look that comes after n_seeds."""
        return [look for look in zip(self.looks, self.weights, strict=True) if look[0] > n_seeds]


SCHEDULE = Schedule()


def schedule_of(looks: str) -> Schedule:
    """The schedule with these looks, such as "8,16,32".

    The usual looks have the usual weights; any others have equal weights.
    Raises InputError for anything else than whole numbers between commas.
    """
    try:
        numbers = tuple(int(part) for part in looks.split(","))
    except ValueError:
        raise InputError(f"looks must be numbers of seeds between commas, such as 8,16,32, got {looks!r}") from None
    if numbers == SCHEDULE.looks:
        return SCHEDULE
    return Schedule(numbers, (1 / len(numbers),) * len(numbers))


SHORT_SCHEDULE = Schedule((4, 8), (0.5, 0.5))  # for small runs


@dataclass(frozen=True)
class Contrast:
    """Two configurations, by name. The contrast is whether a is better than b.

    paired: whether both have the same initial values at each seed, that is whether d, rank and n_layers agree. Only
    then are they compared pair by pair. This is fixed before any score is seen.
    Raises InputError if a is b.
    """

    a: str
    b: str
    paired: bool

    def __post_init__(self) -> None:
        if self.a == self.b:
            raise InputError(f"a contrast needs two different configurations, got {self.a!r} twice")


@dataclass(frozen=True)
class Question:
    """One question of a report: how a level compares with another (one contrast), or whether a claim holds.

    contrasts: for a claim, each configuration that it calls good (a) against each rival (b).
    margin: the smallest difference of the score that matters, in its units. score: the name of the score.
    Raises InputError for a question without contrasts, a level with several, or a margin that is not in (0, 1).
    """

    name: str
    contrasts: tuple[Contrast, ...]
    is_claim: bool = False
    margin: float = MARGIN
    score: str = "test_accuracy"

    def __post_init__(self) -> None:
        if not self.contrasts or (len(self.contrasts) > 1 and not self.is_claim):
            raise InputError(
                f"question {self.name!r} needs one contrast, or if it is a claim at least one; "
                f"got {len(self.contrasts)}"
            )
        if not 0 < self.margin < 1:
            raise InputError(f"the margin of question {self.name!r} must lie between 0 and 1, got {self.margin}")

    @property
    def worth(self) -> int:
        """The number of verdicts that it counts as when next_blocks chooses what to train."""
        return 2 if self.is_claim else 1


@dataclass(frozen=True)
class Plan:
    """All questions of a report and their schedule. It is recorded before the first score is seen.

    Raises InputError for no question, or for two of the same name.
    """

    questions: tuple[Question, ...]
    schedule: Schedule = SCHEDULE

    def __post_init__(self) -> None:
        names = [question.name for question in self.questions]
        twice = [name for name in names if names.count(name) > 1]
        if not names or twice:
            raise InputError(f"a plan needs questions with different names, got {twice[:1] or 'none'}")

    @property
    def level(self) -> float:
        """The level of each question. So at most a share LEVEL of reports contains a false verdict."""
        return LEVEL / len(self.questions)


class Look(NamedTuple):
    """What a contrast shows after its first n seeds. Differences are a - b, in the units of the score.

    weight: the look's, from the schedule. effect: difference of the means. sd: the standard error is sd / sqrt(n).
    df: degrees of freedom. p_zero: two-sided, against no difference. p_below: against a difference of -margin or less.
    p_above: against one of margin or more.
    """

    n: int
    weight: float
    effect: float
    sd: float
    df: float
    p_zero: float
    p_below: float
    p_above: float

    def interval(self, n_contrasts: int = 1) -> tuple[float, float]:
        """The interval (low, high) of the difference. It stays valid whichever look was the last.

        Its level is 1 - LEVEL * weight / n_contrasts. So the intervals of all looks of a question with n_contrasts hold
        together in at least 95 % of cases. This is for each question alone, not for all of a report together.
        """
        half = stdtrit(self.df, 1 - LEVEL * self.weight / n_contrasts / 2) * self.sd / math.sqrt(self.n)
        return float(max(self.effect - half, -1)), float(min(self.effect + half, 1))


def t_tests(
    a: np.ndarray, b: np.ndarray, paired: bool, margin: float, resolution: float = 0.0
) -> tuple[np.ndarray, ...]:
    """The fields effect, sd, df, p_zero, p_below and p_above of a Look, each of shape (...).

    a, b: (..., n) scores of the same seeds. resolution: the smallest step of a score (1 / test samples). sd is taken to
    be at least this, so that scores on which all seeds agree can be compared. Where both are 0, sd is infinite: then
    nothing is shown.
    Source: Student (1908) for pairs, else Welch (1947); p_below and p_above as in Schuirmann (1987).
    """
    effect, variance, df = _difference(a, b, paired)
    n = a.shape[-1]
    sd = np.maximum(np.sqrt(n * variance), resolution)
    sd = np.where(sd < 1e-9, np.inf, sd)  # rounding is no spread
    error = sd / np.sqrt(n)
    p_zero = 2 * stdtr(df, -np.abs(effect) / error)
    return effect, sd, df, p_zero, stdtr(df, -(effect + margin) / error), stdtr(df, (effect - margin) / error)


def take_looks(
    a: ArrayLike, b: ArrayLike, paired: bool, margin: float, schedule: Schedule, resolution: float = 0.0
) -> tuple[Look, ...]:
    """Every look that the scores of a contrast allow, the earliest first; none before the schedule's first.

    a: (R,) and b: (R',) scores in the order of their seeds. The first seeds that both have are used, equally many of
    each side. resolution: see t_tests.
    Raises InputError for scores that are not finite: a seed that diverged counts with the score of guessing.
    """
    sides = [np.asarray(side, dtype=float) for side in (a, b)]
    for side in sides:
        gaps = np.flatnonzero(~np.isfinite(side))
        if gaps.size:
            raise InputError(
                f"scores must be finite (a seed that diverged counts with the score of guessing), got "
                f"{side[gaps[0]]} for seed {gaps[0]}"
            )
    looks = []
    for n, weight in schedule.after(0):
        if n <= min(side.size for side in sides):
            tests = t_tests(sides[0][:n], sides[1][:n], paired, margin, resolution)
            looks.append(Look(n, weight, *(float(value) for value in tests)))
    return tuple(looks)


Looks = Sequence[Sequence[Look]]  # of one question: those taken of each of its contrasts


def look_at(
    plan: Plan, scores: Mapping[str, Mapping[str, ArrayLike]], resolution: float = 0.0
) -> dict[str, tuple[tuple[Look, ...], ...]]:
    """{question: all looks that the scores allow of each of its contrasts}.

    scores: {score: {configuration: (R,) in the order of the seeds}}, for the score of each question. A configuration
    that has not been trained may be missing.
    """
    looks = {}
    for question in plan.questions:
        of = scores[question.score]
        pairs = [(of.get(contrast.a, ()), of.get(contrast.b, ()), contrast.paired) for contrast in question.contrasts]
        looks[question.name] = tuple(take_looks(*pair, question.margin, plan.schedule, resolution) for pair in pairs)
    return looks


class PValues(NamedTuple):
    """The p-values of three answers to a question: good (better, supported), bad (worse, refuted) and same.

    An answer is shown where its p-value is small.
    """

    good: float
    bad: float
    same: float


def p_values(looks: Looks) -> PValues:
    """The p-values of the three answers to a question, not yet adjusted for the number of questions.

    looks: at least one of each of its k contrasts. A contrast's own p-value is its smallest p / weight over the looks.
    good: no difference is -margin or less, and at least one is above 0 (k times the smallest p_zero).
    bad: at least one difference is below 0 (k times the smallest p_zero).
    same: all differences are within the margin.
    Whatever is true, the chance that a false answer has a p-value of a or less is at most a:
    - Some difference is -margin or less. Then good and same are false, and both need this contrast's p_below.
    - None is, but some difference is margin or more. Then same is false. It needs this contrast's p_above, which is
      small as well wherever this contrast speaks for bad. If the k - 1 others speak for bad, that may be false too,
      with a chance of (k - 1) a / 2k. So the p-value of same is divided by what is left, (k + 1) / 2k.
    - All are within the margin. Then good or bad can be false, each with a chance of a / 2, as p_zero is two-sided.
    """
    k = len(looks)
    below = [min(look.p_below / look.weight for look in of_one) for of_one in looks]
    above = [min(look.p_above / look.weight for look in of_one) for of_one in looks]
    better = [look.p_zero / look.weight for of_one in looks for look in of_one if look.effect > 0]
    worse = [look.p_zero / look.weight for of_one in looks for look in of_one if look.effect < 0]
    good = max(max(below), k * min(better, default=1.0))
    return PValues(good, k * min(worse, default=1.0), 2 * k / (k + 1) * max(below + above))


@dataclass(frozen=True)
class Answer:
    """The answer to a question so far.

    verdict: BETTER, WORSE or SAME for a level; SUPPORTED, REFUTED or SAME for a claim. If none is shown, AT_MOST or
    UNDECIDED; before the first look, NOT_TESTED.
    p_value: of the verdict, or the smallest if there is none, multiplied by the number of questions, and at most 1.
    at_most: for a level the largest difference, up or down, that the interval leaves open; for a claim the most by
    which a good configuration may be worse than a rival. It holds with 95 % for each question alone.
    looks: the latest look of each contrast.
    """

    verdict: str
    p_value: float = 1.0
    at_most: float = 1.0
    looks: tuple[Look, ...] = ()

    @property
    def decided(self) -> bool:
        """Whether there is a verdict, so that no more seeds are needed."""
        return self.verdict not in (AT_MOST, UNDECIDED, NOT_TESTED)


def answer(question: Question, looks: Looks, n_questions: int) -> Answer:
    """Answer one of n_questions, each at level LEVEL / n_questions, from the looks of each of its contrasts.

    Several answers can be true at once. SAME is the verdict before the others. A claim is supported and refuted where
    its configuration is better than one rival, and worse than another by less than the margin. So that the verdict does
    not depend on what is shown first, REFUTED waits as long as the effects look like this. To wait is never false.
    """
    if not all(looks):
        return Answer(NOT_TESTED)
    p = p_values(looks)
    if _looks_good(looks, question.margin):
        p = p._replace(bad=1.0)
    latest = tuple(of_one[-1] for of_one in looks)
    intervals = [look.interval(len(latest)) for look in latest]
    at_most = max(0.0, *(-low for low, _ in intervals))
    if not question.is_claim:
        at_most = max(at_most, intervals[0][1])
    names = (SUPPORTED, REFUTED) if question.is_claim else (BETTER, WORSE)
    verdict, p_value = AT_MOST if at_most <= USEFUL_BOUND * question.margin else UNDECIDED, min(p)
    for name, value in zip((SAME, *names), (p.same, p.good, p.bad), strict=True):
        if value <= LEVEL / n_questions:
            verdict, p_value = name, value
            break
    return Answer(verdict, min(1.0, n_questions * p_value), at_most, latest)


def _looks_good(looks: Looks, margin: float) -> bool:
    """Whether the latest effects are as a supported claim has them: one above 0, and none at -margin or below."""
    effects = [of_one[-1].effect for of_one in looks]
    return max(effects) > 0 and min(effects) > -margin


def answers(plan: Plan, looks: Mapping[str, Looks]) -> dict[str, Answer]:
    """{question: its answer}.  looks: as look_at returns them."""
    return {q.name: answer(q, looks[q.name], len(plan.questions)) for q in plan.questions}


class Purchase(NamedTuple):
    """What to train next for a question.

    seeds: {configuration: number of seeds to bring it to}. seconds: predicted for this training.
    per_verdict: predicted seconds until the question is decided, divided by the verdicts that it counts as. All
    questions that wait for a configuration share the seconds of its seeds.
    """

    question: str
    seeds: dict[str, int]
    seconds: float
    per_verdict: float


def predicted_seeds(sd: float, gap: float, level: float) -> float:
    """Seeds after which a one-sided t test at this level shows a difference of gap in 80 % of cases.

    sd: see Look. gap: the distance of the true difference from the null, above 0, in the same units.
    """
    return ((NormalDist().inv_cdf(1 - level) + POWER_QUANTILE) * sd / gap) ** 2 + 3


Needs = dict[Contrast, float]  # the seeds that a contrast should have on each side


def next_blocks(
    plan: Plan, looks: Mapping[str, Looks], seeds: Mapping[str, int], seconds: Mapping[str, float]
) -> tuple[list[Purchase], dict[str, float]]:
    """What to train next, with the cheapest verdict first, and the questions that are given up.

    looks: as look_at returns them, all that the seeds allow. seeds: {configuration: number of seeds it has}; those
    without any may be missing. seconds: {configuration: predicted training seconds of one seed}, for each in the plan;
    math.inf if it cannot be trained.
    Returns ([Purchase, ...], {question: predicted seeds on each side}).
    There is a purchase for each undecided question that is predicted to be decided by the last look. It brings the
    contrasts that need more seeds to their next look. Train the first, then call this again; stop if there is none.
    (To train several at once, take more from the front; they may name the same configuration.)
    All other undecided questions are given up, and the second value has the seeds that each is predicted to need.
    """
    last = plan.schedule.looks[-1]
    wanted: list[tuple[Question, Needs]] = []
    given_up = {}
    for question in plan.questions:
        if answer(question, looks[question.name], len(plan.questions)).decided:
            continue
        ways = _ways_to_decide(question, looks[question.name], plan)
        possible = [way for way in ways if max(way.values()) <= last and math.isfinite(_seconds(way, seeds, seconds))]
        if possible:
            wanted.append((question, min(possible, key=lambda way: _seconds(way, seeds, seconds))))
        else:
            given_up[question.name] = min((max(way.values()) for way in ways), default=math.inf)
    waiting: dict[str, int] = {}  # verdicts that wait for a configuration
    for question, way in wanted:
        for configuration in _missing(way, seeds):
            waiting[configuration] = waiting.get(configuration, 0) + question.worth
    shared = {configuration: seconds[configuration] / n for configuration, n in waiting.items()}
    purchases = []
    for question, way in wanted:
        step: Needs = {}
        for contrast, taken in zip(question.contrasts, looks[question.name], strict=True):
            if contrast in way:
                step[contrast] = plan.schedule.after(taken[-1].n if taken else 0)[0][0]
        prices = _seconds(step, seeds, seconds), _seconds(way, seeds, shared)
        purchases.append(Purchase(question.name, _missing(step, seeds), *prices))
    return sorted(purchases, key=lambda purchase: purchase.per_verdict), given_up


def _missing(needs: Needs, seeds: Mapping[str, int]) -> dict[str, int]:
    """{configuration: seeds needed}, for those that have fewer."""
    target: dict[str, int] = {}
    for contrast, n in needs.items():
        for configuration in (contrast.a, contrast.b):
            if n > seeds.get(configuration, 0):
                target[configuration] = max(target.get(configuration, 0), int(n))
    return target


def _seconds(needs: Needs, seeds: Mapping[str, int], seconds: Mapping[str, float]) -> float:
    """Predicted training seconds of the seeds that are missing."""
    return sum((n - seeds.get(name, 0)) * seconds[name] for name, n in _missing(needs, seeds).items())


def _ways_to_decide(question: Question, looks: Looks, plan: Plan) -> list[Needs]:
    """The seeds that each contrast needs, for each of the answers that more seeds could show.

    If the measured effects are true, a contrast with this many seeds shows its part in about 80 % of cases.
    """
    pairs = list(zip(question.contrasts, looks, strict=True))
    untested: Needs = {contrast: plan.schedule.looks[0] for contrast, taken in pairs if not taken}
    if untested:
        return [untested]

    k, margin, schedule = len(pairs), question.margin, plan.schedule
    not_worse: Needs = {}
    same: Needs = {}
    better: Needs = {}
    worse: Needs = {}
    for contrast, taken in pairs:
        not_worse[contrast] = _seeds_to_show(taken, "p_below", margin, plan.level, schedule)
        same[contrast] = max(
            _seeds_to_show(taken, null, margin, plan.level * (k + 1) / (2 * k), schedule)
            for null in ("p_below", "p_above")
        )
        side = better if taken[-1].effect > 0 else worse
        side[contrast] = _seeds_to_show(taken, "p_zero", margin, plan.level / k, schedule)
    ways = [same]
    if better:
        nearest = min(better, key=lambda contrast: better[contrast])
        ways.append(not_worse | {nearest: max(not_worse[nearest], better[nearest])})
    if worse and not _looks_good(looks, margin):
        nearest = min(worse, key=lambda contrast: worse[contrast])
        ways.append({nearest: worse[nearest]})
    needs = [{contrast: n for contrast, n in way.items() if n > 0} for way in ways]
    return [way for way in needs if way]


def _seeds_to_show(taken: Sequence[Look], null: str, margin: float, level: float, schedule: Schedule) -> float:
    """The seeds of the first look to come that is predicted to reject a null at this level, 0 if a look already did.

    null: the field of Look with its p-value. If no look is predicted to reject it, the predicted seeds, which are more
    than those of the last look.
    """
    latest, one_sided = taken[-1], level
    gap = {"p_below": margin + latest.effect, "p_above": margin - latest.effect, "p_zero": abs(latest.effect)}[null]
    if null == "p_zero":  # a two-sided test, which is to reject on the side where the effect lies
        taken, one_sided = [look for look in taken if look.effect * latest.effect >= 0], level / 2
    if min(getattr(look, null) / look.weight for look in taken) <= level:
        return 0
    if gap <= 0:
        return math.inf
    n = math.inf
    for look, weight in zip(schedule.looks, schedule.weights, strict=True):
        n = predicted_seeds(latest.sd, gap, one_sided * weight)
        if look > latest.n and n <= look:
            return look
    return max(n, schedule.looks[-1] + 1)
