"""Every comparison of a confirmed report, adjusted together, and what they say about each claim of the original.

claims.yaml quotes the claims and says what decides each. Numbers go in and plain values come out; report.md.j2 has the
sentences.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import yaml

from ctbprn_lib import evidence
from ctbprn_lib.confirm import choose_best
from ctbprn_lib.evidence import BETTER, LEVEL, MARGIN, NOT_TESTED, REFUTED, SAME, SUPPORTED, UNDECIDED, WORSE
from ctbprn_lib.train import KINDS

BEST, TRIAL_2 = "best", "published trial 2"
EQUAL_SAMPLES = "batch_size, equal samples"
VERDICTS = (SUPPORTED, REFUTED, SAME, UNDECIDED, NOT_TESTED)  # on a claim
Run = dict[str, np.ndarray]  # {column: (R,)} of one configuration, a value for each seed
Test = dict[str, Any]  # one row of Comparisons.tests


class Contrast(NamedTuple):
    """Each good level of a factor against each other level. base: BEST, the role of another run, or "" for roles."""

    base: str
    factor: str
    good: tuple
    others: tuple
    score: str = "test_accuracy"


@dataclass(frozen=True)
class Claim:
    """A claim of the original. record: the name of another record that decides it, "" if comparisons alone do."""

    quote: str
    decided_by: str
    contrasts: tuple[Contrast, ...] = ()
    record: str = ""


@dataclass(frozen=True)
class Decision:
    """The verdict on a claim, and the numbers that its sentence in report.md.j2 needs.

    basis: "tests", "is the best", the claim's record, or "" if nothing has decided it.
    """

    verdict: str
    basis: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)


def load_claims() -> tuple[Claim, ...]:
    """The claims of claims.yaml, in the order of the original."""
    claims = []
    for entry in yaml.safe_load(Path(__file__).with_name("claims.yaml").read_text(encoding="utf-8")):
        contrasts = []
        for one in entry.get("comparisons", ()):
            score = one.get("score", "test_accuracy")
            contrasts.append(
                Contrast(one.get("base", ""), one["factor"], tuple(one["good"]), tuple(one["others"]), score)
            )
        claims.append(Claim(entry["claim"], entry["decided_by"], tuple(contrasts), entry.get("record", "")))
    return tuple(claims)


CLAIMS = load_claims()


@dataclass(frozen=True)
class Ablation:
    """One setting of base moved through its levels, all else equal.

    own: the level of base itself. moved: {level: (accuracy test, CE test)} against it. levels: indexed by level, mean,
    low, high of the test accuracy, and n_steps, the length of training. of_the_best: whether base is the configuration
    that was ablated first.
    """

    base: str
    factor: str
    own: float
    moved: dict[float, tuple[Test, Test]]
    levels: pd.DataFrame
    of_the_best: bool

    @property
    def decided(self) -> list[Test]:
        """Accuracy tests of levels that are better or worse."""
        return [accuracy for accuracy, _ in self.moved.values() if accuracy["verdict"] in (BETTER, WORSE)]

    @property
    def undecided(self) -> list[tuple[Test, Test]]:
        """Both tests of levels whose accuracy is undecided."""
        return [pair for pair in self.moved.values() if pair[0]["verdict"] == UNDECIDED]

    @property
    def smaller_and_no_worse(self) -> Test | None:
        """The accuracy test of the smallest level below own that loses nothing by accuracy or CE."""
        for level, (accuracy, ce) in self.moved.items():
            if level < self.own and accuracy["verdict"] in (SAME, BETTER) and ce["verdict"] != WORSE:
                return accuracy
        return None


class Comparisons:
    """All tests of one report, Holm-adjusted together, and the verdicts that follow.

    runs: the table of confirm.records. n_test: test samples; if they are too few to see a difference of MARGIN,
    equivalence is not tested. best: {"accuracy": role, "ce": role}; chosen from runs if it is not given.
    tests: one row for each comparison: kind ("confirmed", "ablation", "claim"), base, factor, a, b, score, effect
    (a - b) with low and high, p_value and p_equivalence with their Holm-adjusted p_holm and p_equivalence_holm
    (equivalence: accuracies differ by less than MARGIN), sd over seeds (if paired, of differences), and the verdict
    on a.
    """

    def __init__(self, runs: pd.DataFrame, n_test: int = 8192, best: Mapping[str, str] | None = None) -> None:
        runs = runs[(runs["base"] == "") | runs["base"].isin(runs["role"])]  # a base may have failed, its levels not
        self.n_seeds = int(runs["seed"].max()) + 1
        self._groups: dict[tuple, Run] = {}
        columns, in_order = ["role", "base", "factor", "level"], runs.sort_values("seed", kind="stable")
        for (role, base, factor, level), rows in in_order.groupby(columns, dropna=False, sort=False):
            key = (role, base, factor, None if math.isnan(level) else level)
            self._groups[key] = {name: rows[name].to_numpy() for name in rows}
        self.levels: dict[tuple[str, str], list[float]] = {}  # of each ablation (base, factor), in the plan's order
        for role, base, factor, level in self._groups:
            if not role:
                self.levels[base, factor] = sorted([*self.levels.get((base, factor), []), level])
        confirmed = runs[runs["role"] != ""].groupby("role", sort=False)
        means = {name: confirmed[name].mean() for name in ("test_accuracy", "test_ce")}
        self.roles: list[str] = list(means["test_ce"].sort_values(kind="stable").index)
        best = best or choose_best(runs)
        self.best_accuracy, self.best_ce = best["accuracy"], best["ce"]
        # what BEST means in a Contrast
        self.base: str = next((base for base, _ in self.levels if base != TRIAL_2), self.best_ce)
        low, high = evidence.sample_interval(means["test_accuracy"].max(), n_test)
        self.sees_margin = (high - low) / 2 <= MARGIN
        self.tests = self._all_tests()

    def group(self, base: str, factor: str, level: float | str) -> Run:
        """One run: a level of an ablation of base; or factor "role" and, as the level, the role's name."""
        run = self._find(base, factor, level)
        if run is None:
            raise KeyError(f"no run of {factor} {level} at {base}")
        return run

    def _find(self, base: str, factor: str, level: float | str) -> Run | None:
        base = self._role(base)
        return self._groups.get((level, "", "", None) if factor == "role" else ("", base, factor, level))

    def _role(self, base: str) -> str:
        return self.base if base == BEST else base

    def again(self, role: str) -> Run | None:
        """A role or BEST as it was measured for its ablation, by seeds that did not choose it. None if it was not."""
        role = self._role(role)
        factor = next((factor for base, factor in self.levels if base == role), None)
        return self.group(role, factor, self.own_level(role, factor)) if factor else None

    def own_level(self, base: str, factor: str) -> float:
        """The level that the base configuration itself has."""
        return self.group("", "role", self._role(base))[factor.removesuffix(", equal samples")][0]

    @cached_property
    def ablations(self) -> list[Ablation]:
        """Every ablation, in the order of the plan."""
        tests, found = self.tests[self.tests["kind"] == "ablation"], []
        for (base, factor), levels in self.levels.items():
            rows, own = [], self.own_level(base, factor)
            for level in levels:
                run = self.group(base, factor, level)
                rows.append((level, *evidence.mean_interval(run["test_accuracy"]), run["n_steps"][0]))
            table = pd.DataFrame(rows, columns=["level", "mean", "low", "high", "n_steps"]).set_index("level")
            here = tests[(tests["base"] == base) & (tests["factor"] == factor)]
            pairs = {a: tuple(pair.to_dict("records")) for a, pair in here.groupby("a")}  # accuracy comes before CE
            moved = {level: pairs[_name(level)] for level in levels if level != own}
            found.append(Ablation(base, factor, own, moved, table, base == self.base))
        return found

    def _all_tests(self) -> pd.DataFrame:
        rows = []
        for role in self.roles:
            for best, score in ((self.best_accuracy, "test_accuracy"), (self.best_ce, "test_ce")):
                if role != best:
                    rows.append(self._test("confirmed", "", "role", role, best, score))
        for (base, factor), levels in self.levels.items():
            own = self.own_level(base, factor)
            for level in levels:
                if level != own:
                    rows += [self._test("ablation", base, factor, level, own, s) for s in ("test_accuracy", "test_ce")]
        contrasts = dict.fromkeys(c for claim in CLAIMS for c in claim.contrasts)
        claimed = [(b, f, g, other, score) for b, f, good, others, score in contrasts for g in good for other in others]
        rows += [self._test("claim", *asked) for asked in dict.fromkeys(claimed)]
        tests = pd.DataFrame([row for row in rows if row])
        tests["p_holm"] = evidence.holm(tests["p_value"])
        has = tests["p_equivalence"].notna()
        tests["p_equivalence_holm"] = math.nan
        tests.loc[has, "p_equivalence_holm"] = evidence.holm(tests.loc[has, "p_equivalence"])
        tests["verdict"] = [
            evidence.verdict_on_effect(test.effect, test.p_holm, test.p_equivalence_holm, test.score == "test_ce")
            for test in tests.itertuples()
        ]
        return tests

    def _test(self, kind: str, base: str, factor: str, good: Any, other: Any, score: str) -> Test | None:
        """One row: one level against another. None if one of them has not been run, or has no such score."""
        if kind == "claim" and factor == "role":
            a, b = self.again(good), self.again(other)
        else:
            a, b = self._find(base, factor, good), self._find(base, factor, other)
        if a is None or b is None or a is b:
            return None
        if min(np.isfinite(run[score]).sum() for run in (a, b)) < 2:  # the task knows no true area
            return None
        shapes = ["d", "rank", "batch_size", "seq_len", "n_layers"]
        paired = all(a[name][0] == b[name][0] for name in shapes)  # the same seeds and shapes
        found, same = evidence.compare(a[score], b[score], paired), math.nan
        if score != "test_ce" and self.sees_margin:
            same = evidence.equivalence(a[score], b[score], MARGIN, paired)
        sd = np.nanstd(a[score] - b[score], ddof=1)
        if not paired:
            sd = math.sqrt((np.nanvar(a[score], ddof=1) + np.nanvar(b[score], ddof=1)) / 2)
        return dict(kind=kind, base=base, factor=factor, a=_name(good), b=_name(other), score=score, paired=paired,
                    **found._asdict(), p_equivalence=same, sd=sd)  # fmt: skip

    def seeds_needed(self, tests: Iterable[Test]) -> float:
        """Seeds a level that would decide all these tests in 80 % of such reports, if effects are as they look.

        An effect further from 0 than from MARGIN shows as a difference first, another as equivalence, where there are
        test samples enough to show that. math.inf if no number of seeds would do.
        """
        margin = MARGIN if self.sees_margin else 0
        gaps = [max(abs(test["effect"]), margin - abs(test["effect"])) for test in tests]
        return max(self.n_seeds + 1, *map(self.seeds_to_find, tests, gaps))

    def seeds_to_find(self, test: Test, gap: float) -> float:
        """Seeds a level with which a test of this spread shows a difference of gap in 80 % of such reports."""
        return evidence.seeds_needed(test["sd"], gap, LEVEL / len(self.tests), test["paired"])

    def of(self, contrast: Contrast) -> list[Test]:
        """The tests of one contrast."""
        base, factor, good, others, score = contrast
        t = self.tests
        rows = (t["kind"] == "claim") & (t["base"] == base) & (t["factor"] == factor) & (t["score"] == score)
        rows &= t["a"].isin([_name(g) for g in good]) & t["b"].isin([_name(other) for other in others])
        return t[rows].to_dict("records")

    def decide(self, claim: Claim) -> Decision:
        """What the comparisons say of a claim; NOT_TESTED if one of them is missing."""
        tests = [test for contrast in claim.contrasts for test in self.of(contrast)]
        if claim.contrasts and len(tests) == sum(len(c.good) * len(c.others) for c in claim.contrasts):
            verdict = evidence.verdict_on_claim(test["verdict"] for test in tests)
            undecided = [test for test in tests if test["verdict"] == UNDECIDED]
            seeds = self.seeds_needed(undecided) if verdict == UNDECIDED else None
            places = [test["base"] == TRIAL_2 != self.base for test in tests]
            return Decision(verdict, "tests", {"tests": tests, "at_trial_2": places, "seeds": seeds})
        if claim.contrasts and self.base == TRIAL_2 and claim.contrasts[0].factor == "role":
            rivals = self.tests[(self.tests["kind"] == "confirmed") & (self.tests["b"] == TRIAL_2)]
            told_apart = not (rivals["p_holm"] >= LEVEL).any()
            return Decision(SUPPORTED if told_apart else UNDECIDED, "is the best", {"told_apart": told_apart})
        return Decision(NOT_TESTED)

    def claims(self, others: Mapping[str, Decision] | None = None) -> dict[Claim, Decision]:
        """What came of every claim.  others: {record: Decision} of those that other records decide."""
        decided = {claim: self.decide(claim) for claim in CLAIMS}
        for claim, decision in decided.items():
            if decision.verdict == NOT_TESTED:
                decided[claim] = (others or {}).get(claim.record, decision)
        return decided

    def shared(self, claims: Iterable[Claim]) -> int:
        """How many of these claims rest on comparisons that another of them rests on as well, and on nothing else."""
        contrasts = [{(self._role(c.base), *c[1:]) for c in claim.contrasts} for claim in claims]
        return sum(bool(one) and contrasts.count(one) > 1 for one in contrasts)

    def next_space(self, space: Mapping[str, Any]) -> dict[str, Any]:
        """The space for the next search: decided evidence alone changes the one that was searched.

        A level is dead if its accuracy is decided to be worse and lies more than MARGIN lower, whatever its CE. A range
        then ends at the outermost level that was tested in it and stays. A level outside comes in if it is better, and
        so does the base's own level.
        """
        new = dict(space)
        for ablation in self.ablations:
            name, entry = ablation.factor, space.get(ablation.factor)
            if entry is None or not ablation.of_the_best:
                continue
            accuracy = {level: test for level, (test, _) in ablation.moved.items()}
            dead = {x for x, test in accuracy.items() if test["verdict"] == WORSE and test["effect"] < -MARGIN}
            better = {x for x, test in accuracy.items() if test["verdict"] == BETTER} | {ablation.own}
            inside = entry
            if not isinstance(entry, list):  # an end that was not tested itself goes with the level beside it
                inside = [x for x in ablation.levels.index if entry["low"] <= x <= entry["high"]]
                ends = ((entry["low"], inside[:1]), (entry["high"], inside[-1:]))
                inside += [end for end, beside in ends if not beside or beside[0] not in dead]
            kept = sorted({KINDS[name](x) for x in {*inside, *better} - dead})
            if isinstance(entry, list):
                new[name] = kept
            elif len(kept) > 1:
                new[name] = entry | {"low": kept[0], "high": kept[-1]}
        return new


def from_reproduction(trial_1: pd.DataFrame, trial_2: pd.DataFrame, published: float) -> dict[str, Decision]:
    """{record: Decision} for the two claims that the scores of seeds of trials 1 and 2 decide.

    trial_1, trial_2: test_accuracy and test_ce, a row for each seed. published: the published accuracy of trial 2.
    """
    mean, low, high = evidence.mean_interval(trial_2["test_accuracy"])
    ce = evidence.compare(trial_1["test_ce"], trial_2["test_ce"])
    accuracy = evidence.compare(trial_1["test_accuracy"], trial_2["test_accuracy"])
    lower = UNDECIDED
    if ce.high < 0 and accuracy.high < 0:
        lower = SUPPORTED
    elif ce.low > 0 or accuracy.low > 0:
        lower = REFUTED
    holds = evidence.verdict_on_score(published, low, high)
    return {
        "published_accuracy": Decision(holds, "published_accuracy", {"accuracy": (mean, low, high)}),
        "published_ce": Decision(lower, "published_ce", {"ce": ce, "accuracy": accuracy}),
    }


def _name(level: float | str) -> str:
    return level if isinstance(level, str) else f"{level:g}"
