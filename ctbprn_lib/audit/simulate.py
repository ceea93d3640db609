"""Simulated records whose truth is known, to see how often the statistics are wrong."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from ctbprn_lib import InputError, evidence, files
from ctbprn_lib.evidence import (
    BETTER,
    MARGIN,
    REFUTED,
    SAME,
    SUPPORTED,
    WORSE,
    Contrast,
    Look,
    Plan,
    Question,
    Schedule,
)
from ctbprn_lib.report import comparisons
from ctbprn_lib.report.comparisons import CLAIMS, DEFAULTS, TRIAL_2
from ctbprn_lib.train import TABLE, Hyperparameters

ACCURACY = 0.97  # mean test accuracy of a configuration to which no effect is added
CE_PER_ERROR = 2.4  # nats of simulated cross-entropy for an error of 1
EQUAL_SAMPLES = ", equal samples"  # end of a factor's name
RESOLUTION = 1 / 8192  # of a simulated accuracy: 8,192 test samples


def spreads(path: Path) -> pd.Series:
    """The spread of each configuration of a confirmed study over its seeds.

    path: the study's confirmed.csv. The spread is the standard deviation of log(error), where the error is one less
    the test accuracy. An error of 0 counts as half an error in 8,192 samples.
    Raises InputError for a file that cannot be read, or in which no configuration has two seeds.
    """
    columns = ["role", "base", "factor", "level"]
    table = files.table(path, columns, {"test_accuracy": 1})
    log_errors = np.log((1 - table["test_accuracy"]).clip(lower=0.5 / 8192))
    spread = log_errors.groupby([table[name] for name in columns]).std().dropna()
    if spread.empty:
        raise InputError(f"{path}: expected at least two seeds of a configuration, each with its test_accuracy")
    return spread


def runs(
    n_seeds: int,
    rng: np.random.Generator,
    effects: Mapping[tuple[str, float | str], float] | None = None,
    spread: float = 0.25,
) -> pd.DataFrame:
    """Simulate the confirmed runs of an ordinary report, in which only the given effects act.

    effects: {(factor, level): what it adds to the accuracy, as a share}, also for ("without", part of the network);
    None for no effect.
    spread: standard deviation of log(error) over seeds. Errors are lognormal, so they are skewed and stay above 0.
    Returns a table like that of confirm.records, with one row for each run and seed.
    """
    base = asdict(Hyperparameters(lr=0.0012, rank=16, temperature=1.3, batch_size=16)) | {"n_steps": 500}
    ladder: dict[str, tuple[float, ...]] = {
        name: TABLE[name].ladder for name in ("lr", "d", "rank", "temperature", "batch_size")
    }
    ladder |= {"seq_len": (32, 64, 128), f"batch_size{EQUAL_SAMPLES}": (8, 16, 32, 64), "n_steps": (250, 500, 1000)}
    roles = ("trial 7", "trial 3", "published trial 1", TRIAL_2, "defaults")
    rows: list[dict[str, object]] = []
    drawn: dict[str, np.ndarray] = {}  # errors of each configuration that has been drawn

    def add_run(
        name: str, role: str = "", of: str = "", factor: str = "", level: float = math.nan, part: str = ""
    ) -> None:
        """Add the rows of a configuration; one that several factors share is drawn once."""
        if name not in drawn:
            error = (1 - ACCURACY) * np.exp(spread * rng.normal(size=n_seeds) - spread**2 / 2)
            drawn[name] = error - (effects or {}).get((factor, part or level), 0)
        place = dict(name=name, role=role, base=of, factor=factor, level=level, without=part) | base
        if not role and not part:
            place[comparisons.hyperparameter(factor)] = level
        for seed, error in enumerate(drawn[name]):
            scores = dict(seed=seed, test_accuracy=1 - error, test_ce=CE_PER_ERROR * error, route_accuracy=1 - error)
            rows.append(place | scores)

    def move(of: str, factor: str, levels: Iterable[float]) -> None:
        own = base[comparisons.hyperparameter(factor)]
        for level in sorted({*levels, own}):
            moved = f"{of}: {comparisons.level_name(factor, level)}"
            add_run(f"{of} again" if level == own else moved, of=of, factor=factor, level=level)

    for role in roles:
        add_run(role, role)
    best = min(roles, key=lambda role: float(drawn[role].mean()))
    for factor, levels in ladder.items():
        move(best, factor, levels)
    for part in comparisons.PARTS:
        add_run(f"{best}: without {part}", of=best, factor="without", part=part)
    if best != TRIAL_2:
        move(TRIAL_2, "seq_len", ladder["seq_len"])
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class Study:
    """A confirmed study whose spreads and pairs are simulated, with the questions of its report.

    names: (C,) configurations. accuracy: (C,) the mean of each. deviations: (C, S) of log(error) from its mean, for
    each of S seeds. groups: (C,) equal where equal seeds make pairs. seconds: {configuration: of training a seed}.
    levels, claims: the questions that the study can answer; claims says how often the original makes each.
    plan: these questions and those that the study cannot answer, which count but are never asked.
    """

    names: list[str]
    accuracy: np.ndarray
    deviations: np.ndarray
    groups: list[tuple]
    seconds: dict[str, float]
    levels: list[Question]
    claims: dict[Question, int]
    plan: Plan

    def differences(self, question: Question, accuracy: np.ndarray) -> np.ndarray:
        """The true difference a - b of each contrast of a question, if these are the true accuracies (C,)."""
        a, b = ([self.names.index(getattr(c, side)) for c in question.contrasts] for side in "ab")
        return np.round(accuracy[a] - accuracy[b], 12)

    def truths(self) -> dict[str, np.ndarray]:
        """{what is true: (C,) accuracies}: as measured, or all alike but for every second level, which is worse."""
        own = self.accuracy[self.names.index(self.levels[0].contrasts[0].b)]
        moved = [self.names.index(question.contrasts[0].a) for question in self.levels[::2]]
        truths = {"as measured": self.accuracy, "nothing matters": np.full(len(self.names), own)}
        for name, points in (("half one point worse", 1), ("half two points worse", 2)):
            truths[name] = truths["nothing matters"].copy()
            truths[name][moved] -= points / 100
        return truths

    def draw(self, accuracy: np.ndarray, n_reports: int, n_seeds: int, rng: np.random.Generator) -> np.ndarray:
        """Simulated accuracies (n_reports, C, n_seeds) with these true means (C,).

        Errors are lognormal, so accuracies are skewed. Logarithms of errors of a group vary together as in the study.
        """
        n_measured = self.deviations.shape[1]
        logs = np.empty((n_reports, len(self.names), n_seeds))
        for group in dict.fromkeys(self.groups):
            members = [i for i, other in enumerate(self.groups) if other == group]
            shared = rng.normal(size=(n_reports, n_measured, n_seeds))
            logs[:, members] = self.deviations[members] @ shared / math.sqrt(n_measured - 1)
        variance = self.deviations.var(1, ddof=1)
        return 1 - (1 - accuracy)[:, None] * np.exp(logs - variance[:, None] / 2)


def measured(path: Path) -> Study:
    """The Study of a confirmed.csv.

    Raises InputError for a file that cannot be read or lacks what the questions are about: a trial of the search,
    published trial 2, the defaults, and an ablation of one of them, each with the accuracies of at least two seeds.
    """
    text = ["role", "base", "factor"]
    numbers = ["level", *TABLE, "n_steps", "seed", "train_seconds"]
    later = {name: value for name, value in asdict(Hyperparameters()).items() if TABLE[name].added}
    table = files.table(path, text, dict.fromkeys(numbers, math.inf) | {"test_accuracy": 1}, later)
    roles = table[table["role"] != ""].groupby("role", sort=False)
    means = roles["test_accuracy"].mean()
    trials = means[means.index.str.startswith("trial ")]
    moved = table["factor"].str.removesuffix(EQUAL_SAMPLES).isin(numbers) & table["base"].isin(means.index)
    table = table[moved | (table["role"] != "")]
    table = comparisons.named(table)
    rows = {name: part.drop_duplicates("seed").sort_values("seed") for name, part in table.groupby("name", sort=False)}
    n_seeds = min((len(part) for part in rows.values()), default=0)
    errors = np.array([1 - part["test_accuracy"].to_numpy()[:n_seeds] for part in rows.values()])
    whole = n_seeds > 1 and np.isfinite(errors).all()
    base = comparisons.ablated(table)
    if not whole or not base or trials.empty or not {TRIAL_2, DEFAULTS} <= set(means.index):
        raise InputError(
            f"{path}: expected a trial, {TRIAL_2}, the defaults and an ablation of one of them, "
            "each with the test_accuracy of at least two seeds"
        )
    logs = np.log(np.maximum(errors, RESOLUTION / 2))
    configurations = comparisons.Configurations(table, base)
    plan = comparisons.plan(table, base, str(trials.idxmax()))
    own = configurations.own
    levels = [question for question in plan.questions if not question.is_claim and question.contrasts[0].b == own]
    asked = [set(configurations.of_claim(claim)) for claim in CLAIMS if claim.score == "test_accuracy"]
    of_accuracy = [question for question in plan.questions if question.is_claim and question.score == "test_accuracy"]
    claims = {question: asked.count(set(question.contrasts)) for question in of_accuracy}
    others = [question for question in plan.questions if question not in levels and question not in claims]
    for i, question in enumerate(others):
        if question.score != "test_accuracy":
            others[i] = replace(question, contrasts=(Contrast(question.name, own, False),))
    others += [Question(f"without {part}", (Contrast(f"without {part}", own, True),)) for part in comparisons.PARTS]
    return Study(
        names=list(rows),
        accuracy=1 - errors.mean(1),
        deviations=logs - logs.mean(1, keepdims=True),
        groups=[(bool(part["role"].iloc[0]), *part[comparisons.SHAPES].iloc[0]) for part in rows.values()],
        seconds={name: float(part["train_seconds"].iloc[0]) / len(part) for name, part in rows.items()},
        levels=levels,
        claims=claims,
        plan=Plan((*levels, *claims, *others)),
    )


Looks = dict[str, tuple[tuple[Look, ...], ...]]  # of each question, those of its contrasts


def all_looks(study: Study, scores: np.ndarray, schedule: Schedule) -> list[Looks]:
    """For each report, all looks of its questions.  scores: (n_reports, C, n_seeds) as Study.draw makes them."""
    column = {name: i for i, name in enumerate(study.names)}
    taken: dict[Contrast, list[tuple[Look, ...]]] = {}
    for contrast in dict.fromkeys(c for question in study.plan.questions for c in question.contrasts):
        looks = []
        if contrast.a in column:
            a, b = scores[:, column[contrast.a]], scores[:, column[contrast.b]]
            for n, weight in schedule.after(0):
                tests = evidence.t_tests(a[:, :n], b[:, :n], contrast.paired, MARGIN, RESOLUTION)
                looks.append([Look(n, weight, *values) for values in np.transpose(tests).tolist()])
        taken[contrast] = list(zip(*looks, strict=True)) if looks else [()] * len(scores)
    return [
        {question.name: tuple(taken[c][i] for c in question.contrasts) for question in study.plan.questions}
        for i in range(len(scores))
    ]


def until_decided(study: Study, looks: Looks, budgets: Sequence[int]) -> Iterator[tuple[int, Looks]]:
    """Buy blocks as evidence.next_blocks says, until each budget is spent or nothing more can be decided.

    looks: all that a report could take. budgets: seed-runs, rising. The first look of each configuration is taken.
    Yields for each budget the seed-runs that were spent and the looks taken.
    """
    seeds = dict.fromkeys(study.names, study.plan.schedule.looks[0])
    seconds = dict.fromkeys((c.a for q in study.plan.questions for c in q.contrasts), math.inf) | study.seconds

    def taken(question: Question) -> tuple[tuple[Look, ...], ...]:
        common = [min(seeds.get(c.a, 0), seeds.get(c.b, 0)) for c in question.contrasts]
        pairs = zip(common, looks[question.name], strict=True)
        return tuple(tuple(look for look in of_one if look.n <= n) for n, of_one in pairs)

    so_far = {question.name: taken(question) for question in study.plan.questions}
    for budget in budgets:
        while purchases := evidence.next_blocks(study.plan, so_far, seeds, seconds)[0]:
            bought = purchases[0].seeds
            if sum((seeds | bought).values()) > budget:
                break
            seeds |= bought
            for question in study.plan.questions:
                if any(c.a in bought or c.b in bought for c in question.contrasts):
                    so_far[question.name] = taken(question)
        yield sum(seeds.values()), dict(so_far)


def with_holm(study: Study, looks: Looks, n_seeds: int) -> dict[str, str]:
    """{question: verdict} with a fixed number of seeds, where Holm adjusts all p-values of the report together.

    Each level has two p-values, of accuracy and of cross-entropy, which are taken to be alike; each contrast of a claim
    has one. All contrasts are tested for equivalence, adjusted on their own.
    """
    questions = [*study.levels, *study.claims]
    at = {
        contrast: next(look for look in taken if look.n == n_seeds)
        for question in questions
        for contrast, taken in zip(question.contrasts, looks[question.name], strict=True)
    }
    twice = [*at, *(question.contrasts[0] for question in study.levels)]
    adjusted = evidence.holm([at[contrast].p_zero for contrast in twice])[: len(at)]
    same = evidence.holm([max(look.p_below, look.p_above) for look in at.values()])
    found = {
        contrast: evidence.verdict_on_effect(look.effect, *p_values)
        for (contrast, look), *p_values in zip(at.items(), adjusted, same, strict=True)
    }
    verdicts = {question.name: found[question.contrasts[0]] for question in study.levels}
    for claim in study.claims:
        verdicts[claim.name] = evidence.verdict_on_claim(found[contrast] for contrast in claim.contrasts)
    return verdicts


def is_false(verdict: str, differences: np.ndarray, margin: float = MARGIN) -> bool:
    """Whether a verdict is wrong, given the true difference (k,) of each contrast of its question."""
    if verdict == SAME:
        return bool((abs(differences) >= margin).any())
    if verdict in (BETTER, SUPPORTED):
        return bool((differences <= 0).all() or (differences <= -margin).any())
    return verdict in (WORSE, REFUTED) and bool((differences >= 0).all())


def rules(study: Study, accuracy: np.ndarray, n_reports: int, seed: int) -> pd.DataFrame:
    """Simulated reports under rules that spend different numbers of seed-runs.

    accuracy: (C,) the true accuracy of each configuration.
    Returns one row for each rule, with the columns rule, seed_runs (mean), levels and claims (decided, mean; a claim
    counts as often as the original makes it), worse (share of the levels that are worse by MARGIN or more of which the
    report says so), covered (share of the levels' intervals, at the looks where they stopped, that hold the truth; NaN
    with Holm) and false (reports with a false verdict).
    """
    schedule, plan = study.plan.schedule, study.plan
    first, n_configurations = schedule.looks[0], len(study.names)
    differences = {q.name: study.differences(q, accuracy) for q in (*study.levels, *study.claims)}
    records = []

    def record(rule: str, seed_runs: int, verdicts: Mapping[str, str], covered: float = math.nan) -> None:
        decided = {name: verdicts[name] in (BETTER, WORSE, SAME, SUPPORTED, REFUTED) for name in differences}
        worse = [verdicts[q.name] == WORSE for q in study.levels if differences[q.name][0] <= -MARGIN]
        row: dict[str, object] = {"rule": rule, "seed_runs": seed_runs}
        row["levels"] = sum(decided[question.name] for question in study.levels)
        row["claims"] = sum(decided[claim.name] * n for claim, n in study.claims.items())
        row["worse"] = np.mean(worse) if worse else math.nan
        row["covered"] = covered
        row["false"] = any(is_false(verdicts[name], true) for name, true in differences.items())
        records.append(row)

    def record_looks(rule: str, seed_runs: int, looks: Looks) -> None:
        answered = evidence.answers(plan, looks)
        intervals = [(answered[q.name].looks[0].interval(), differences[q.name][0]) for q in study.levels]
        covered = float(np.mean([low <= true <= high for (low, high), true in intervals]))
        record(rule, seed_runs, {name: one.verdict for name, one in answered.items()}, covered)

    for part in np.array_split(np.arange(n_reports), math.ceil(n_reports / 50)):  # keeps memory small
        rng = np.random.default_rng([seed, part[0]])
        scores = study.draw(accuracy, len(part), schedule.looks[-1], rng)
        for looks in all_looks(study, scores, schedule):
            for n in (first, 4 * first):
                record(f"fixed {n} seeds, Holm", n * n_configurations, with_holm(study, looks, n))
            once: Looks = {
                name: tuple(tuple(look._replace(weight=1.0) for look in of_one[:1]) for of_one in taken)
                for name, taken in looks.items()
            }
            record_looks(f"fixed {first} seeds", first * n_configurations, once)
            budgets = [k * first * n_configurations for k in (2, 3, 4)]
            for budget, (seed_runs, taken) in zip(budgets, until_decided(study, looks, budgets), strict=True):
                record_looks(f"looks, at most {budget:,}", seed_runs, taken)
            record_looks("every look of every question", schedule.looks[-1] * n_configurations, looks)
    return pd.DataFrame(records).groupby("rule", sort=False).mean().reset_index()
