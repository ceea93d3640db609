"""A study as plain values, read once from its record: what a report's sentences and pictures are made of.

Facts holds what the trials show. Its field confirmed holds what confirm.ipynb added, or None.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
from numpy.typing import ArrayLike

from ctbprn_lib import InputError, confirm, evidence, files, frontier, published, search, storage, workers
from ctbprn_lib.evidence import LEVEL, NOT_TESTED, REFUTED, SUPPORTED, UNDECIDED
from ctbprn_lib.report import comparisons
from ctbprn_lib.report.comparisons import Ablation, Claim, Comparisons, Decision, Finding, from_reproduction
from ctbprn_lib.search import HYPERPARAMETERS

Interval = tuple[float, float, float]  # mean, low, high
Row = dict[str, Any]
GOAL = {"accuracy": 0.995, "ce": 0.02}  # this project's, on the routing task
WITH_GOAL = ("ctbprn", "frontier")  # the studies of this project, whose reports speak of its goal
SHOW_BALANCED = 0.6  # share of the largest class above which accuracy says little by itself
RULES = ("majority class", "linear rule")  # the simple rules that a result must beat, of a task's baselines
SHAPE = ["d", "rank", "batch_size", "seq_len"]  # hyperparameters that memory depends on
SIZES = ["A_mib", "W_mib", "I_mib"]
LEARNT = 0.9  # share routed to the true area from which on a seed has learnt to route


@dataclass(frozen=True)
class Rule:
    """The best simple rule: its name, its accuracy on test samples, and {name: accuracy} of the others."""

    name: str
    accuracy: float
    others: dict[str, float]


@dataclass(frozen=True)
class Facts:
    """The record of a tuning study.

    question: its fingerprint (task, space, budget, objective, seed). samples: what is known of the samples of a task
    that comes from recordings, {} for another task. baselines: {simple rule: accuracy on test samples}.
    trials: search.records. foreign: (number, state, reason) of trials that other programs put into the study.
    finished: {number: trial} as Optuna holds them. deleted: whether the storage also holds a confirmation of a deleted
    study of the same name, which is left out. n_calls: how often the search was begun, by one worker or several.
    out_of_time: the minutes and n_trials that the search was given, if time ended it before it had that many, or None.
    has_database: whether the study lies in an SQLite file in its own folder.
    front: the best settings for their cost, where another study of the task has found them (frontier.known), or None.
    """

    name: str
    question: dict[str, Any]
    task: dict[str, Any]
    samples: dict[str, Any]
    baselines: dict[str, float]
    trials: pd.DataFrame
    foreign: tuple[tuple[int, str, str], ...]
    finished: dict[int, optuna.trial.FrozenTrial]
    deleted: bool = False
    n_calls: int = 1
    out_of_time: Row | None = None
    has_database: bool = False
    front: Row | None = None
    confirmed: "Confirmed | None" = None

    @property
    def budget(self) -> dict[str, Any]:
        return self.question["budget"]

    @property
    def space(self) -> dict[str, Any]:
        return self.question["space"]

    @property
    def names(self) -> list[str]:
        """The hyperparameters that were searched."""
        return [name for name in HYPERPARAMETERS if name in self.space]

    @property
    def score(self) -> str:
        """The column of the score that the search was for."""
        return "val_accuracy" if self.question["objective"] == "val_accuracy" else "val_ce"

    @property
    def states_goal(self) -> bool:
        """Whether this is a study of the project, so that its report speaks of the project's goal."""
        return self.name in WITH_GOAL

    @property
    def show_balanced(self) -> bool:
        return self.samples.get("largest_share", 0) > SHOW_BALANCED

    @property
    def has_seeds(self) -> bool:
        """Whether a trial has several replicas, so that anything can be told apart."""
        return self.budget["n_replicas"] > 1

    @property
    def n_enqueued(self) -> int:
        """How many finished trials were put into the queue by hand, so that no sampler chose them."""
        ended = [trial for trial in self.finished.values() if trial.state in workers.FINISHED]
        return sum("fixed_params" in trial.system_attrs for trial in ended)

    @cached_property
    def complete(self) -> pd.DataFrame:
        return self.trials[self.trials["state"] == "complete"].reset_index(drop=True)

    @property
    def by_accuracy(self) -> Row:
        """The best complete trial by accuracy; on a tie that with the lower CE."""
        ordered = self.complete.sort_values(["val_accuracy", "val_ce"], ascending=[False, True])
        return ordered.to_dict("records")[0]

    @property
    def by_ce(self) -> Row:
        """The best complete trial by CE."""
        return self.complete.nsmallest(1, "val_ce").to_dict("records")[0]

    @property
    def n_validation(self) -> int:
        """Samples of a score: all recordings of the split, or as many as the budget says where they can be made."""
        return self.task.get("n_samples", {}).get("validation", self.budget["n_validation"])

    @cached_property
    def like_the_best(self) -> list[int]:
        """Indices into complete of the best trial by CE and of those that cannot be told from it."""
        scores = self.complete[[f"val_ce_{r}" for r in range(self.budget["n_replicas"])]].to_numpy()
        best = int(self.complete["val_ce"].idxmin())
        return evidence.like_the_best(scores, best) if self.has_seeds else [best]

    @property
    def same_trials(self) -> list[int]:
        """Numbers of the other trials that cannot be told from the best by CE."""
        return [int(self.complete.loc[i, "trial"]) for i in self.like_the_best[1:]]

    @cached_property
    def ended(self) -> pd.DataFrame:
        """Complete and pruned trials with their standing: the longer one was let run the better, then by CE.

        Pruned trials count too, or trends and importance would be those of the survivors.
        """
        ended = self.trials[self.trials["state"].isin(["complete", "pruned"])]
        ended = ended.sort_values(["n_steps", "val_ce"], ascending=[False, True])
        return ended.assign(standing=range(len(ended)))

    @cached_property
    def trends(self) -> list[Row]:
        """evidence.trends of each hyperparameter with the trials' standing, with decided: whether there is a trend."""
        table = evidence.trends(self.ended, self.names, "standing")
        return table.assign(decided=table["p_holm"] < LEVEL).to_dict("records")

    @property
    def to_extend(self) -> list[tuple[str, str]]:
        """(hyperparameter, end) where a decided trend runs into the end of the range at which the best value lies."""
        found, best = [], self.by_ce
        for trend in self.trends:
            name, end = trend["hyperparameter"], "upper" if trend["rho"] < 0 else "lower"
            no_more_tokens = name == "seq_len" and best[name] >= self.task["n_tokens"]
            if trend["decided"] and not no_more_tokens and search.edge(self.space[name], best[name]) == end:
                found.append((name, end))
        return found

    @cached_property
    def cheapest(self) -> Row | None:
        """Of the trials like the best the one with the least arithmetic a step; None unless that is below 90 %.

        share: its arithmetic as a share of the best trial's. It is counted as parameters × tokens a step; unlike
        seconds, that does not depend on what else the machine was doing.
        """
        cost = self.complete["n_parameters"] * self.complete["batch_size"] * self.complete["seq_len"]
        cheapest, best = cost[self.like_the_best].idxmin(), self.like_the_best[0]
        share = cost[cheapest] / cost[best]
        return {"trial": self.complete.loc[cheapest, "trial"], "share": share} if share < 0.9 else None

    @property
    def rule(self) -> Rule:
        """The simple rule that a result must beat: the best one."""
        levels = {rule: self.baselines[rule] for rule in RULES if rule in self.baselines}
        best = max(levels, key=levels.__getitem__)
        return Rule(best, levels.pop(best), levels)

    @property
    def references(self) -> dict[str, float]:
        """{name: test accuracy} of the lines that a picture of test accuracies shows: the best rule and the ceiling."""
        if not self.baselines:
            return {}
        ceiling = {"ceiling": self.baselines["ceiling"]} if "ceiling" in self.baselines else {}
        return {self.rule.name: self.rule.accuracy} | ceiling

    @property
    def beside_rule(self) -> tuple[str, float, float]:
        """(beside of the best accuracy and the best simple rule, low, high), low to high its interval over samples."""
        row = self.by_accuracy
        low, high = evidence.sample_interval(row["val_accuracy"], self.n_validation)
        return beside(self.rule, low, high, row["val_accuracy_low"], row["val_accuracy_high"]), low, high

    def copies(self, split: str) -> int | None:
        """How many samples of a split are exact copies of samples in other splits; None if nobody has counted."""
        if self.task["task"] == "routing":  # drawn afresh
            return 0
        return self.samples.get("copies", {}).get(split)

    @property
    def calls(self) -> list[Row]:
        """The sampler and pruner of each call of the search, with n_trials, the number of trials at its end."""
        ended = self.trials[self.trials["state"].isin(["complete", "pruned"])].reset_index(drop=True)
        how = ended[["sampler", "pruner"]]
        last = how[(how != how.shift(-1)).any(axis=1)]  # the next trial was asked for in another way, or is none
        return last.assign(n_trials=last.index + 1).to_dict("records")

    @property
    def curves(self) -> tuple[list[int], dict[str, dict[str, ArrayLike]]]:
        """(steps, {score: {label: (evaluations, R)}}) of the two best and the two worst complete trials by CE."""
        ordered = self.complete.sort_values("val_ce")["trial"].tolist()
        chosen = {number: self.finished[number].user_attrs for number in ordered[:2] + ordered[-2:]}
        curves = {
            name: {f"trial {number}": kept["curves"][name] for number, kept in chosen.items()}
            for name in ("val_ce", "val_accuracy")
        }
        return chosen[ordered[0]]["steps"], curves

    @property
    def running_best(self) -> np.ndarray:
        """(trials,) the best score of the complete trials so far, NaN before the first."""
        score = self.trials[self.score].where(self.trials["state"] == "complete")
        return (score.cummax() if self.score == "val_accuracy" else score.cummin()).ffill().to_numpy()

    @cached_property
    def importance(self) -> pd.DataFrame:
        """evidence.importance over the finished trials, ranked by their standing; empty for fewer than ten."""
        if len(self.ended) < 10:
            return pd.DataFrame(columns=["name", "importance", "low", "high", "beats_placebo"])
        return evidence.importance([self.finished[number] for number in self.ended["trial"]], self.ended["standing"])


@dataclass(frozen=True)
class Confirmed:
    """What was trained again on fresh seeds.

    runs, about: confirm.records. n_test: samples of a test score. tuned: search.records.
    decisions: {claim: its verdict}, {} for another task than the original's. next_space: where to search next.
    """

    runs: pd.DataFrame
    about: dict[str, Any]
    n_test: int
    tuned: pd.DataFrame
    comparisons: Comparisons
    decisions: dict[Claim, Decision]
    next_space: dict[str, Any]

    @property
    def best(self) -> dict[str, str]:
        """{"accuracy": role, "ce": role} of the best configurations, as confirm.ipynb chose and saved them."""
        return self.about["best"]

    @property
    def base(self) -> str:
        """The role whose settings were moved."""
        return self.comparisons.base

    @property
    def recommended(self) -> str:
        """The configuration that the verdicts recommend, as confirm.ipynb chose and saved it; else the base."""
        name = self.about.get("recommended", self.base)
        return name if (self.runs["name"] == name).any() else self.base

    @property
    def shown(self) -> list[str]:
        """The configurations that the report shows, best CE first: the candidates and what is recommended."""
        names = list(dict.fromkeys([self.recommended, *self.comparisons.roles]))
        return sorted(names, key=lambda name: float(self.scores(name, "test_ce").mean()))

    def gain(self, rival: str) -> Interval:
        """By how much the accuracy of the recommended configuration lies above that of a rival."""
        ours, theirs = (self.scores(name, "test_accuracy") for name in (self.recommended, rival))
        return evidence.compare(ours, theirs)[:3]

    @property
    def seconds_a_seed(self) -> float:
        """How long one seed of the recommended configuration trains, when a block of them is trained together."""
        return float(np.median(self.scores(self.recommended, "train_seconds"))) / self.comparisons.schedule.looks[0]

    def scores(self, name: str, column: str) -> np.ndarray:
        """(R,) a column of runs for a configuration: a score, or a hyperparameter, which is the same in all."""
        return self.comparisons.run(name)[column].to_numpy()

    def interval(self, name: str, score: str) -> Interval:
        """A test score of a configuration."""
        return evidence.mean_interval(self.scores(name, score), nats=score == "test_ce")

    def tuning_row(self, role: str) -> Row | None:
        """The trial that a role "trial 3" names, or None."""
        rows = self.tuned[("trial " + self.tuned["trial"].astype(str)) == role]
        return rows.to_dict("records")[0] if len(rows) else None

    @property
    def ablations(self) -> list[Ablation]:
        return self.comparisons.ablations

    def ablation(self, factor: str) -> Ablation | None:
        """The ablation of a factor."""
        return next((one for one in self.ablations if one.factor == factor), None)

    def beside_rule(self, rule: Rule) -> str:
        """beside of the accuracy that the report recommends and a rule; seeds and samples both leave room."""
        name = self.recommended if "recommended" in self.about else self.best["accuracy"]
        mean, *ends = self.interval(name, "test_accuracy")
        return beside(rule, *ends, *evidence.sample_interval(mean, self.n_test))

    @property
    def gaps(self) -> pd.DataFrame:
        """The tuning rows of the confirmed trials, with their test_accuracy and its _low and _high."""
        rows = []
        for role in self.comparisons.roles:
            if row := self.tuning_row(role):
                mean, low, high = self.interval(role, "test_accuracy")
                rows.append(row | {"test_accuracy": mean, "test_accuracy_low": low, "test_accuracy_high": high})
        return pd.DataFrame(rows)

    @property
    def winners_curse(self) -> Row | None:
        """By how much tuning scores lay above confirmed ones: interval, most, n_trials. None for fewer than two."""
        gaps = self.gaps
        if len(gaps) < 2:
            return None
        gap = evidence.compare(gaps["val_accuracy"], gaps["test_accuracy"], paired=True)
        most = (gaps["val_accuracy"] - gaps["test_accuracy"]).max()
        return {"interval": gap[:3], "most": most, "n_trials": len(gaps)}

    @property
    def missed(self) -> dict[str, float]:
        """By how much what is recommended misses the project's goal: {"accuracy": share, "ce": nats}.

        What is reached is left out.
        """
        accuracy, ce = (self.scores(self.recommended, name).mean() for name in ("test_accuracy", "test_ce"))
        gaps = {"accuracy": GOAL["accuracy"] - accuracy, "ce": ce - GOAL["ce"]}
        return {name: gap for name, gap in gaps.items() if gap > 0}

    @property
    def effects(self) -> pd.DataFrame:
        """One row for each tested question that is no claim: group, label, effect, low, high and verdict."""
        groups: dict[str, Mapping[Any, Finding]] = {ablation.factor: ablation.moved for ablation in self.ablations}
        groups |= {"parts": self.comparisons.parts, "tuning": self.comparisons.tuning}
        rows = [
            (group, finding.question.name, *finding.effect, finding.verdict)
            for group, findings in groups.items()
            for finding in findings.values()
        ]
        return pd.DataFrame(rows, columns=["group", "label", "effect", "low", "high", "verdict"])

    @property
    def undecided(self) -> list[Finding]:
        """The questions that are not decided, or not even tested."""
        return [finding for finding in self.comparisons.findings.values() if not finding.answer.decided]

    @property
    def open_claims(self) -> dict[Claim, Decision]:
        """The claims that are undecided or not tested, and are no question of the runs."""
        found = {claim: one for claim, one in self.decisions.items() if one.verdict in (UNDECIDED, NOT_TESTED)}
        questions = self.comparisons.findings
        return {claim: one for claim, one in found.items() if one.basis != "question" and claim.quote not in questions}

    @property
    def n_shared(self) -> int:
        """How many supported claims are the same question as another of them."""
        supported = [one for one in self.decisions.values() if one.verdict == SUPPORTED and one.basis == "question"]
        names = [one.values["finding"].question.name for one in supported]
        return sum(names.count(name) > 1 for name in names)

    @cached_property
    def short_parts(self) -> dict[str, Row]:
        """{part: what leaving it out does in another number of steps}, a look at the data that answers no question.

        Fields: n_steps, n_seeds, and (effect, low, high) of test_accuracy and test_ce against the whole network.
        """

        def settings(row: Row) -> list[Any]:
            return [row[name] for name in (*HYPERPARAMETERS, "n_steps")]

        rows, found = self.comparisons.configurations.rows, {}
        whole = [(name, row) for name, row in rows.items() if row["base"] == self.base and not row["without"]]
        for name, row in rows.items():
            beside = next((other for other, its in whole if settings(its) == settings(row)), None)
            if row["without"] and beside and name != f"{self.base}: without {row['without']}":
                scores = ("test_accuracy", "test_ce")
                effects = {score: self.comparisons.difference(name, beside, score) for score in scores}
                n_seeds = min(self.comparisons.n_seeds[one] for one in (name, beside))
                found[row["without"]] = {"n_steps": row["n_steps"], "n_seeds": n_seeds} | effects
        return found

    @cached_property
    def routed(self) -> pd.DataFrame:
        """The runs, a row for each seed, whose share routed to the true area is known.

        learnt: whether this share is at least LEARNT. group: "the base", "without a part" or "other settings".
        """
        runs = self.comparisons.runs
        runs = runs[runs["route_accuracy"].notna()]
        of_base = runs["name"].isin([self.base, self.comparisons.configurations.own])
        group = np.select([of_base, runs["without"] != ""], ["the base", "without a part"], "other settings")
        return runs.assign(learnt=runs["route_accuracy"] >= LEARNT, group=group).reset_index(drop=True)

    @property
    def learnt(self) -> dict[str, dict[float, tuple[int, int]]]:
        """{factor: {level: (seeds that have learnt to route, seeds)}} of each ablation."""
        count = self.routed.groupby("name")["learnt"].agg(["sum", "count"])
        found = {}
        for ablation in self.ablations:
            names = self.comparisons.configurations.levels(ablation.factor)
            found[ablation.factor] = {
                level: tuple(count.loc[name]) for level, name in names.items() if name in count.index
            }
        return found

    @property
    def trainings(self) -> pd.DataFrame:
        """One row for each training, however many questions it answers."""
        block = self.comparisons.runs["seed"] // self.comparisons.schedule.looks[0]
        return self.comparisons.runs.assign(block=block).drop_duplicates(["name", "block"])


def load(study_name: str, storage_url: str = "") -> Facts:
    """Read a study, and its confirmation if there is one.

    storage_url: the database; empty for the usual place.
    Raises InputError for a study that is not there or has no complete trial.
    """
    study = search.load_study(study_name, storage_url)
    trials = search.records(study)
    if not (trials["state"] == "complete").any():
        reasons = "; ".join(set(trials["failure"]) - {""})
        raise InputError(f"study {study_name!r} has no complete trial" + (f": {reasons}" if reasons else ""))
    question = study.user_attrs["fingerprint"]
    foreign = tuple(
        (trial.number, trial.state.name.lower(), trial.user_attrs.get("failure", "")) for trial in study.foreign()
    )
    facts = Facts(
        name=study_name,
        question=question,
        task=question["task"],
        samples=study.user_attrs.get("facts", {}),
        baselines=_baselines(study.user_attrs.get("baselines", {})),
        trials=trials,
        foreign=foreign,
        finished={trial.number: trial for trial in study.get_trials(deepcopy=False)},
        deleted=confirm.of_deleted(study),
        n_calls=study.user_attrs.get("n_workers", 1),
        out_of_time=study.user_attrs.get("out_of_time"),
        front=frontier.known(question["task"], but=study_name),
        has_database=(storage.study_folder(study_name) / "optuna_studies" / "ctbprn_study.db").exists(),
    )
    runs, about = confirm.records(study_name, storage_url)
    if runs is None or about is None or "front" in about:  # a front has a page of its own, of frontier.ipynb
        return facts
    return replace(facts, baselines=_baselines(about["baselines"]), confirmed=confirmed(facts, runs, about))


def confirmed(facts: Facts, runs: pd.DataFrame, about: dict[str, Any]) -> Confirmed:
    """What runs and about (of confirm.records) show, beside the tuning facts."""
    task = facts.task
    n_test = task.get("n_samples", {}).get("test", about["n_test"])
    has_claims = comparisons.has_claims(task)
    best = facts.by_accuracy if facts.score == "val_accuracy" else facts.by_ce
    best_trial = about.get("best_trial", f"trial {best['trial']}")
    plan = comparisons.read_plan(about["plan"]) if "plan" in about else None
    compared = Comparisons(runs, n_test, about.get("base", ""), plan, best_trial, has_claims)
    decisions = compared.claims(other_decisions(runs, about)) if has_claims else {}
    next_space = compared.next_space(facts.space)
    return Confirmed(comparisons.named(runs), about, n_test, facts.trials, compared, decisions, next_space)


def beside(rule: Rule, *ends: float) -> str:
    """Where a score, given by the ends of its intervals, lies beside a rule.

    Returns "above" or "below" if all ends do, else "".
    """
    if all(end > rule.accuracy for end in ends):
        return "above"
    return "below" if all(end < rule.accuracy for end in ends) else ""


def _baselines(baselines: Mapping[str, float]) -> dict[str, float]:
    """Baselines under today's names: studies of before called the majority class chance."""
    return {"majority class" if rule == "chance" else rule: level for rule, level in baselines.items()}


def other_decisions(runs: pd.DataFrame, about: dict[str, Any]) -> dict[str, Decision]:
    """{record: Decision} of the claims that other records decide: the tables of reports/reproduce, and memory."""
    found, folder = {}, storage.REPORTS / "reproduce"
    if runs["route_accuracy"].isna().all():
        found["routing"] = Decision(NOT_TESTED, "routing")
    if (folder / "trial_1_seeds.csv").exists():
        one, two = (scores_of_seeds(folder / f"trial_{n}_seeds.csv") for n in (1, 2))
        found |= from_reproduction(one, two, published.TABLE.loc[2, "val_accuracy"])
    if "memory_of_trial_2" in about:
        found |= memory_decisions(about["memory_of_trial_2"])
    return found


def scores_of_seeds(path: Path) -> pd.DataFrame:
    """The test_accuracy and test_ce of the seeds that have both, from a CSV file of audit.original.seed_scores.

    Raises InputError for a file with fewer than two such seeds.
    """
    scores = files.table(path, numbers={"test_accuracy": 1, "test_ce": 1000}).dropna()
    if len(scores) < 2:
        raise InputError(f"{path}: expected at least two seeds with test_accuracy and test_ce, got {len(scores)}")
    return scores


def memory_decisions(trial_2: Row) -> dict[str, Decision]:
    """{record: Decision} for the two claims about memory.  trial_2: what memory.of_published_trial counted."""
    larger = all(card["largest_batch"] > trial_2["batch_size"] for card in trial_2["cards"])
    return {
        "least_memory": Decision(REFUTED if trial_2["share_less"] else SUPPORTED, "least_memory", trial_2),
        "largest_batch": Decision(SUPPORTED if larger else REFUTED, "largest_batch", trial_2),
    }
