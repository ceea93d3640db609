"""The questions of a confirmed report, their answers, and what these say of each claim of the original.

claims.yaml quotes the claims and says which configurations decide each. Numbers go in and plain values come out;
report.md.j2 has the sentences.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import yaml

from ctbprn_lib import evidence
from ctbprn_lib.evidence import (
    BETTER,
    MARGIN,
    NOT_TESTED,
    REFUTED,
    SAME,
    SCHEDULE,
    SUPPORTED,
    UNDECIDED,
    WORSE,
    Answer,
    Contrast,
    Look,
    Plan,
    Question,
    Schedule,
)
from ctbprn_lib.train import KINDS, TABLE

BEST, TRIAL_2, DEFAULTS = "best", "published trial 2", "defaults"
EQUAL_SAMPLES = "batch_size, equal samples"
PARTS = ("routing", "message", "noise")  # of the network, each of which is left out once
ROUTE_MARGIN = 0.05  # the smallest difference of the share routed to the true area that anybody should care about
CHANCE_ROUTED = 0.5  # this share: of a seed that diverged, on the original's two areas
SHAPES = [name for name, entry in TABLE.items() if entry.shapes]  # what changes the initial values that a seed draws
VERDICTS = (SUPPORTED, REFUTED, SAME, evidence.AT_MOST, UNDECIDED, NOT_TESTED)  # on a claim


class Sides(NamedTuple):
    """Each good level of a factor against each other level. base: BEST, the role of another run, or "" for roles."""

    base: str
    factor: str
    good: tuple
    others: tuple


@dataclass(frozen=True)
class Claim:
    """A claim of the original. record: the name of another record that decides it, "" if comparisons alone do."""

    quote: str
    decided_by: str
    sides: tuple[Sides, ...] = ()
    score: str = "test_accuracy"
    record: str = ""


@dataclass(frozen=True)
class Decision:
    """The verdict on a claim, and the numbers that its sentence in report.md.j2 needs.

    basis: "question", the claim's record, or "" if nothing has decided it.
    """

    verdict: str
    basis: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)


def load_claims() -> tuple[Claim, ...]:
    """The claims of claims.yaml, in the order of the original."""
    claims = []
    for entry in yaml.safe_load(Path(__file__).with_name("claims.yaml").read_text(encoding="utf-8")):
        sides = tuple(
            Sides(one.get("base", ""), one["factor"], tuple(one["good"]), tuple(one["others"]))
            for one in entry.get("comparisons", ())
        )
        score = entry.get("score", "test_accuracy")
        claims.append(Claim(entry["claim"], entry["decided_by"], sides, score, entry.get("record", "")))
    return tuple(claims)


CLAIMS = load_claims()


def has_claims(task: Mapping[str, Any]) -> bool:
    """Whether the original's claims are about this task.  task: its description."""
    return bool(task["task"] == "routing" and task["n_tokens"] == 128)


def named(runs: pd.DataFrame) -> pd.DataFrame:
    """runs with the columns name and without, which records of before do not have."""
    if "name" in runs:
        return runs
    settings = runs[runs["role"] != ""].drop_duplicates("role").set_index("role").to_dict("index")

    def name_of(role: str, base: str, factor: str, level: float) -> str:
        if role:
            return role
        is_own = base in settings and settings[base][hyperparameter(factor)] == level
        return f"{base} again" if is_own else f"{base}: {level_name(factor, level)}"

    places = zip(*(runs[column] for column in ("role", "base", "factor", "level")), strict=True)
    return runs.assign(name=[name_of(*place) for place in places], without="")


def hyperparameter(factor: str) -> str:
    """The hyperparameter, or "n_steps", that a factor moves."""
    return factor.removesuffix(", equal samples")


def level_name(factor: str, level: float) -> str:
    """The name of a question about a level: "lr 0.0004", "batch_size 64, equal samples"."""
    name = hyperparameter(factor)
    return f"{name} {level:g}{factor.removeprefix(name)}"


def ablated(runs: pd.DataFrame) -> str:
    """The role whose settings were moved; if there are two, not the published trial 2; "" if there is none."""
    bases = [base for base in runs["base"].unique() if base]
    return next((base for base in bases if base != TRIAL_2), bases[0] if bases else "")


class Configurations:
    """The configurations of a plan by name, and the contrasts between them.

    table: a row for each configuration (or more) with name, role, base, factor, level, without, the hyperparameters and
    n_steps. base: the role that was ablated. f"{base} again" is the base with seeds that did not choose it.
    """

    def __init__(self, table: pd.DataFrame, base: str) -> None:
        self.base, self.own = base, f"{base} again"
        self.rows: dict[str, dict[str, Any]] = table.drop_duplicates("name").set_index("name").to_dict("index")
        self.roles = [name for name, row in self.rows.items() if row["role"]]
        self.places: dict[tuple[str, str, float], str] = {}  # the name of each level of each ablation
        moved = table[(table["base"] != "") & ~table["factor"].isin(["", "without"])]
        for of, factor, level, name in moved[["base", "factor", "level", "name"]].itertuples(index=False):
            own = f"{of} again"
            if own in self.rows:
                self.places[of, factor, self.rows[own][hyperparameter(factor)]] = own
            self.places[of, factor, level] = name

    def levels(self, factor: str) -> dict[float, str]:
        """{level: name} of one ablation of the base, in order, its own level included."""
        places = sorted(self.places.items())
        return {level: name for (of, moved, level), name in places if (of, moved) == (self.base, factor)}

    @property
    def factors(self) -> list[str]:
        """The factors that were moved at the base, in the order of the plan."""
        return list(dict.fromkeys(factor for of, factor, _ in self.places if of == self.base))

    def contrast(self, a: str, b: str) -> Contrast:
        """Whether a is better than b. They are compared in pairs if their seeds draw the same initial values.

        Roles have other seeds than ablations.
        """
        first, second = self.rows[a], self.rows[b]
        same_seeds = (first["role"] == "") == (second["role"] == "")
        return Contrast(a, b, same_seeds and all(first[name] == second[name] for name in SHAPES))

    def of_claim(self, claim: Claim) -> dict[Contrast, str]:
        """{contrast: its two sides in words} of a claim; {} if a configuration that it needs is not there."""
        found: dict[Contrast, str] = {}
        for a, b, words in self._pairs(claim):
            if a is None or b is None or not {a, b} <= self.rows.keys():
                return {}
            found.setdefault(self.contrast(a, b), words)
        return found

    def _pairs(self, claim: Claim) -> Iterator[tuple[str | None, str | None, str]]:
        """(name of a good configuration, name of a rival, both in words) of a claim."""
        for base, factor, good, others in claim.sides:
            if factor == "role":
                # The base has been chosen by its scores, so it is compared with the seeds that did not choose it. If it
                # is published trial 2 itself, its rivals are all other configurations that were confirmed.
                rivals = {self.base: self.own} if self.base != TRIAL_2 else {r: r for r in self.roles if r != TRIAL_2}
                yield from ((f"{TRIAL_2} again", name, f"{TRIAL_2} against {role}") for role, name in rivals.items())
                continue
            of = self.base if base == BEST else base
            place = "" if of == self.base else f" at {of}'s settings"
            place += " (equal samples)" if factor == EQUAL_SAMPLES else ""
            for a, b in product(good, others):
                yield self.places.get((of, factor, a)), self.places.get((of, factor, b)), f"{a:g} against {b:g}{place}"


def plan(
    configurations: pd.DataFrame,
    base: str,
    best_trial: str | None,
    schedule: Schedule = SCHEDULE,
    margin: float = MARGIN,
    with_claims: bool = True,
) -> Plan:
    """The questions of a report. They are fixed before a run of an ablation is scored.

    configurations: see Configurations. best_trial: the role of the trial with the best tuning score, if there is one.
    with_claims: has_claims of the task.
    There is a question for each level of the base; for each distinct claim of the original that runs can decide; for
    each part of the network; and whether the best trial is better than the defaults, and than the published trial 2.
    """
    return Plan(_questions(Configurations(configurations, base), best_trial, margin, with_claims), schedule)


def _questions(c: Configurations, best_trial: str | None, margin: float, with_claims: bool) -> tuple[Question, ...]:
    questions = [
        Question(level_name(factor, level), (c.contrast(name, c.own),), margin=margin)
        for (of, factor, level), name in c.places.items()
        if of == c.base and name != c.own and c.own in c.rows
    ]
    distinct = set()
    for claim in CLAIMS if with_claims else ():
        contrasts = tuple(c.of_claim(claim))
        key = frozenset(contrasts), claim.score
        if contrasts and key not in distinct:
            distinct.add(key)
            of_claim = ROUTE_MARGIN if claim.score == "route_accuracy" else margin
            questions.append(Question(claim.quote, contrasts, True, of_claim, claim.score))
    for part in PARTS:
        name = f"{c.base}: without {part}"
        if {name, c.own} <= c.rows.keys():
            questions.append(Question(f"without {part}", (c.contrast(name, c.own),), margin=margin))
    for rival in (DEFAULTS, TRIAL_2):
        if best_trial is None or not {best_trial, rival} <= set(c.roles):
            continue
        first, second = c.rows[best_trial], c.rows[rival]
        if any(first[name] != second[name] for name in (*TABLE, "n_steps")):
            contrast = c.contrast(best_trial, rival)
            questions.append(Question(f"{best_trial} against {rival}", (contrast,), margin=margin))
    return tuple(questions)


def read_plan(record: Mapping[str, Any]) -> Plan:
    """The plan that was recorded as dataclasses.asdict has it, by way of JSON."""
    questions = []
    for entry in record["questions"]:
        contrasts = tuple(Contrast(**contrast) for contrast in entry["contrasts"])
        questions.append(Question(**entry | {"contrasts": contrasts}))
    looks = {name: tuple(values) for name, values in record["schedule"].items()}
    return Plan(tuple(questions), Schedule(**looks))


def scores_of(runs: pd.DataFrame) -> dict[str, dict[str, np.ndarray]]:
    """{score: {name: (R,)}} of runs (see named), in the order of the seeds, for evidence.look_at.

    A configuration has no route_accuracy where its task knows no true area. A seed that diverged routes by chance.
    """
    in_order = runs.drop_duplicates(["name", "seed"]).sort_values("seed", kind="stable")
    found: dict[str, dict[str, np.ndarray]] = {"test_accuracy": {}, "route_accuracy": {}}
    for name, rows in in_order.groupby("name", sort=False):
        found["test_accuracy"][name] = rows["test_accuracy"].to_numpy()
        if rows["route_accuracy"].notna().any():
            found["route_accuracy"][name] = rows["route_accuracy"].fillna(CHANCE_ROUTED).to_numpy()
    return found


@dataclass(frozen=True)
class Finding:
    """A question, its answer, and among how many questions it is asked."""

    question: Question
    answer: Answer
    n_questions: int

    @property
    def verdict(self) -> str:
        return self.answer.verdict

    @property
    def is_tested(self) -> bool:
        return self.verdict != NOT_TESTED

    @property
    def looks(self) -> dict[Contrast, Look]:
        """The latest look of each contrast; {} if it is not tested."""
        return dict(zip(self.question.contrasts, self.answer.looks, strict=False))

    @property
    def deciding(self) -> Contrast:
        """The contrast that decides: of a refuted claim the one that is surely worse, else the least favourable."""
        looks = self.looks
        worse = [contrast for contrast in looks if looks[contrast].effect < 0]
        if self.verdict == REFUTED and worse:
            return min(worse, key=lambda c: looks[c].p_zero)
        return min(looks, key=lambda c: looks[c].interval(len(looks))[0])

    @property
    def effect(self) -> tuple[float, float, float]:
        """(effect, low, high) of the contrast that decides, its interval valid whichever look was the last."""
        look = self.looks[self.deciding]
        return look.effect, *look.interval(len(self.looks))

    @property
    def n_seeds(self) -> int:
        """The seeds on each side of the contrast that decides."""
        return self.looks[self.deciding].n


@dataclass(frozen=True)
class Ablation:
    """One setting of the base moved through its levels, all else equal.

    own: the base's own level. moved: {level: Finding} about accuracy. ce: {level: (effect, low, high)} in nats, against
    the own level. levels: indexed by level, mean, low, high of the test accuracy, n_steps and n_seeds.
    """

    factor: str
    own: float
    moved: dict[float, Finding]
    ce: dict[float, tuple[float, float, float]]
    levels: pd.DataFrame

    def having(self, *verdicts: str) -> dict[float, Finding]:
        """The levels with one of these verdicts."""
        return {level: finding for level, finding in self.moved.items() if finding.verdict in verdicts}

    @property
    def decided(self) -> dict[float, Finding]:
        """The levels that are better or worse."""
        return self.having(BETTER, WORSE)

    @property
    def best(self) -> float | None:
        """Of the levels that are decided to be better, that with the largest effect."""
        better = self.having(BETTER)
        return max(better, key=lambda level: better[level].effect[0], default=None)

    @property
    def cheapest(self) -> float | None:
        """The smallest level below the own one that costs at most a point."""
        return min((level for level in self.having(SAME, BETTER) if level < self.own), default=None)


class Comparisons:
    """What the runs of a confirmed study answer.

    runs: the table of confirm.records. n_test: test samples. base, plan: as recorded; an older record has none, so they
    are found from the runs. best_trial, with_claims: see plan().
    findings: {question: Finding}. given_up: of the questions that no look of the schedule is predicted to decide, the
    seeds on each side that they are predicted to need. All other undecided questions wait for seeds.
    """

    def __init__(
        self,
        runs: pd.DataFrame,
        n_test: int = 8192,
        base: str = "",
        recorded: Plan | None = None,
        best_trial: str | None = None,
        with_claims: bool = True,
    ) -> None:
        # the seeds of an older record's base may have failed, but not those of its levels
        runs = named(runs[(runs["base"] == "") | runs["base"].isin(runs["role"])])
        self.runs = runs.drop_duplicates(["name", "seed"])
        by_ce = runs[runs["role"] != ""].groupby("role", sort=False)["test_ce"].mean()
        self.roles: list[str] = list(by_ce.sort_values(kind="stable").index)
        self.base = base or ablated(runs) or self.roles[0]
        self.configurations = Configurations(runs, self.base)
        self.n_seeds: dict[str, int] = self.runs["name"].value_counts(sort=False).to_dict()
        self.best_trial = best_trial
        self.schedule = recorded.schedule if recorded else _schedule(self.n_seeds)
        questions = recorded.questions if recorded else ()
        if not recorded:
            questions = _questions(self.configurations, best_trial, MARGIN, with_claims)
        self.findings: dict[str, Finding] = {}
        self.given_up: dict[str, float] = {}
        if questions:  # a record of before may have none, if its time ended early
            asked = Plan(questions, self.schedule)
            looks = evidence.look_at(asked, scores_of(runs), 1 / n_test)
            answers = evidence.answers(asked, looks)
            self.findings = {q.name: Finding(q, answers[q.name], len(questions)) for q in questions}
            seconds = {name: 1.0 for q in questions for contrast in q.contrasts for name in (contrast.a, contrast.b)}
            self.given_up = evidence.next_blocks(asked, looks, self.n_seeds, seconds)[1]
        self._runs = {name: rows.sort_values("seed") for name, rows in self.runs.groupby("name", sort=False)}

    def run(self, name: str) -> pd.DataFrame:
        """The runs of a configuration, a row for each seed, in order."""
        return self._runs[name]

    def difference(self, a: str, b: str, score: str) -> tuple[float, float, float]:
        """(effect, low, high) of a score of a against b, over the seeds that both have, with a 95 % interval."""
        n, paired = min(self.n_seeds[a], self.n_seeds[b]), self.configurations.contrast(a, b).paired
        first, second = (self.run(name)[score].to_numpy()[:n] for name in (a, b))
        return evidence.compare(first, second, paired)[:3]

    @cached_property
    def ablations(self) -> list[Ablation]:
        """Every ablation of the base, in the order of the plan."""
        found = []
        columns = ["level", "mean", "low", "high", "n_steps", "n_seeds"]
        for factor in self.configurations.factors:
            names = self.configurations.levels(factor)
            runs = {level: self.run(name) for level, name in names.items()}
            rows = [
                (level, *evidence.mean_interval(run["test_accuracy"]), run["n_steps"].iloc[0], len(run))
                for level, run in runs.items()
            ]
            own = next((level for level, name in names.items() if name == self.configurations.own), math.nan)
            moved = self.tested({level: level_name(factor, level) for level in names})
            ce = {level: self.difference(names[level], self.configurations.own, "test_ce") for level in moved}
            if moved:
                found.append(Ablation(factor, own, moved, ce, pd.DataFrame(rows, columns=columns).set_index("level")))
        return found

    def tested(self, names: Mapping[Any, str]) -> dict[Any, Finding]:
        """The findings of the questions of these names, by the keys of names, without those that are not tested."""
        found = {key: self.findings.get(name) for key, name in names.items()}
        return {key: finding for key, finding in found.items() if finding and finding.is_tested}

    @property
    def tuning(self) -> dict[str, Finding]:
        """{rival: whether the best trial is better than it}."""
        return self.tested({rival: f"{self.best_trial} against {rival}" for rival in (DEFAULTS, TRIAL_2)})

    @property
    def parts(self) -> dict[str, Finding]:
        """{part: what the network without it scores beside the whole}."""
        return self.tested({part: f"without {part}" for part in PARTS})

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row for each contrast of each question.

        effect (a - b) with low and high, seeds, p_zero, p_below and p_above are those of its latest look; the verdict,
        p_times_m (p times the number of questions, looks and contrasts accounted for) and at_most are the question's.
        """
        rows = []
        for name, finding in self.findings.items():
            question, answer = finding.question, finding.answer
            for contrast in question.contrasts:
                row: dict[str, Any] = {"question": name, "is_claim": question.is_claim}
                row |= asdict(contrast) | {"score": question.score, "margin": question.margin}
                if look := finding.looks.get(contrast):
                    low, high = look.interval(len(question.contrasts))
                    row |= {"effect": look.effect, "low": low, "high": high, "seeds": look.n}
                    row |= {"looks": self.schedule.looks.index(look.n) + 1, "sd": look.sd}
                    row |= {name: getattr(look, name) for name in ("p_zero", "p_below", "p_above")}
                    row |= {"p_times_m": answer.p_value, "at_most": answer.at_most}
                rows.append(row | {"verdict": answer.verdict})
        return pd.DataFrame(rows)

    @property
    def power(self) -> dict[bool, dict[int, float]]:
        """{whether in pairs: {seeds: the difference of accuracy that is found in 80 % of reports}} for levels.

        The spread is the median over all levels; the numbers of seeds are those of the first look and the last taken.
        """
        levels = [finding for finding in self.findings.values() if finding.is_tested and not finding.question.is_claim]
        if not levels:
            return {}
        weights = dict(zip(self.schedule.looks, self.schedule.weights, strict=True))
        looks = [n for n in sorted({self.schedule.looks[0], max(finding.n_seeds for finding in levels)}) if n > 3]
        found: dict[bool, dict[int, float]] = {}
        for paired in (True, False):
            spreads = [f.looks[f.deciding].sd for f in levels if f.deciding.paired == paired]
            for n in looks if spreads else ():
                df, level = n - 1 if paired else 2 * n - 2, evidence.LEVEL / len(self.findings) * weights[n]
                found.setdefault(paired, {})[n] = _smallest_effect(float(np.median(spreads)), n, df, level)
        return found

    def decide(self, claim: Claim) -> Decision:
        """What the runs say of a claim."""
        contrasts = self.configurations.of_claim(claim)
        for finding in self.findings.values():
            question = finding.question
            same = question.is_claim and set(question.contrasts) == set(contrasts) and question.score == claim.score
            if contrasts and same and finding.is_tested:
                return Decision(finding.verdict, "question", {"finding": finding, "sides": contrasts[finding.deciding]})
        return Decision(NOT_TESTED)

    def claims(self, others: Mapping[str, Decision] | None = None) -> dict[Claim, Decision]:
        """What came of every claim.  others: {record: Decision} of those that other records decide."""
        decided = {claim: self.decide(claim) for claim in CLAIMS}
        for claim, decision in decided.items():
            if decision.verdict == NOT_TESTED:
                decided[claim] = (others or {}).get(claim.record, decision)
        return decided

    def next_space(self, space: Mapping[str, Any]) -> dict[str, Any]:
        """The space for the next search: decided evidence alone changes the one that was searched.

        A level is dead if its accuracy is decided to be worse and lies more than MARGIN lower. A range then ends at the
        outermost level that was tested in it and stays. A level outside comes in if it is better, and so does the own
        level.
        """
        new = dict(space)
        for ablation in self.ablations:
            name, entry = ablation.factor, space.get(ablation.factor)
            if entry is None:
                continue
            dead = {level for level, finding in ablation.having(WORSE).items() if finding.effect[0] < -MARGIN}
            better = {*ablation.having(BETTER), ablation.own}
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


def _schedule(n_seeds: Mapping[str, int]) -> Schedule:
    """The schedule of a record that has none: the usual one, or one look for fewer seeds than its first."""
    most = max(n_seeds.values())
    return SCHEDULE if most >= SCHEDULE.looks[0] else Schedule((max(most, 2),), (1.0,))


def _smallest_effect(sd: float, n: int, df: float, level: float) -> float:
    """The difference that a two-sided t test at this level shows after n seeds in 80 % of cases.  sd, df: see Look."""
    from scipy import optimize, stats  # here, because they take half a second

    critical = stats.t.isf(level / 2, df)
    noncentrality = optimize.brentq(lambda x: stats.nct.sf(critical, df, x) - 0.8, 0, 3 * critical + 3)
    return sd * noncentrality / math.sqrt(n)


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
