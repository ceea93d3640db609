"""Questions that are looked at several times: their tests, verdicts, next blocks, and simulated reports."""

import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.weightstats import ttost_ind, ttost_paired

from ctbprn_lib import InputError, evidence
from ctbprn_lib.audit import simulate
from ctbprn_lib.evidence import (
    AT_MOST,
    BETTER,
    NOT_TESTED,
    REFUTED,
    SAME,
    SUPPORTED,
    UNDECIDED,
    WORSE,
    Contrast,
    Plan,
    Question,
    Schedule,
)

CONFIRMED = Path(__file__).parents[1] / "reports" / "ctbprn" / "confirmed.csv"
ONE_LOOK = Schedule((8,), (1.0,))


def level(name="x against base", a="x", paired=True, **kwargs):
    return Question(name, (Contrast(a, "base", paired),), **kwargs)


def claim(*rivals, good="base"):
    return Question("claim", tuple(Contrast(good, rival, True) for rival in rivals), is_claim=True)


def answer(question, scores, n_questions=1, schedule=evidence.SCHEDULE, resolution=0.0):
    looks = evidence.look_at(Plan((question,), schedule), {question.score: scores}, resolution)
    return evidence.answer(question, looks[question.name], n_questions)


def made(n, seed=0, spread=0.003, **effects):
    """Scores of "base" and of configurations that differ from it by these effects, in pairs."""
    rng = np.random.default_rng(seed)
    base = rng.normal(0.95, 0.01, n)
    return {"base": base} | {name: base + effect + rng.normal(0, spread, n) for name, effect in effects.items()}


@pytest.mark.parametrize(("paired", "shape"), [(True, (3, 8)), (False, (3, 8)), (False, (2,))])
def test_t_tests_agree_with_scipy_and_statsmodels(paired, shape):
    a, b = np.random.default_rng(0).normal(0.95, [[[0.01]], [[0.02]]], (2, 3, 8))[:, : shape[0] if shape[1:] else 1]
    effect, sd, df, p_zero, p_below, p_above = evidence.t_tests(a, b, paired, 0.01)
    for i in range(len(a)):
        test = stats.ttest_rel(a[i], b[i]) if paired else stats.ttest_ind(a[i], b[i], equal_var=False)
        tost = ttost_paired(a[i], b[i], -0.01, 0.01) if paired else ttost_ind(a[i], b[i], -0.01, 0.01, usevar="unequal")
        assert p_zero[i] == pytest.approx(test.pvalue) and df[i] == pytest.approx(test.df)
        assert (p_below[i], p_above[i]) == (pytest.approx(tost[1][1]), pytest.approx(tost[2][1]))
        look = evidence.Look(8, 0.4, effect[i], sd[i], df[i], p_zero[i], p_below[i], p_above[i])
        assert look.interval() == pytest.approx(tuple(test.confidence_interval(1 - 0.05 * 0.4)))


def test_looks_are_taken_of_the_first_seeds_that_both_sides_have():
    scores = made(40, x=0.01)
    looks = evidence.take_looks(scores["x"], scores["base"][:17], True, 0.01, evidence.SCHEDULE)
    assert [(look.n, look.weight) for look in looks] == [(8, 0.4), (16, 0.2)]
    alone = evidence.take_looks(scores["x"][:8], scores["base"][:8], True, 0.01, evidence.SCHEDULE)
    assert looks[:1] == alone and not evidence.take_looks([0.9] * 7, [0.8] * 20, True, 0.01, evidence.SCHEDULE)


def test_more_looks_never_take_evidence_away():
    for seed in range(20):
        scores = made(64, seed, x=0.004, y=-0.004, base2=0)
        for question in (level(), claim("x", "y")):
            looks = evidence.look_at(Plan((question,)), {"test_accuracy": scores})[question.name]
            p = np.array([evidence.p_values([of_one[:n] for of_one in looks]) for n in (1, 2, 3, 4)])
            assert (np.diff(p, axis=0) <= 0).all()


@pytest.mark.parametrize(("effect", "verdict"), [(0.02, BETTER), (-0.02, WORSE), (0, SAME), (0.002, SAME)])
def test_a_level_is_better_worse_or_the_same(effect, verdict):
    found = answer(level(), made(16, x=effect), n_questions=40)
    assert found.verdict == verdict and found.decided and found.p_value < 0.05
    assert abs(effect) < found.at_most < abs(effect) + 0.01


@pytest.mark.parametrize(
    ("effects", "verdict"),
    [((-0.02, 0), SUPPORTED), ((-0.02, -0.03), SUPPORTED), ((0.02, 0), REFUTED), ((0, 0.001), SAME),
     ((-0.02, 0.02), REFUTED), ((-0.02, 0.004), SUPPORTED)],
)  # fmt: skip
def test_a_claim_is_supported_refuted_or_the_same(effects, verdict):
    found = answer(claim("x", "y"), made(32, x=effects[0], y=effects[1]), n_questions=40)
    assert found.verdict == verdict and found.p_value < 0.05
    assert max(0, *effects) <= found.at_most < max(0, *effects) + 0.01  # what following it may cost


def test_a_claim_is_not_refuted_while_the_effects_support_it():
    scores = made(8, spread=0.003, x=-0.02, y=0.0075)  # base is better than x, and within the margin of y
    assert answer(level(a="y"), scores, 40).verdict == BETTER
    assert answer(claim("x", "y"), scores, 40).verdict == AT_MOST
    assert answer(claim("y"), scores, 40).verdict == REFUTED
    assert answer(claim("x", "y"), made(128, spread=0.003, x=-0.02, y=0.0075), 40).verdict == SUPPORTED


def test_without_a_verdict_there_is_a_bound_or_nothing():
    bounded = answer(level(), made(8, spread=0.015, x=0.0), 40)
    assert bounded.verdict == AT_MOST and 0.01 < bounded.at_most <= 0.03 and not bounded.decided
    open_still = answer(level(), made(8, spread=0.2, x=0.0), 40)
    assert open_still.verdict == UNDECIDED and open_still.at_most > 0.03 and open_still.p_value == 1
    assert answer(level(), made(7, x=0.02)).verdict == answer(level(), {}).verdict == NOT_TESTED
    wide = answer(level(margin=0.05), made(16, x=0.02), 40)
    assert wide.verdict == SAME  # a question has a margin of its own
    assert answer(level(margin=0.05), made(8, spread=0.07, x=0.0), 40).verdict == AT_MOST  # up to three margins


def test_more_questions_ask_for_more_evidence():
    scores = made(8, spread=0.01, x=0.02)
    few, many = (answer(level(), scores, n) for n in (2, 100))
    assert few.verdict == BETTER and many.verdict == AT_MOST and few.p_value < many.p_value


def test_scores_that_all_seeds_share():
    ones = dict.fromkeys(["base", "x"], np.ones(16))
    for paired in (True, False):
        unknown = answer(level(paired=paired), ones)
        assert unknown.verdict == UNDECIDED and unknown.at_most == 1  # no spread, no test
        assert answer(level(paired=paired), ones, 40, resolution=1 / 8192).verdict == SAME
        assert not answer(level(paired=paired), ones, 40, resolution=1 / 50).decided  # too few test samples
        lower = {"base": np.ones(16), "x": np.full(16, 0.97)}
        assert answer(level(paired=paired), lower, 40, resolution=1 / 8192).verdict == WORSE


def test_a_seed_that_diverged_counts_as_guessing_and_a_gap_is_refused():
    scores = made(16, x=0.02)
    scores["x"][3] = 0.5
    assert not answer(level(), scores).decided  # one such seed hides what the others show
    scores["x"][3] = math.nan
    with pytest.raises(InputError, match=r"must be finite .* got nan for seed 3"):
        answer(level(), scores)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: Schedule((8, 8), (0.5, 0.5)), "must rise"), (lambda: Schedule((16, 8), (0.5, 0.5)), "must rise"),
    (lambda: Schedule((1, 8), (0.5, 0.5)), "at least 2"), (lambda: Schedule((8.5,), (0.5,)), "whole numbers"),
    (lambda: Schedule((), ()), "whole numbers"), (lambda: Schedule((8, 16), (0.5,)), "2 looks needs one weight, got 1"),
    (lambda: Schedule((8, 16), (0.6, 0.5)), "at most 1"), (lambda: Schedule((8, 16), (0.6, 0.0)), "above 0"),
    (lambda: Schedule((8,), (math.nan,)), "above 0"), (lambda: Contrast("x", "x", True), "two different"),
    (lambda: Question("q", ()), "needs one contrast"), (lambda: level(margin=0), "must lie between 0 and 1"),
    (lambda: Question("q", (Contrast("x", "y", True), Contrast("x", "z", True))), "got 2"),
    (lambda: Plan(()), "got none"), (lambda: Plan((level(), level())), "different names, got .*x against base"),
])  # fmt: skip
def test_bad_plans_are_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_intervals_hold_the_truth_even_if_the_worst_look_is_chosen():
    """2,000 contrasts: all intervals of all looks hold the truth in at least 94 % of cases."""
    rng = np.random.default_rng(0)
    a, b = (1 - 0.03 * np.exp(0.25 * rng.normal(size=(2, 2000, 64)) - 0.25**2 / 2)).round(5)
    held = np.ones(2000, dtype=bool)
    for n, weight in ((8, 0.4), (16, 0.2), (32, 0.2), (64, 0.2)):
        fields = np.transpose(evidence.t_tests(a[:, :n], b[:, :n], False, 0.01))
        intervals = np.array([evidence.Look(n, weight, *values).interval() for values in fields.tolist()])
        held &= (intervals[:, 0] <= 0) & (intervals[:, 1] >= 0)
    assert 0.94 < held.mean() < 0.99


@pytest.mark.parametrize(
    ("spread", "differences"),
    [(0.02, (0.0,)), (0.006, (0.01,)), (0.006, (-0.01,)), (0.02, (0, 0, 0)), (0.006, (0.01, 0, 0)),
     (0.006, (-0.01, 0, 0)), (0.02, (0.01, 0.01, 0))],
)  # fmt: skip
def test_a_question_is_answered_wrongly_in_at_most_five_percent(spread, differences):
    """3,000 questions at level 5 %, at the corners of what is true, with looks at 8 and 32 seeds, all taken."""
    rng = np.random.default_rng(len(differences))
    schedule, n_questions, k = Schedule((8, 32), (0.5, 0.5)), 3000, len(differences)
    scores = rng.normal(0, spread, (n_questions, k, 32)) + np.array(differences)[:, None]
    looks = []
    for n, weight in schedule.after(0):
        fields = np.moveaxis(evidence.t_tests(scores[..., :n], np.zeros((1, 1, n)), True, 0.01), 0, -1)
        looks.append([[evidence.Look(n, weight, *one) for one in many] for many in fields.tolist()])
    question = claim(*"abc"[:k]) if k > 1 else level()
    wrong = 0
    for i in range(n_questions):
        found = evidence.answer(question, [[of_all[i][j] for of_all in looks] for j in range(k)], 1)
        wrong += simulate.is_false(found.verdict, np.array(differences))
    assert 0 < wrong <= stats.binom.ppf(0.999, n_questions, 0.05)


def test_predicted_seeds_decide_in_about_eighty_percent():
    rng = np.random.default_rng(0)
    for sd, gap, alpha in ((0.01, 0.01, 1e-3), (0.02, 0.01, 1e-4)):
        n = round(evidence.predicted_seeds(sd, gap, alpha))
        scores = rng.normal(gap, sd, (4000, n))
        p = stats.ttest_1samp(scores, 0, axis=1, alternative="greater").pvalue
        assert 0.65 < np.mean(p < alpha) < 0.85
    assert evidence.predicted_seeds(0.01, 0.005, 1e-3) > evidence.predicted_seeds(0.01, 0.01, 1e-3)


def run_until_done(plan, scores, seconds):
    """Buy until there is nothing to buy. Returns (purchases, answers, what was given up, seeds)."""
    seeds, bought = dict.fromkeys(scores, 0), []
    while True:
        so_far = {"test_accuracy": {name: values[: seeds[name]] for name, values in scores.items()}}
        looks = evidence.look_at(plan, so_far)
        answers = evidence.answers(plan, looks)
        purchases, given_up = evidence.next_blocks(plan, looks, seeds, seconds)
        for purchase in purchases:
            assert not answers[purchase.question].decided and purchase.question not in given_up
            assert purchase.seeds and purchase.per_verdict > 0
            assert all(seeds[name] < n <= plan.schedule.looks[-1] for name, n in purchase.seeds.items())
        undecided = {name for name, found in answers.items() if not found.decided}
        assert undecided == {purchase.question for purchase in purchases} | set(given_up)
        if not purchases:
            return bought, answers, given_up, seeds
        bought.append(purchases[0])
        seeds |= purchases[0].seeds


def test_blocks_are_bought_until_all_is_decided_or_given_up():
    names = {"plain": -0.05, "near": 0.004, "same": 0.0, "wild": 0.006}
    scores = made(128, spread=0.005, **names)
    scores["wild"] = scores["wild"] + np.random.default_rng(9).normal(0, 0.2, 128)
    questions = tuple(level(name, name) for name in names)
    plan = Plan((*questions, claim("plain", "same")))
    bought, answers, given_up, seeds = run_until_done(plan, scores, dict.fromkeys(scores, 1.0))
    assert [answers[name].verdict for name in ("plain", "same", "claim")] == [WORSE, SAME, SUPPORTED]
    assert set(given_up) == {"wild"} and given_up["wild"] > 128
    assert seeds["plain"] == seeds["wild"] == 8 and seeds["base"] == max(seeds.values())
    assert len(bought) <= 5 * len(plan.questions)


def test_the_cheapest_verdict_comes_first_and_what_cannot_be_trained_never():
    scores = made(128, spread=0.008, cheap=0.0, dear=0.0, broken=0.0)
    plan = Plan(tuple(level(name, name) for name in ("dear", "cheap", "broken")))
    seconds = {"base": 1.0, "cheap": 1.0, "dear": 50.0, "broken": math.inf}
    bought, answers, given_up, seeds = run_until_done(plan, scores, seconds)
    assert bought[0].question == "cheap" and seeds["broken"] == 0
    assert set(given_up) == {"broken"} and answers["broken"].verdict == NOT_TESTED


def test_a_configuration_that_many_wait_for_costs_each_a_part():
    both = made(8, spread=0.008, a=0.0)
    scores = {"test_accuracy": dict.fromkeys("abcd", both["a"]) | dict.fromkeys(["base", "other"], both["base"])}
    questions = [level(name, name) for name in "abc"] + [Question("alone", (Contrast("d", "other", True),))]
    plan, seeds = Plan(tuple(questions)), dict.fromkeys(scores["test_accuracy"], 8)
    seconds = dict.fromkeys(seeds, 1.0)
    purchases, _ = evidence.next_blocks(plan, evidence.look_at(plan, scores), seeds, seconds)
    assert {purchase.seeds.get("base", 16) for purchase in purchases} == {16} and purchases[-1].question == "alone"
    has_base = evidence.next_blocks(plan, evidence.look_at(plan, scores), seeds | {"base": 128}, seconds)[0]
    assert all("base" not in purchase.seeds for purchase in has_base)
    assert {purchase.seconds for purchase in has_base if purchase.question != "alone"} == {8.0}
    as_claim = Plan((replace(questions[3], is_claim=True), *questions[:3]))
    purchases, _ = evidence.next_blocks(as_claim, evidence.look_at(as_claim, scores), seeds, seconds)
    assert purchases[0].question == "alone"  # a claim counts as two verdicts


@pytest.fixture(scope="module")
def study():
    return simulate.measured(CONFIRMED)


def test_the_questions_of_the_committed_study(study):
    assert {c.b for question in study.levels for c in question.contrasts} < set(study.names)
    assert all(study.seconds[name] > 0 for name in study.names) and set(study.levels) < set(study.plan.questions)
    paired = {question.name: question.contrasts[0].paired for question in study.levels}
    assert not any(pairs for name, pairs in paired.items() if name.startswith(("d ", "rank ")))
    assert all(pairs for name, pairs in paired.items() if name.startswith(("lr ", "batch_size ")))
    assert len(paired) == 29 and sorted(study.claims.values()) == [1] * 10 + [3]
    assert len(study.plan.questions) == 29 + 12 + 3 + 2


def test_simulated_scores_have_the_means_and_pairs_of_the_study(study):
    accuracy = study.accuracy - 0.002
    scores = study.draw(accuracy, 400, 8, np.random.default_rng(0))
    assert scores.mean((0, 2)) == pytest.approx(accuracy, abs=0.002)
    logs = np.log(1 - scores).reshape(400, len(study.names), 8)
    flat = np.corrcoef(np.moveaxis(logs, 1, 0).reshape(len(study.names), -1))
    measured = np.corrcoef(study.deviations)
    for i, j in itertools.combinations(range(len(study.names)), 2):
        expected = measured[i, j] if study.groups[i] == study.groups[j] else 0
        assert flat[i, j] == pytest.approx(expected, abs=0.09)


@pytest.mark.parametrize("truth", ["nothing matters", "half one point worse"])
def test_simulated_reports_say_hardly_anything_false(study, truth):
    """200 reports that take every look of every question; one point is the margin."""
    accuracy = study.truths()[truth]
    differences = {q.name: study.differences(q, accuracy) for q in (*study.levels, *study.claims)}
    wrong = 0
    for part in range(4):
        scores = study.draw(accuracy, 50, 128, np.random.default_rng(part))
        for looks in simulate.all_looks(study, scores, study.plan.schedule):
            found = evidence.answers(study.plan, looks)
            wrong += any(simulate.is_false(found[name].verdict, true) for name, true in differences.items())
    assert wrong <= stats.binom.ppf(0.99, 200, 0.05)


def test_rules_are_compared_on_the_same_reports(study):
    table = simulate.rules(study, study.accuracy, 4, seed=0).set_index("rule")
    for budget in (2, 3, 4):
        assert table["seed_runs"].iloc[budget + 1] <= budget * 8 * len(study.names)
    blocks = table[table.index.str.startswith("looks")]
    for column in ("seed_runs", "levels", "claims"):
        assert blocks[column].is_monotonic_increasing
    assert table["levels"].iloc[-1] >= blocks["levels"].max() > table.loc["fixed 8 seeds, Holm", "levels"]
    assert table["false"].between(0, 1).all() and table["covered"].dropna().between(0.8, 1).all()


@pytest.mark.parametrize(
    ("verdict", "differences", "wrong"),
    [(SAME, [0.005, 0.01], True), (SAME, [0.005, -0.005], False), (BETTER, [0.001], False), (BETTER, [0], True),
     (WORSE, [0], True), (WORSE, [-0.001], False), (SUPPORTED, [0.02, -0.01], True), (SUPPORTED, [0.02, 0], False),
     (REFUTED, [0.02, 0], True), (REFUTED, [0.02, -0.001], False), (AT_MOST, [0.5], False), (UNDECIDED, [0], False)],
)  # fmt: skip
def test_what_makes_a_verdict_false(verdict, differences, wrong):
    assert simulate.is_false(verdict, np.array(differences)) == wrong


@pytest.mark.parametrize("change", [
    lambda rows: [row for row in rows if not row.startswith("trial ")],
    lambda rows: [row for row in rows if not row.startswith(",")], lambda rows: rows[:1],
    lambda rows: [row.replace(",lr,", ",mood,").replace(",d,", ",mood,") for row in rows[:60]][:58],
])  # fmt: skip
def test_a_study_without_what_is_simulated_is_refused(tmp_path, change):
    rows = CONFIRMED.read_text(encoding="utf-8").splitlines()
    path = tmp_path / "confirmed.csv"
    path.write_text("\n".join([rows[0], *change(rows[1:])]) + "\n", encoding="utf-8")
    with pytest.raises(InputError, match="expected a trial"):
        simulate.measured(path)
