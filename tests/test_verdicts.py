"""Verdicts: what follows from scores that are known, and how often whole simulated reports are wrong."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ctbprn_lib import evidence, search, tasks
from ctbprn_lib import report as reports_of
from ctbprn_lib.audit import simulate
from ctbprn_lib.evidence import AT_MOST, BETTER, NOT_TESTED, REFUTED, SAME, SHORT_SCHEDULE, SUPPORTED, UNDECIDED, WORSE
from ctbprn_lib.report import comparisons, tables, text
from ctbprn_lib.report.comparisons import CLAIMS, TRIAL_2, Comparisons, Decision
from ctbprn_lib.report.text import claims_table

GOLDEN = Path(__file__).parent / "golden"
NOTHING_MATTERS = 60  # simulated reports
SPACE = search.default_space(tasks.RoutingTask())


def runs_of(n_seeds=8, seed=0, **kwargs):
    return simulate.runs(n_seeds, np.random.default_rng(seed), **kwargs)


def report(n_seeds=8, seed=0, **kwargs):
    return Comparisons(runs_of(n_seeds, seed, **kwargs))


def verdict_of(made, claim):
    return next(decision.verdict for one, decision in made.claims().items() if claim in one.quote)


def plan_of(made):
    return evidence.Plan(tuple(finding.question for finding in made.findings.values()), made.schedule)


def without_names(runs):
    """Runs as records of before have them."""
    return runs[runs["without"] == ""].drop(columns=["name", "without"])


def test_every_claim_of_the_original_is_quoted():
    page = (GOLDEN / "published_report.md").read_text()
    claims = page.split("## Key Findings")[1].split("## Generated Plots")[0]
    lines = [line.strip()[2:] for line in claims.splitlines() if line.strip().startswith("- ")]
    assert [claim.quote for claim in CLAIMS] == lines and len(lines) >= 14


def test_where_nothing_matters_hardly_any_report_says_that_something_does():
    """At most 5 % of reports may hold a false verdict; 7 of 60 would be one chance in 33 at 5 %."""
    wrong = 0
    for seed in range(NOTHING_MATTERS):
        verdicts = {finding.verdict for finding in report(seed=seed).findings.values()}
        wrong += not verdicts.isdisjoint({BETTER, WORSE, SUPPORTED, REFUTED})
    assert wrong < 7, wrong


def test_an_effect_is_found_as_often_as_the_report_says():
    power = [report(16, seed).power for seed in range(10)]
    assert all(one[True].keys() == {8, 16} and one[True][8] > one[True][16] > 0.005 for one in power)
    sizes = {paired: np.mean([one[paired][16] for one in power]) for paired in (True, False)}
    effects = {("rank", 4): sizes[False], ("lr", 1e-4): sizes[True]}
    found = []
    for seed in range(40):
        made = report(16, seed, effects={name: -effect for name, effect in effects.items()})
        found += [made.findings[name].verdict == WORSE for name in ("rank 4", "lr 0.0001")]
    assert 0.68 < np.mean(found) < 0.92


def test_verdicts_follow_the_effects():
    effects = {("d", 32): -0.03, ("d", 128): -0.03, ("seq_len", 32): -0.05, ("seq_len", 64): 0.015}
    effects |= {("without", "message"): -0.1}
    made = report(effects=effects, spread=0.05)
    verdicts = {name: made.findings[name].verdict for name in ("d 32", "d 96", "seq_len 64", "without message")}
    assert verdicts == {"d 32": WORSE, "d 96": SAME, "seq_len 64": BETTER, "without message": WORSE}
    assert {part: finding.verdict for part, finding in made.parts.items()} == {
        "routing": SAME, "message": WORSE, "noise": SAME
    }  # fmt: skip
    assert verdict_of(made, "64-96") == SUPPORTED
    assert verdict_of(made, "Larger sequence lengths") == REFUTED  # 64 is better than 128
    assert verdict_of(made, "Router rank of 16") == SAME
    assert verdict_of(made, "dimension to 96") == SAME
    # better than 32, and the same as the others: that supports it
    assert verdict_of(report(effects={("rank", 4): -0.03}, spread=0.05), "Router rank of 16") == SUPPORTED
    assert verdict_of(report(spread=0.3), "Router rank of 16") == AT_MOST
    assert verdict_of(report(spread=1.0), "Router rank of 16") == UNDECIDED


@pytest.mark.parametrize("spread", [0.05, 0.3, 1.0])
def test_a_verdict_is_said_with_what_the_difference_is_at_most(spread):
    made = report(spread=spread)
    for finding in made.findings.values():
        said, bound = text.verdict(finding), 100 * finding.answer.at_most
        if finding.verdict in (AT_MOST, UNDECIDED):
            shown = float(said.split(AT_MOST)[1].split()[0])
            assert bound <= shown + 1e-6 < bound + 0.1 + 1e-5
            assert said.startswith(finding.verdict) and ("worse" in said) == finding.question.is_claim
        elif finding.question.score == "route_accuracy" and finding.verdict == SAME:
            assert said == "the same within 5 points"
        else:
            assert said == finding.verdict
    for _, row in claims_table(made.claims()).iterrows():
        assert row["verdict"] != UNDECIDED  # there is always a bound beside it


def test_what_a_question_still_needs():
    made = report(effects={("rank", 4): -0.05}, spread=0.3)
    undecided = {name for name, finding in made.findings.items() if not finding.answer.decided}
    assert set(made.given_up) < undecided and made.findings["rank 4"].verdict == WORSE
    assert all(n > 128 for n in made.given_up.values())
    assert not report(effects={("rank", 4): -0.05}, spread=0.01).given_up


def test_what_no_run_can_decide_is_not_tested_yet_unless_another_record_decides_it():
    made = report()
    assert verdict_of(made, "Current configuration uses") == "not tested yet"
    decided = Decision(REFUTED, "routing")
    claims = made.claims({"published_accuracy": decided})
    assert [claim.record for claim, decision in claims.items() if decision is decided] == ["published_accuracy"]
    lacking = runs_of()
    lacking = lacking[~((lacking["factor"] == "rank") & (lacking["level"] == 32))]
    assert verdict_of(Comparisons(lacking), "Router rank of 16") == NOT_TESTED
    planned = Comparisons(lacking, recorded=plan_of(made))  # its time ended before that level
    assert verdict_of(planned, "Router rank of 16") == planned.findings["rank 32"].verdict == NOT_TESTED
    assert planned.findings.keys() == made.findings.keys() and planned.ablations[2].moved.keys() == {2, 4, 8, 64}


def test_a_decided_p_is_printed_as_decided():
    said = {p: text.p(p) for p in (0.0496, 0.0504, 0.0002, 0.2)}
    assert said == {0.0496: "= 0.0496", 0.0504: "= 0.050", 0.0002: "< 0.001", 0.2: "= 0.200"}


def test_an_effect_is_said_with_its_seeds_and_with_p_times_the_number_of_questions():
    made = report(16, effects={("rank", 4): -0.05})
    finding, m = made.findings["rank 4"], len(made.findings)
    assert text.effect(finding).endswith(f" points, 16 seeds, p (× {m}) < 0.001")
    assert text.signed_points((-0.0004, -0.01, 0.0)) == "+0.0 [-1.0, +0.0]"


def test_few_test_samples_show_no_equivalence():
    runs = runs_of(spread=0.05)
    assert SAME in {finding.verdict for finding in Comparisons(runs, 8192).findings.values()}
    assert SAME not in {finding.verdict for finding in Comparisons(runs, 40).findings.values()}


def test_levels_of_a_base_that_failed_are_left_out():
    runs = runs_of()
    assert TRIAL_2 in set(runs["base"])
    kept = Comparisons(runs[runs["role"] != TRIAL_2])
    assert set(kept.runs["base"]) == {"", kept.base}


def test_the_published_best_is_compared_by_seeds_that_did_not_choose_the_best():
    claim = next(claim for claim in CLAIMS if "Trial 2" in claim.quote)
    made = report()
    (contrast,) = made.decide(claim).values["finding"].question.contrasts
    assert (contrast.a, contrast.b) == (f"{TRIAL_2} again", f"{made.base} again") and contrast.paired
    assert (made.run(contrast.b)["test_accuracy"].to_numpy() != made.run(made.base)["test_accuracy"].to_numpy()).all()
    made = report(seed=1)  # it is the best itself: all others are its rivals, and their seeds are others
    finding = made.decide(claim).values["finding"]
    assert made.base == TRIAL_2 and {c.a for c in finding.question.contrasts} == {f"{TRIAL_2} again"}
    assert {c.b for c in finding.question.contrasts} == set(made.roles) - {TRIAL_2}
    assert not any(c.paired for c in finding.question.contrasts)


def test_the_questions_of_a_report():
    runs = runs_of()
    runs.loc[runs["role"] == "defaults", "lr"] = 1e-3
    base = comparisons.ablated(runs)
    made = comparisons.plan(runs, base, "trial 7", SHORT_SCHEDULE)
    levels = [question for question in made.questions if not question.is_claim]
    own = f"{base} again"
    n_levels = runs.loc[
        (runs["base"] == base) & (runs["factor"] != "without") & (runs["name"] != own), "name"
    ].nunique()
    assert len(levels) == n_levels + 3 + 1 and made.schedule == SHORT_SCHEDULE
    names = {question.name: question for question in levels}
    assert {"lr 0.0004", "n_steps 1000", "batch_size 64, equal samples", "without noise"} < names.keys()
    assert names["trial 7 against defaults"].contrasts[0].paired and f"trial 7 against {TRIAL_2}" not in names
    pairs = {name: question.contrasts[0].paired for name, question in names.items()}
    assert not any(paired for name, paired in pairs.items() if name.startswith(("d ", "rank ")))
    assert all(paired for name, paired in pairs.items() if not name.startswith(("d ", "rank ")))
    claims = [question for question in made.questions if question.is_claim]
    assert len(claims) == (12 if base == TRIAL_2 else 14)
    assert [question.margin for question in claims if question.score == "route_accuracy"] == [0.05]
    assert not any(question.is_claim for question in comparisons.plan(runs, base, None, with_claims=False).questions)
    assert comparisons.read_plan(json.loads(json.dumps(asdict(made)))) == made
    once = comparisons.plan(runs.drop_duplicates("name"), base, "trial 7", SHORT_SCHEDULE)
    assert once == made  # whether the base is named under each factor or once


def test_records_of_before_have_the_same_questions():
    runs = runs_of()
    old, new = Comparisons(without_names(runs)), Comparisons(runs)
    assert old.findings.keys() == {name for name in new.findings if not name.startswith("without")}
    assert all(finding.question == new.findings[name].question for name, finding in old.findings.items())
    pd.testing.assert_series_equal(
        comparisons.named(without_names(runs))["name"], runs.loc[runs["without"] == "", "name"]
    )


def test_configurations_may_have_different_numbers_of_seeds():
    runs = runs_of(32, effects={("rank", 4): -0.03})
    own = runs["name"] == f"{comparisons.ablated(runs)} again"
    few = runs[own | (runs["name"].str.endswith("rank 4") & (runs["seed"] < 16)) | (runs["seed"] < 8)]
    made = Comparisons(few)
    seeds = {name: finding.n_seeds for name, finding in made.findings.items() if finding.is_tested}
    assert seeds["rank 4"] == 16 and set(seeds.values()) == {8, 16}
    assert made.findings["rank 8"].looks == Comparisons(runs[runs["seed"] < 8]).findings["rank 8"].looks


def test_a_seed_that_diverged_routes_by_chance():
    runs = runs_of()
    runs.loc[(runs["seed"] == 3) & (runs["factor"] == "temperature"), "route_accuracy"] = np.nan
    name = runs.loc[runs["factor"] == "temperature", "name"].iloc[0]
    assert comparisons.scores_of(runs)["route_accuracy"][name][3] == 0.5
    runs["route_accuracy"] = np.nan
    assert comparisons.scores_of(runs)["route_accuracy"] == {}


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


def test_claims_that_are_one_question_share_its_answer():
    """Where the best is the published trial 2, the claims about it and about the best are one."""
    made = report(seed=1, effects={("seq_len", 32): -0.05, ("seq_len", 64): -0.05}, spread=0.05)
    assert made.base == TRIAL_2
    three = [one.values["finding"] for claim, one in made.claims().items() if "equence length" in claim.quote]
    assert len(three) == 3 and len({finding.question.name for finding in three}) == 1
    assert {finding.verdict for finding in three} == {SUPPORTED}


def test_recorded_verdicts_are_read_back_and_newer_ones_win(reports):
    quotes = [claim.quote for claim in CLAIMS]
    assert {row[2] for row in tables.recorded_claims("made", {})} == {"not tested yet"}
    (reports / "made").mkdir()
    claims_table(report().claims()).to_csv(reports / "made" / "claims.csv", index=False)
    rows = list(tables.recorded_claims("made", {"published_accuracy": Decision(REFUTED)}))
    assert [row[0] for row in rows] == quotes
    assert rows[6][2:] == (REFUTED, "") and rows[1][2].startswith((SAME, AT_MOST))
