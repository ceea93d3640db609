"""Verdicts: what follows from scores that are known, and how often whole simulated reports are wrong."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ctbprn_lib import report as reports_of
from ctbprn_lib import search, tasks
from ctbprn_lib.audit import simulate
from ctbprn_lib.evidence import BETTER, REFUTED, SAME, SUPPORTED, UNDECIDED, WORSE
from ctbprn_lib.report import comparisons, tables, text
from ctbprn_lib.report.comparisons import CLAIMS, Comparisons, Decision
from ctbprn_lib.report.text import claims_table

GOLDEN = Path(__file__).parent / "golden"
NOTHING_MATTERS = 60  # simulated reports
SPACE = search.default_space(tasks.RoutingTask())


def report(n_seeds=8, seed=0, **kwargs):
    return Comparisons(simulate.runs(n_seeds, np.random.default_rng(seed), **kwargs))


def verdict_of(made, claim):
    rows = claims_table(made.claims()).set_index("claim")
    return next(row["verdict"] for quote, row in rows.iterrows() if claim in quote)


def test_every_claim_of_the_original_is_quoted():
    page = (GOLDEN / "published_report.md").read_text()
    claims = page.split("## Key Findings")[1].split("## Generated Plots")[0]
    lines = [line.strip()[2:] for line in claims.splitlines() if line.strip().startswith("- ")]
    assert [claim.quote for claim in CLAIMS] == lines and len(lines) >= 14


def test_where_nothing_matters_hardly_any_report_says_that_something_does():
    """At most 5 % of reports may hold a false "better" or "worse"; 7 of 60 would be one chance in 33 at 5 %."""
    wrong = 0
    for seed in range(NOTHING_MATTERS):
        tests = report(seed=seed).tests
        wrong += tests["verdict"].isin([BETTER, WORSE]).any()
    assert wrong < 7, wrong


def test_an_effect_of_two_points_is_found_by_as_many_seeds_as_the_report_says():
    """With the spread of reports/ctbprn 8 seeds find it in about two reports of three, and the report asks for more."""
    made = report()
    accuracy = made.tests[made.tests["score"] == "test_accuracy"].groupby("paired")["sd"].median()
    needed = [made.seeds_to_find({"sd": sd, "paired": paired}, 0.02) for paired, sd in accuracy.items()]
    assert 8 < needed[0] < needed[1] <= 20  # pairs have half the degrees of freedom
    found = []
    for seed in range(25):
        made = report(max(needed), seed, effects={("rank", 4): -0.02, ("lr", 1e-4): -0.02})
        t = made.tests
        tests = t[(t["kind"] == "ablation") & (t["base"] == made.base) & (t["score"] == "test_accuracy")]
        tests = tests.set_index(["factor", "a"]).sort_index()
        found += [tests.loc[("rank", "4"), "verdict"] == WORSE, tests.loc[("lr", "0.0001"), "verdict"] == WORSE]
    assert np.mean(found) >= 0.8


def test_verdicts_follow_the_effects():
    effects = {("d", 32): -0.03, ("d", 128): -0.03, ("seq_len", 32): -0.05, ("seq_len", 64): 0.015}
    made = report(effects=effects, spread=0.05)
    assert verdict_of(made, "64-96") == SUPPORTED
    assert verdict_of(made, "Larger sequence lengths") == REFUTED  # 64 is better than 128
    assert verdict_of(made, "Router rank of 16") == SAME
    assert verdict_of(made, "dimension to 96") == SAME
    # better than 32, and the same as the others: that supports it
    assert verdict_of(report(effects={("rank", 4): -0.03}, spread=0.05), "Router rank of 16") == SUPPORTED
    assert verdict_of(report(spread=1.0), "Router rank of 16") == UNDECIDED


def test_an_undecided_claim_says_how_many_seeds_would_decide_it():
    claims = claims_table(report(spread=1.0).claims())
    undecided = claims[claims["verdict"] == UNDECIDED]
    assert len(undecided) and undecided["detail"].str.contains(r"about \d+ seeds a level would decide it").all()
    made = report()
    narrow, wide, close = (
        [{"sd": sd, "effect": x, "paired": False}] for sd, x in ((0.01, 0.0), (0.03, 0.0), (0.01, 0.004))
    )
    needed = [made.seeds_needed(tests) for tests in (narrow, wide, close, narrow + wide)]
    assert 8 < needed[0] < needed[2] < needed[1] == needed[3]


def test_an_effect_that_needs_few_seeds_is_still_not_decided_by_those_there_are():
    assert report().seeds_needed([{"sd": 1e-4, "effect": 0.2, "paired": True}]) == 9


def test_what_no_run_can_decide_is_not_tested_yet_unless_another_record_decides_it():
    made = report()
    assert verdict_of(made, "Current configuration uses") == "not tested yet"
    decided = Decision(REFUTED, "routing")
    claims = made.claims({"published_accuracy": decided})
    assert [claim.record for claim, decision in claims.items() if decision is decided] == ["published_accuracy"]
    lacking = simulate.runs(8, np.random.default_rng(0))
    lacking = lacking[~((lacking["factor"] == "rank") & (lacking["level"] == 32))]
    assert verdict_of(Comparisons(lacking), "Router rank of 16") == "not tested yet"


def test_a_decided_p_is_printed_as_decided():
    test = dict(score="test_accuracy", effect=0.01, low=0.005, high=0.015)
    said = {p: text.effect(test | {"p_holm": p}).split("p ")[1] for p in (0.0496, 0.0504, 0.0002, 0.2)}
    assert said == {0.0496: "= 0.0496", 0.0504: "= 0.050", 0.0002: "< 0.001", 0.2: "= 0.200"}


def test_few_test_samples_show_no_equivalence():
    runs = simulate.runs(8, np.random.default_rng(0), spread=0.05)
    assert (Comparisons(runs, 8192).tests["verdict"] == SAME).any()
    few = Comparisons(runs, 40).tests
    assert not (few["verdict"] == SAME).any() and few["p_equivalence"].isna().all()


def test_levels_of_a_base_that_failed_are_left_out():
    runs = simulate.runs(8, np.random.default_rng(0))
    assert "published trial 2" in set(runs["base"])
    kept = Comparisons(runs[runs["role"] != "published trial 2"])
    assert {base for base, _ in kept.levels} == {kept.base}


def test_the_published_best_is_compared_by_seeds_that_did_not_choose_the_best():
    made = report()
    (test,) = made.of(comparisons.Contrast("", "role", (comparisons.TRIAL_2,), (comparisons.BEST,)))
    fresh = [made.again(role)["test_accuracy"] for role in (comparisons.TRIAL_2, made.base)]
    assert test["effect"] == pytest.approx(fresh[0].mean() - fresh[1].mean())
    assert (fresh[1] != made.group("", "role", made.base)["test_accuracy"]).all()


def test_all_p_values_are_adjusted_together():
    made = report(effects={("rank", 4): -0.02})
    tests = made.tests
    smallest = tests["p_value"].idxmin()
    assert tests.loc[smallest, "p_holm"] == pytest.approx(tests.loc[smallest, "p_value"] * len(tests))
    assert (tests["p_holm"] >= tests["p_value"]).all()
    assert tests.groupby(["kind", "base", "factor", "a", "b", "score"]).size().max() == 1
    shapes_differ = tests["factor"].isin(["d", "rank", "batch_size", "seq_len", "batch_size, equal samples", "role"])
    assert not tests.loc[shapes_differ & (tests["base"] == made.base), "paired"].any()
    assert tests.loc[tests["factor"].isin(["lr", "temperature", "n_steps"]), "paired"].all()


def test_the_next_space_drops_what_is_dead_extends_what_is_better_and_leaves_the_rest():
    effects = {("d", 32): -0.03, ("rank", 32): 0.02, ("lr", 1e-4): -0.03, ("temperature", 2.0): -0.03}
    new = report(effects=effects, spread=0.05).next_space(SPACE)
    assert new["d"] == [64, 96] and new["rank"] == [4, 8, 16, 32]
    assert new["lr"] == {"low": 4e-4, "high": 1e-2, "log": True} and new["temperature"]["high"] == 1.7
    assert new["batch_size"] == SPACE["batch_size"] and new["seq_len"] == SPACE["seq_len"]
    assert report(spread=1.0).next_space(SPACE) == SPACE
    whole = {"low": 32, "high": 96}  # whole numbers stay whole, and the best value joins a space that lacked it
    new = report(effects={("d", 32): -0.03}, spread=0.05).next_space(SPACE | {"d": whole, "rank": [4, 8]})
    assert new["d"]["low"] == 64 and isinstance(new["d"]["low"], int) and new["rank"] == [4, 8, 16]
    dead = {("lr", level): -0.03 for level in (1e-4, 4e-4, 1e-3)}  # an end that nobody tested is no better than they
    new = report(effects=dead, spread=0.05).next_space(SPACE | {"lr": {"low": 2e-4, "high": 9e-3, "log": True}})
    assert new["lr"]["low"] > 1e-3 and new["lr"]["high"] == 9e-3


def test_where_test_samples_are_too_few_no_number_of_seeds_is_promised():
    """40 test samples cannot show that two accuracies lie within a point, however many seeds there are."""
    runs = simulate.runs(8, np.random.default_rng(0), {("rank", 4): -0.03}, spread=0.6)
    few, many = Comparisons(runs, n_test=40), Comparisons(runs)
    test = few.tests.iloc[0].to_dict() | {"sd": 0.02, "paired": False}
    assert not few.sees_margin and many.sees_margin
    same, other = test | {"effect": 1e-5}, test | {"effect": -0.015}
    assert few.seeds_needed([same]) == few.seeds_needed([other, same]) == np.inf
    nothing = Decision(UNDECIDED, "tests", {"tests": [same], "at_trial_2": [False], "seeds": np.inf})
    detail = reports_of.render(None, "claim_detail", nothing)
    assert detail.endswith(", more test samples, not more seeds, would decide it")
    assert few.seeds_needed([other]) == many.seeds_needed([other]) < 200 > many.seeds_needed([same])


def test_the_reproduction_decides_two_claims():
    rng = np.random.default_rng(0)

    def scores(accuracy, ce):
        return pd.DataFrame({"test_accuracy": rng.normal(accuracy, 0.01, 20), "test_ce": rng.normal(ce, 0.01, 20)})

    def words(one, two):
        return [decision.verdict for decision in comparisons.from_reproduction(one, two, 0.7813).values()]

    low, high = scores(0.55, 0.68), scores(0.60, 0.67)
    assert words(low, high) == [REFUTED, REFUTED]
    decision = comparisons.from_reproduction(low, high, 0.7813)["published_accuracy"]
    said = reports_of.render(None, "claim_detail", decision)
    assert said.startswith("it was measured,") and "does not hold on fresh samples: " in said
    assert words(scores(0.55, 0.60), high)[1] == SUPPORTED and words(high, high)[1] == UNDECIDED
    assert words(low, scores(0.7813, 0.6))[0] == SUPPORTED
    two = pd.DataFrame({"test_accuracy": [0.5, 0.95], "test_ce": [0.6, 0.7]})
    assert words(low, two)[0] == UNDECIDED  # the interval holds 78.13 %, and nearly everything else


def test_a_comparison_is_said_once_and_claims_that_share_theirs_are_counted():
    """Where the best is the published trial 2, the claims about it and about the best are one."""
    made = report(seed=1, effects={("seq_len", 32): -0.05, ("seq_len", 64): -0.05}, spread=0.05)
    assert made.base == comparisons.TRIAL_2
    details = claims_table(made.claims()).set_index("claim")["detail"]
    twice = details["Sequence length of 128 consistently better than shorter sequences"]
    assert twice == details["Keep sequence length at 128 for best results"] + " (the best is published trial 2)"
    three = [claim for claim in CLAIMS if "equence length" in claim.quote]
    assert made.shared(three) == len(three) == 3 and made.shared(three[:1]) == made.shared(CLAIMS[6:7]) == 0


def test_recorded_verdicts_are_read_back_and_newer_ones_win(reports):
    quotes = [claim.quote for claim in CLAIMS]
    assert {row[2] for row in tables.recorded_claims("made", {})} == {"not tested yet"}
    (reports / "made").mkdir()
    claims_table(report().claims()).to_csv(reports / "made" / "claims.csv", index=False)
    rows = list(tables.recorded_claims("made", {"published_accuracy": Decision(REFUTED)}))
    assert [row[0] for row in rows] == quotes
    assert rows[6][2:] == (REFUTED, "") and rows[1][2] in (SAME, UNDECIDED)
