"""Intervals and comparisons: relations, and simulation with fixed seeds."""

import numpy as np
import optuna
import pandas as pd
import pytest
from scipy import stats

from ctbprn_lib import InputError, evidence


def test_an_interval_holds_its_mean_and_widens_with_the_level():
    scores = [0.91, 0.95, 0.97, 0.94]
    mean, low, high = evidence.mean_interval(scores)
    assert low < mean < high and mean == pytest.approx(np.mean(scores))
    assert evidence.mean_interval(scores, 0.99)[1] < low
    assert evidence.mean_interval([*scores, np.nan]) == (mean, low, high)


@pytest.mark.slow
@pytest.mark.parametrize("n", [4, 8, 16])
def test_intervals_cover_what_they_say(n):
    """2,000 simulated sets of normal scores: 95 % intervals hold the truth in 93 to 97 % of them."""
    rng = np.random.default_rng(n)
    hits = [low <= 0.9 <= high for _, low, high in map(evidence.mean_interval, rng.normal(0.9, 0.02, (2_000, n)))]
    assert 0.93 < np.mean(hits) < 0.97


@pytest.mark.slow
@pytest.mark.parametrize("n", [4, 8, 16])
def test_intervals_cover_scores_like_ours_too(n):
    """2,000 sets of accuracies near 1, errors lognormal over seeds: 93 to 97 % of intervals hold the true mean."""
    rng = np.random.default_rng(n)
    errors = 0.03 * np.exp(0.3 * rng.normal(size=(2_000, n)) - 0.3**2 / 2)
    hits = [low <= 0.97 <= high for _, low, high in map(evidence.mean_interval, 1 - errors)]
    assert 0.93 < np.mean(hits) < 0.97


def test_an_interval_stays_where_scores_can_be():
    mean, low, high = evidence.mean_interval([0.9999, 0.998, 0.95])
    assert 0 < low < mean < high < 1
    mean, low, high = evidence.mean_interval([0.9701, 0.9699, 0.97])
    half = stats.t.ppf(0.975, 2) * stats.sem([0.9701, 0.9699, 0.97])
    assert (low, high) == (pytest.approx(mean - half, abs=1e-5), pytest.approx(mean + half, abs=1e-5))


@pytest.mark.slow
@pytest.mark.parametrize(("middle", "spread", "n"), [(1.0, 0.02, 2), (1.0, 0.02, 3), (1.0, 0.05, 4), (0.07, 0.25, 8)])
def test_intervals_cover_cross_entropies_too(middle, spread, n):
    """2,000 sets of CEs lognormal over seeds, around the chance of three classes and as ours are."""
    rng = np.random.default_rng(n)
    ces = middle * np.exp(spread * rng.normal(size=(2_000, n)) - spread**2 / 2)
    _, low, high = np.transpose([evidence.mean_interval(c, nats=True) for c in ces])
    assert 0.93 < np.mean((low <= middle) & (middle <= high)) < 0.97 and all(low > 0)


def test_equivalence_is_shown_by_small_differences_and_many_seeds_only():
    rng = np.random.default_rng(0)
    shown = {n: np.mean([evidence.equivalence(*rng.normal(0, 0.01, (2, n)), 0.01) < 0.05 for _ in range(300)])
             for n in (4, 8, 32)}  # fmt: skip
    assert shown[4] < shown[8] < shown[32] and shown[32] > 0.9
    at_the_margin = [
        evidence.equivalence(rng.normal(0.01, 0.01, 16), rng.normal(0, 0.01, 16), 0.01) for _ in range(1000)
    ]
    assert np.mean(np.array(at_the_margin) < 0.05) == pytest.approx(0.05, abs=0.02)
    shared = rng.normal(0, 1, 8)
    assert evidence.equivalence(shared + rng.normal(0, 1e-3, 8), shared, 0.01, paired=True) < 0.001
    for a, b, paired in (([26 / 40] * 3, [27 / 40] * 3, False), ([0.4, 0.7], [0.3, 0.6], True)):  # but for rounding
        assert evidence.compare(a, b, paired).p_value == 1 == evidence.equivalence(a, b, 0.01, paired)
    assert evidence.equivalence([1, 1], [1, 1], 0.01) == 1 == evidence.equivalence([1, 1], [0.5, 0.5], 0.01)


def some_trials(n, seed=0):
    """n trials of which x decides the score, y and the placebo nothing."""
    rng = np.random.default_rng(seed)
    kinds = {name: optuna.distributions.FloatDistribution(0, 1) for name in ("x", "y", "placebo")}
    trials = [optuna.create_trial(params={name: float(rng.random()) for name in kinds}, distributions=kinds, value=0.0)
              for _ in range(n)]  # fmt: skip
    return trials, np.array([trial.params["x"] + 0.05 * rng.normal() for trial in trials])


def test_importance_names_what_decides_and_calls_the_rest_noise():
    trials, ranking = some_trials(60)
    table = evidence.importance(trials, ranking, n_resamples=60).set_index("name")
    assert table.index[0] == "x" and table.loc["x", "beats_placebo"]
    assert not table.loc["y", "beats_placebo"] and not table.loc["placebo", "beats_placebo"]
    assert table["importance"].sum() == pytest.approx(1) and (table["low"] <= table["high"]).all()


@pytest.mark.slow
def test_what_does_nothing_seldom_beats_the_placebo():
    wrong = 0
    for seed in range(10):
        trials, _ = some_trials(30, seed)
        ranking = np.random.default_rng(100 + seed).random(30)
        table = evidence.importance(trials, ranking, n_resamples=60)
        wrong += table["beats_placebo"].sum()
    assert wrong <= 2  # of 30


def test_comparisons_have_the_sign_of_the_difference_and_reject_as_often_as_they_say():
    c = evidence.compare([0.9, 0.92, 0.91], [0.8, 0.83, 0.81])
    assert c.low < c.effect < c.high and c.effect == pytest.approx(0.0967, abs=1e-3) and c.p_value < 0.01
    assert evidence.compare([0.8, 0.83, 0.81], [0.9, 0.92, 0.91]).effect == -c.effect
    rng = np.random.default_rng(0)
    p = [evidence.compare(*rng.normal(size=(2, 6))).p_value for _ in range(2000)]
    assert np.mean(np.array(p) < 0.05) == pytest.approx(0.05, abs=0.012)


def test_pairs_remove_what_both_share():
    rng = np.random.default_rng(0)
    shared = rng.normal(0, 1, 8)
    a, b = shared + rng.normal(0.3, 0.1, 8), shared
    assert evidence.compare(a, b, paired=True).p_value < 0.01 < evidence.compare(a, b).p_value


def test_scores_without_spread_are_compared_without_a_warning():
    assert evidence.compare([1, 1, 1], [1, 1]).p_value == 1
    assert evidence.compare([1, 1, 1], [0.5, 0.5]) == (0.5, 0.5, 0.5, 1)  # no spread, no test
    assert evidence.compare([0.975, 1], [0.95, 0.975], paired=True).p_value == 1


def test_few_samples_leave_much_open():
    low, high = evidence.sample_interval(0.9, 20)
    assert 0 < low < 0.9 < high < 1
    assert evidence.sample_interval(0.9, 2000)[0] > low and evidence.sample_interval(1.0, 12)[0] < 0.8


def test_holm_is_between_the_raw_and_bonferroni():
    p = np.array([0.01, 0.04, 0.03, 0.8])
    adjusted = evidence.holm(p)
    assert adjusted == pytest.approx([0.04, 0.09, 0.09, 0.8])
    assert (adjusted >= p).all() and (adjusted <= np.minimum(1, 4 * p)).all()


@pytest.mark.parametrize("call", [
    lambda: evidence.mean_interval([0.9]), lambda: evidence.mean_interval([0.9, np.nan]),
    lambda: evidence.mean_interval([0.1, 0.2], 1), lambda: evidence.mean_interval([1, 2]),
    lambda: evidence.mean_interval([-1, 2], nats=True), lambda: evidence.compare([1, 2], [1]),
    lambda: evidence.compare([1, 2], [1, 2, 3], paired=True),
])  # fmt: skip
def test_scores_that_are_too_few_or_none_are_refused(call):
    with pytest.raises(InputError):
        call()


def test_trends_find_what_is_there_and_not_what_is_not():
    rng = np.random.default_rng(1)
    trials = pd.DataFrame({"a": rng.random(30), "b": rng.random(30), "c": 1.0})
    trials["score"] = trials["a"] + 0.1 * rng.random(30)
    table = evidence.trends(trials, ["a", "b", "c"], "score").set_index("hyperparameter")
    assert table.loc["a", "rho"] > 0.9 and table.loc["a", "p_holm"] < 0.01
    assert table.loc["b", "p_holm"] > 0.05 and table.loc["c", "p_holm"] == 1
    few = evidence.trends(trials[:4], ["a"], "score")
    assert few.loc[0, "p_value"] >= 1 / 24  # four trials cannot decide, however they lie


def test_the_best_is_among_those_like_the_best():
    rng = np.random.default_rng(0)
    scores = np.array([0.1, 0.1, 0.9])[:, None] + rng.normal(0, 0.02, (3, 5))
    assert sorted(evidence.like_the_best(scores, 0)) == [0, 1]
    assert evidence.like_the_best(scores[:1], 0) == [0]


def test_the_pareto_front_is_what_nothing_beats():
    cost, gain = np.random.default_rng(0).random((2, 40))
    front = evidence.pareto_front(cost, gain)
    for i in range(40):
        beaten = any(cost[j] <= cost[i] and gain[j] >= gain[i] for j in range(40) if j != i)
        assert front[i] == (not beaten)
