"""Confirmation and ablation: chosen configurations trained again with fresh seeds, scored on the test set.

A run is a trial of the study "<name>/confirm" in the tuning study's database. It waits there for a worker, so a
confirmation that was stopped goes on where it was, and several machines can share one.
"""

import hashlib
import itertools
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
import torch
from optuna.trial import FrozenTrial, TrialState

from ctbprn_lib import InputError, checkpoint, evidence, files, processes, published, search, storage, workers
from ctbprn_lib.device import out_of_memory, precision_context, resolve_device, resolve_precision
from ctbprn_lib.evidence import BETTER, SCHEDULE, Answer, Plan, Purchase, Schedule
from ctbprn_lib.model import CTBPRN, Classifier
from ctbprn_lib.scoring import route_accuracy, score
from ctbprn_lib.search import Space
from ctbprn_lib.tasks import Task
from ctbprn_lib.train import PARTS, TABLE, Budget, Hyperparameters, fit
from ctbprn_lib.workers import FINISHED

OnDone = Callable[[dict[str, Any], int, int], None]

# First spawn keys of the seeds: none has been used for tuning, and the best of the confirmed is measured afresh when it
# is ablated, or every comparison with it would start from its luck.
CONFIRMING, ABLATING = 1, 2
OUT_OF_TIME = (
    "the minutes were over before {} was trained; what is done is kept, and the same command with more minutes goes on "
    "from there"
)


def announce(record: dict[str, Any], done: int, total: int) -> None:
    """Print what a block of seeds scored, or why it could not be trained: an OnDone for a notebook."""
    accuracy, ce, seconds = (
        record.get(name, math.nan) for name in ("mean_test_accuracy", "mean_test_ce", "train_seconds")
    )
    scores = record.get("failure", f"{100 * accuracy:5.1f} %, {ce:.4f} nats, {seconds:.0f} s")
    print(f"{done:3d} of {total}: {scores}  {record['name']}", flush=True)


@dataclass(frozen=True)
class Run:
    """One configuration trained with fresh seeds, and why: its role ("trial 3", "defaults"), or what is ablated.

    base: the role of the configuration from which factor (a hyperparameter, "n_steps" or "batch_size, equal samples")
    has been moved to level. For the factor "without" a part of the network has been left out, which without names.
    name: of the configuration. Runs of the same configuration, trained with the same seeds, have the same name.
    """

    role: str
    hyperparameters: Hyperparameters
    n_steps: int
    base: str = ""
    factor: str = ""
    level: float = math.nan
    without: str = ""
    name: str = ""

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", self.role or f"{self.base}: {self.factor} {self.level:g}")


def check(study: optuna.Study) -> None:
    """Raise InputError for a study whose trials differ in their length of training, which frontier.ipynb confirms."""
    if search.LENGTH in study.user_attrs["fingerprint"]["space"]:
        raise InputError(
            f"the trials of study {study.study_name!r} differ in their length of training, so there is no one base to "
            "compare with; frontier.ipynb confirms such a study"
        )


def candidates(
    trials: pd.DataFrame,
    task: Task,
    n_steps: int,
    n_top: int = 3,
    with_published: bool = True,
    space: Space | None = None,
) -> list[Run]:
    """The n_top trials by accuracy and by CE, the defaults and, if wanted, the published trials 1 and 2, as Runs.

    trials: search.records. Sequence lengths stop at the task's tokens. space: what was searched. The defaults have the
    values that it holds fixed, because those were not tuned.
    Raises InputError if no trial is complete.
    """
    complete = trials[trials["state"] == "complete"]
    if complete.empty:
        raise InputError("the study has no complete trial whose hyperparameters could be confirmed")
    top = [complete.sort_values("val_accuracy", ascending=False), complete.sort_values("val_ce")]
    numbers = dict.fromkeys(n for ordered in top for n in ordered["trial"][:n_top])
    rows = complete.set_index("trial")
    chosen = {f"trial {number}": search.hyperparameters(rows.loc[number]) for number in numbers}
    if with_published:
        chosen |= {f"published trial {n}": published.hyperparameters(n) for n in (1, 2)}
    fixed = {
        k: entry[0] for k, entry in (space or {}).items() if k in TABLE and isinstance(entry, list) and len(entry) == 1
    }
    chosen["defaults"] = Hyperparameters(**fixed)
    fit_in = {role: replace(hp, seq_len=min(hp.seq_len, task.n_tokens)) for role, hp in chosen.items()}
    return [Run(role, hp, n_steps) for role, hp in fit_in.items()]


def ablations(base: Run, space: Space, task: Task, n_levels: int = 0) -> list[Run]:
    """Each hyperparameter of the Run base through its levels, all else equal; then batch sizes at equal samples,
    shorter and longer training, and the network without each of its parts.

    n_levels: of each hyperparameter that the space varies, those nearest to the base's own, and eight times its length
    of training; 0 for all, which are at least four, of those that it holds fixed too.
    """
    hp, runs = base.hyperparameters, []
    space = {name: entry for name, entry in space.items() if name in TABLE}  # the length of training is moved below
    if n_levels:
        space = {name: entry for name, entry in space.items() if not isinstance(entry, list) or len(entry) > 1}
    for name, entry in space.items():
        for level in nearest(levels(name, entry, getattr(hp, name), task), getattr(hp, name), n_levels):
            runs.append(_moved(base, replace(hp, **{name: level}), base.n_steps, name, level))
    sizes = levels("batch_size", space["batch_size"], hp.batch_size, task) if "batch_size" in space else []
    for size in nearest(sizes, hp.batch_size, n_levels):
        n_steps = max(1, round(base.n_steps * hp.batch_size / size))
        runs.append(_moved(base, replace(hp, batch_size=size), n_steps, "batch_size, equal samples", size))
    lengths = sorted({base.n_steps // 2 or 1, base.n_steps, 2 * base.n_steps, 4 * base.n_steps})
    for n_steps in (base.n_steps, 8 * base.n_steps) if n_levels else lengths:
        runs.append(_moved(base, hp, n_steps, "n_steps", n_steps))
    return runs


def parts(base: Run, n_steps: int) -> list[Run]:
    """The Run base without each part of the network, and as exploration the same after n_steps, if that is longer.

    There the whole network is trained as long, to compare with.
    """
    runs = [
        replace(
            _moved(base, base.hyperparameters, base.n_steps, "without"),
            without=part,
            name=f"{base.role}: without {part}",
        )
        for part in PARTS
    ]
    if n_steps > base.n_steps:
        for part in ("", *PARTS):
            name = f"{base.role}: without {part}, {n_steps} steps" if part else f"{base.role}: n_steps {n_steps}"
            runs.append(replace(_moved(base, base.hyperparameters, n_steps, "without"), without=part, name=name))
    return runs


def sequence_lengths(base: Run, task: Task) -> list[Run]:
    """The Run base at each sequence length."""
    hp = base.hyperparameters
    lengths = levels("seq_len", [hp.seq_len], hp.seq_len, task)
    return [_moved(base, replace(hp, seq_len=length), base.n_steps, "seq_len", length) for length in lengths]


def _moved(base: Run, hp: Hyperparameters, n_steps: int, factor: str, level: float = math.nan) -> Run:
    """A Run of the ablation of base. Its own level, whatever is moved, is one configuration: base again."""
    is_own = hp == base.hyperparameters and n_steps == base.n_steps
    return Run("", hp, n_steps, base.role, factor, level, name=f"{base.role} again" if is_own else "")


def nearest(levels: list[Any], own: float, n: int) -> list[Any]:
    """The n levels nearest to own by their rank, itself included, smaller before larger; all for n = 0."""
    if not levels:
        return []
    at = levels.index(own)
    by_distance = sorted(levels, key=lambda level: (abs(levels.index(level) - at), level))
    return sorted(by_distance[:n] if n else levels)


def levels(name: str, entry: list | dict, best: float, task: Task) -> list[Any]:
    """At least four values of a hyperparameter, in order: best, what the space names, and what its ladder adds.

    These are the ladder's levels inside the space, the next size above it, and one past an end where the best lies.
    """
    named = entry if isinstance(entry, list) else [entry["low"], entry["high"]]
    if name == "seq_len":
        parts = [max(1, task.n_tokens // n) for n in (8, 4, 2, 1)]
        return sorted({*parts, *(n for n in named if n <= task.n_tokens), best})
    ladder = TABLE[name].ladder
    low, high, sizes = min(named), max(named), isinstance(best, int)
    inside = [x for x in ladder if low <= x <= high]
    above, below = [x for x in ladder if x > high], [x for x in ladder if x < low]
    chosen = {*inside, *(named if isinstance(entry, list) else ()), best}
    if sizes or search.edge(entry, best) == "upper":
        chosen |= set(above[:1])
    if search.edge(entry, best) == "lower":
        chosen |= set(below[-1:])
    while len(chosen) < 4 and (above or below):
        chosen.add(above.pop(0) if above else below.pop())
    return sorted(chosen)


Scores = dict[str, dict[str, np.ndarray]]  # {score: {configuration: (seeds,)}}


def recommended(base: Run, runs: list[Run], plan: Plan, answers: Mapping[str, Answer]) -> Run:
    """What the verdicts recommend: the level that is decided to be better by most, or else the base as it is."""
    by_name = {run.name: run for run in runs}
    again = f"{base.role} again"
    effects = {again: 0.0}
    for question in plan.questions:
        contrast, answer = question.contrasts[0], answers[question.name]
        if contrast.b == again and answer.verdict == BETTER and not by_name[contrast.a].without:
            effects[contrast.a] = answer.looks[0].effect
    return by_name[max(effects, key=effects.__getitem__)]


def table(runs: Iterable[Run]) -> pd.DataFrame:
    """The Runs as a table, one row each: name, role, base, factor, level, without, n_steps and the hyperparameters."""
    fields = ("name", "role", "base", "factor", "level", "without", "n_steps")
    return pd.DataFrame([{k: getattr(run, k) for k in fields} | asdict(run.hyperparameters) for run in runs])


class Confirmation:
    """Trains Runs of one task with fresh seeds, and records them beside the tuning study.

    Seeds come in blocks of schedule.looks[0]. A block of a Run is a trial of the study "<name>/confirm". It waits there
    until a worker takes it, as tuning trials do, so any number of machines can do a confirmation together by the same
    command.
    Raises InputError if the study is of another task, or if the looks are not multiples of the first.
    """

    def __init__(
        self,
        study: workers.Study,
        task: Task,
        schedule: Schedule = SCHEDULE,
        n_test: int = 8192,
        seed: int = 0,
        device: str = "auto",
        n_workers: int = 1,
        minutes: float = 0,
        n_seed_runs: int = 0,
    ) -> None:
        """n_workers: as search.run_trials has it. minutes: of all trainings together; 0 for no limit.

        n_seed_runs: the trainings of one seed that may be bought in all, those of earlier calls included; 0 for as many
        as decide something.
        """
        tuned = study.user_attrs["fingerprint"]
        if tuned["task"] != json.loads(json.dumps(task.description)):
            raise InputError(f"study {study.study_name!r} is of the task {tuned['task']}, got {task.description}")
        self.schedule, self.block = schedule, schedule.looks[0]
        if any(look % self.block for look in schedule.looks):
            raise InputError(f"looks must be multiples of the first, as seeds come in blocks, got {schedule.looks}")
        self.task, self.n_test, self.device = task, n_test, resolve_device(device)
        self.budget = Budget(**tuned["budget"] | dict(n_replicas=self.block, n_evals=1))
        self.seed, self.name, self.n_workers, self.n_seed_runs = seed, study.study_name, n_workers, n_seed_runs
        self.ends_at = time.time() + 60 * minutes if minutes else math.inf
        self.weights = storage.REPORTS.parent / "runs" / "weights"
        name = f"{study.study_name}/confirm"
        storage.beside(study, name)
        rate = search.time_scale(study, task)
        self.work = Confirming(name, storage.url_of(study), task, self.budget, n_test, seed, device, self.weights, rate)
        self.study = workers.Study(name, study._storage)
        if self.study.directions != [optuna.study.StudyDirection.MINIMIZE]:
            raise InputError(
                f"the storage holds a study {name!r} that another program made for something else; delete it (optuna "
                f"delete-study --study-name {name} --storage <URL>), or tune under another study_name"
            )
        if of_deleted(study):
            raise InputError(
                f"the storage holds the confirmation of a study {study.study_name!r} that has been deleted; delete it "
                f"too (optuna delete-study --study-name {name} --storage <URL>), or tune under another study_name"
            )
        self.study.set_user_attr("of", study.user_attrs.get("id"))
        self.began_on = self._began_on()

    def _began_on(self) -> list[str]:
        """The precision and the device type of the machine that began this confirmation.

        They are part of the keys. A machine of another kind that joins does the same runs, and each record says on what
        it was trained.
        """
        with storage.locked(storage.url_of(self.study)):
            began_on = self.study.user_attrs.get("began_on")
            if began_on is None:
                began_on = [resolve_precision(self.budget.precision, self.device), self.device.type]
                for record in _by_key(self.study).values():  # of before it was recorded
                    began_on = [record["precision"], "cpu" if record["device"].startswith("CPU") else "cuda"]
                self.study.set_user_attr("began_on", began_on)
        return began_on

    def train(self, runs: Iterable[Run], on_done: OnDone | None = None, seeds: Mapping[str, int] | None = None) -> bool:
        """Train what is not there yet; what failed is tried again.

        seeds: {name of a Run: its number of seeds}; by default, one block each.
        on_done(record, done, total) is called after each block; the record's name says which.
        Returns False if time ended it before all were done.
        """
        wanted: dict[str, tuple[Run, int]] = {}
        for run in runs:
            for block in range(-(-(seeds or {}).get(run.name, self.block) // self.block)):
                wanted.setdefault(self.key(run, block), (run, block))
        self._queue(wanted)
        done = wanted.keys() & _by_key(self.study).keys()

        def announce(study: workers.Study, trial: FrozenTrial, n_finished: int) -> None:
            if on_done and trial.user_attrs["key"] in wanted:
                done.add(trial.user_attrs["key"])
                run, block = wanted[trial.user_attrs["key"]]
                first = block * self.block + 1
                name = f"{run.name}, seeds {first} to {first + self.block - 1}"
                on_done(_record(trial) | {"name": name}, len(done), len(wanted))

        if len(done) == len(wanted):
            return True
        minutes = max(0.001, (self.ends_at - time.time()) / 60) if math.isfinite(self.ends_at) else 0
        mib = max(self._mib(run) for run, _ in wanted.values())
        is_done = processes.run(self.work, self.study, self.n_workers, minutes, announce, mib)
        self.study.set_user_attr("out_of_time", not is_done)
        return is_done

    def train_all(self, runs: Iterable[Run], on_done: OnDone | None = None) -> None:
        """Train one block of each Run.  Raises InputError if time ends it before all are done."""
        if not self.train(runs, on_done):
            raise InputError(OUT_OF_TIME.format("every candidate"))

    def decide(
        self,
        plan: Plan,
        runs: Iterable[Run],
        on_done: OnDone | None = None,
        on_look: Callable[[dict[str, Answer], list[Purchase]], None] | None = None,
    ) -> dict[str, Answer]:
        """Buy blocks of seeds until all questions of the plan are answered, or no more can be, or may be bought.

        on_look(answers, purchases) is called before each purchase.  Returns {question: its answer}.
        """
        by_name = {run.name: run for run in runs}
        seconds = {name: self._seconds_a_seed(run) for name, run in by_name.items()}
        resolution = 1 / getattr(self.task, "n_samples", {"test": self.n_test})["test"]
        while True:
            scores = self.scores(by_name.values())
            seeds = {name: len(values) for name, values in scores["test_accuracy"].items()}
            looks = evidence.look_at(plan, scores, resolution)
            answers = evidence.answers(plan, looks)
            purchases, _ = evidence.next_blocks(plan, looks, seeds, seconds | self._untrainable(by_name.values()))
            chosen = self._affordable(purchases, seeds)
            if on_look:
                on_look(answers, chosen)
            target: dict[str, int] = {}
            for purchase in chosen:
                target |= {name: max(n, target.get(name, 0)) for name, n in purchase.seeds.items()}
            if not target or not self.train([by_name[name] for name in target], on_done, target):
                return answers

    def _affordable(self, purchases: list[Purchase], seeds: Mapping[str, int]) -> list[Purchase]:
        """What to buy at once: all, or the first purchases that keep the workers busy where seed-runs are limited."""
        if not self.n_seed_runs:
            return purchases
        n_workers = self.n_workers or processes.count(self.work.device, 0)
        left = self.n_seed_runs - sum(seeds.values())
        chosen, n_blocks = [], 0.0
        for purchase in purchases:
            price = sum(n - seeds.get(name, 0) for name, n in purchase.seeds.items())
            if price <= left:
                chosen.append(purchase)
                left, n_blocks = left - price, n_blocks + price / self.block
            if n_blocks >= n_workers:
                break
        return chosen

    def scores(self, runs: Iterable[Run]) -> Scores:
        """The scores of the Runs that are trained, in the order of their seeds.

        A seed that diverged has the scores of guessing.
        """
        found, names = _by_key(self.study), ("test_accuracy", "test_ce", "route_accuracy")
        scores: Scores = {name: {} for name in names}
        for run in runs:
            blocks: list[dict] = []
            while (key := self.key(run, len(blocks))) in found:
                blocks.append(found[key])
            for name in names:
                values = [_guessing(record, name, self.task.n_areas) for record in blocks]
                if values and np.isfinite(values).all():  # a task may know no true area
                    scores[name][run.name] = np.concatenate(values)
        return scores

    def _untrainable(self, runs: Iterable[Run]) -> dict[str, float]:
        """{configuration: infinite seconds} of those that did not fit into memory."""
        failed = {key for key, record in _by_key(self.study, failed=True).items() if "mean_test_ce" not in record}
        return {run.name: math.inf for run in runs if self.key(run) in failed}

    def _seconds_a_seed(self, run: Run) -> float:
        return search.relative_time(run.hyperparameters, self.task, run.n_steps, 1)  # one rate for all, whatever it is

    def _queue(self, wanted: dict[str, tuple[Run, int]]) -> None:
        """Let the blocks that are neither done nor under way wait for a worker, the longest first."""

        def cost(key: str) -> float:
            return self._seconds_a_seed(wanted[key][0])

        with storage.locked(storage.url_of(self.study)):
            trials = self.study.get_trials(deepcopy=False)
            taken = {t.user_attrs["key"] for t in trials if t.state != TrialState.FAIL or workers.is_retried(t, trials)}
            for key in sorted(wanted.keys() - taken, key=cost, reverse=True):
                run, block = wanted[key]
                attributes = {"key": key, "block": block, "first_key": self.key(run)}
                attributes["run"] = json.loads(json.dumps(asdict(run)))
                self.study.add_trial(optuna.create_trial(state=TrialState.WAITING, user_attrs=attributes))

    def _mib(self, run: Run) -> float:
        """The memory in MiB that a Run takes to train on a CPU, about."""
        space = {name: [value] for name, value in asdict(run.hyperparameters).items()}
        return search.memory_mib(space, self.task, self.block)

    def key(self, run: Run, block: int = 0) -> str:
        """What makes two trainings the same, as a hash."""
        budget = asdict(replace(self.budget, n_steps=run.n_steps))
        same = [run.hyperparameters.identity(), budget, self.seed, self.n_test, self.task.description]
        same += self.began_on
        same += ["ablation"] if run.base else []
        same += [run.without] if run.without else []
        same += [block] if block else []
        return hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()[:16]

    def base(self, runs: list[Run]) -> Run:
        """Of the Runs with a role, the one with the lowest mean test CE over the first block of seeds.

        It is measured with fresh seeds when it is ablated, or every comparison with it would start from its luck.
        Raises InputError if none could be trained.
        """
        found = _by_key(self.study, failed=True)
        records = {run.name: found.get(self.key(run), {"failure": "the time was too short"}) for run in runs}
        means = {run.name: records[run.name].get("mean_test_ce", math.inf) for run in runs if run.role}
        best = min(means, key=lambda name: means[name])
        if means[best] == math.inf:
            raise InputError(f"no configuration could be trained: {records[best]['failure']}")
        return next(run for run in runs if run.name == best)

    def best(self, runs: list[Run]) -> dict[str, str]:
        """{"accuracy": role, "ce": role} of the Runs with a role that have the best mean test scores.

        Raises InputError if none has been trained.
        """
        scores = self.scores(run for run in runs if run.role)
        if not scores["test_ce"]:
            raise InputError(OUT_OF_TIME.format("any candidate"))
        accuracy = {name: values.mean() for name, values in scores["test_accuracy"].items()}
        ce = {name: values.mean() for name, values in scores["test_ce"].items()}
        return {"accuracy": max(accuracy, key=accuracy.__getitem__), "ce": min(ce, key=ce.__getitem__)}

    def record_plan(self, plan: Plan, runs: Iterable[Run], **about: Any) -> None:
        """Record which runs answer which question, so that the report needs nothing but the database.

        plan: is recorded before any of its questions is looked at. about: what else the report shall know.
        Raises InputError, and changes nothing, if another plan has been recorded.
        """
        new = json.loads(json.dumps(asdict(plan)))
        recorded = self.study.user_attrs.get("about", {}).get("plan")
        if recorded not in (None, new):
            differences = "\n".join(f"  {line}" for line in search.differences(recorded, new))
            raise InputError(
                "the questions of this confirmation were recorded before it began, and these are others; give the "
                f"values that it was begun with, or another study_name:\n{differences}"
            )
        about |= dict(n_seeds=self.block, n_test=self.n_test, seed=self.seed, plan=new)
        self.study.set_user_attr("plan", json.loads(json.dumps([asdict(r) | {"key": self.key(r)} for r in runs])))
        self.study.set_user_attr("about", json.loads(json.dumps(about)))

    def save(self, name: str, run: Run) -> None:
        """Write the weights of a Run, and what is known of it, to <name>.safetensors and .json in the study's folder.

        The weights are those of the seed with the lowest validation CE in the first block.
        Raises InputError if the Run has not been trained.
        """
        if not self.scores([run])["test_ce"]:
            raise InputError(OUT_OF_TIME.format(run.name))
        key, folder = self.key(run), storage.study_folder(self.name)
        folder.mkdir(parents=True, exist_ok=True)
        record, weights = _by_key(self.study)[key], self.weights / f"{key}.safetensors"
        if not weights.exists():  # trained elsewhere; on one CPU the same seeds give the same weights
            self.work.train(run, 0, key)
        content: dict[str, Any] = {"study": self.name, "configuration": run.name, "role": run.role}
        content |= {"n_steps": run.n_steps, "hyperparameters": asdict(run.hyperparameters)}
        content |= {"task": self.task.description, "class_names": list(self.task.class_names)}
        for score_name in ("test_accuracy", "test_ce"):
            seeds = self.scores([run])[score_name][run.name]
            mean, low, high = evidence.mean_interval(seeds, nats=score_name == "test_ce")
            content[score_name] = dict(mean=mean, low=low, high=high, seeds=seeds.tolist())
        network, seq_len = CTBPRN.load(weights), run.hyperparameters.seq_len
        # scored as whoever loads it will use it, in fp32
        scores = score(network, self.task, "test", self.n_test, seq_len)
        scores |= route_accuracy(scores, score(network, self.task, "validation", self.budget.n_validation, seq_len))
        content["weights"] = {"file": f"{name}.safetensors", "seed": record["kept_seed"]}
        content["weights"] |= {"chosen_by": "lowest validation CE"} | {k: v.item() for k, v in scores.items()}
        content |= {k: record[k] for k in ("ctbprn", *search.ORIGIN)}
        Classifier.of(network, self.task, seq_len).save(folder / f"{name}.safetensors")
        with files.whole(folder / f"{name}.json") as new:
            new.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


@dataclass
class Confirming:
    """The work on a study "<name>/confirm" (see workers.Work): all that another process needs to train its runs."""

    study_name: str
    url: str
    task: Task
    budget: Budget
    n_test: int
    seed: int
    device: str
    weights: Path  # folder for the weights of the first block of each Run
    time_scale: float  # of the tuning study's trainings, for the time before a run is done here
    n_trials: int | None = None  # until none waits

    def open(self) -> workers.Study:
        """The study, opened by a worker process."""
        return workers.Study(self.study_name, storage.connect(self.url))

    def run(self, study: workers.Study, trial: optuna.Trial) -> float:
        """Train and score the run that a trial holds, and record it; returns the mean test CE."""
        run = _run_of(trial)
        try:
            record = self.train(run, trial.user_attrs.get("block", 0), trial.user_attrs["key"])
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            trial.set_user_attr("record", {"n_classes": self.task.n_classes})
            raise workers.TrialFailed(f"out of memory at {run.hyperparameters}") from None
        trial.set_user_attr("record", json.loads(json.dumps(record | search.provenance())))
        return record["mean_test_ce"]

    def clear(self, study: workers.Study, trial: FrozenTrial) -> None:
        """Remove the checkpoint of a run whose record is in the database."""
        checkpoint.remove(self._checkpoint(trial.user_attrs["key"]))

    def seconds(self, study: workers.Study, trial: FrozenTrial | None) -> float:
        """The expected time of a run, from those that are done here or, before there is one, from the tuning trials."""
        if trial is None:
            return 0.0
        done = [trial for trial in study.get_trials(deepcopy=False, states=FINISHED) if "run" in trial.user_attrs]
        rates = [search.seconds_of(trial) / self._relative_time(trial) for trial in done]
        return self._relative_time(trial) * (float(np.median(rates)) if rates else self.time_scale)

    def _relative_time(self, trial: FrozenTrial) -> float:
        run = _run_of(trial)
        n_scored = self.budget.n_validation + self.n_test
        return search.relative_time(run.hyperparameters, self.task, run.n_steps, self.budget.n_replicas, n_scored)

    def _checkpoint(self, key: str) -> Path:
        return self.weights.parent / "checkpoints" / f"confirm-{key}.safetensors"

    def train(self, run: Run, block: int, key: str) -> dict[str, Any]:
        """Train a block of seeds of a Run and score it; of the first block the weights of the best seed are written.

        The seeds of a block are the same for all Runs of a purpose: they make pairs where initial values agree.
        """
        budget = replace(self.budget, n_steps=run.n_steps)
        purpose = ABLATING if run.base else CONFIRMING
        seeds = np.random.SeedSequence(self.seed, spawn_key=(purpose, block) if block else (purpose,))
        started, hp = time.perf_counter(), run.hyperparameters
        result = fit(hp, self.task, budget, seeds, self.device, checkpoint=self._checkpoint(key), without=run.without)
        seconds = time.perf_counter() - started
        autocast = precision_context(result.precision, torch.device(result.device))
        test = score(result.model, self.task, "test", self.n_test, hp.seq_len, autocast)
        last = {name: values[-1] for name, values in result.curves.items()}
        test |= route_accuracy(test, last) | {name: last[name] for name in VALIDATION}
        is_alive = np.array([step is None for step in result.diverged_at])
        scores = {name: _with_gaps(values, is_alive) for name, values in test.items()}
        record = search.trial_record(result) | scores
        record |= {"n_classes": self.task.n_classes, "train_seconds": seconds}
        record = {name: value for name, value in record.items() if name not in ("curves", "steps")}
        for name in ("test_accuracy", "test_ce"):
            record[f"mean_{name}"] = float(np.mean(_no_gaps(record, name)))
        record["kept_seed"] = int(np.argmin(np.where(is_alive, test["val_ce"], np.inf)))
        if not block and not run.without and isinstance(result.model, CTBPRN):
            self.weights.mkdir(parents=True, exist_ok=True)
            result.model.replica(record["kept_seed"]).save(self.weights / f"{key}.safetensors")
        return record


def _run_of(trial: optuna.Trial | FrozenTrial) -> Run:
    """The Run that a trial holds."""
    text = trial.user_attrs["run"]
    return Run(**text | {"hyperparameters": _hyperparameters(text)})


def _guessing(record: dict[str, Any], name: str, n_areas: int) -> np.ndarray:
    """(R,) scores of a record, with the score of guessing where a seed diverged."""
    values = _no_gaps(record, name)
    is_lost = np.array([step is not None for step in record["diverged_at"]])
    return np.where(is_lost, 1 / n_areas, values) if name.startswith("route_accuracy") else values


def _with_gaps(values: np.ndarray, is_alive: np.ndarray) -> list[float | None]:
    """(R,) scores as JSON has them: None where a seed diverged, or where there is no score."""
    return [float(x) if ok else None for x, ok in zip(values, is_alive & np.isfinite(values), strict=True)]


def _by_key(study: optuna.Study, failed: bool = False) -> dict[str, dict]:
    """{key: record} of the runs in a study that are done and, if asked for, of those that gave no score."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.FAIL, TrialState.COMPLETE))
    trials = [trial for trial in trials if trial.state == TrialState.COMPLETE or failed]
    is_done = [trial.state == TrialState.COMPLETE for trial in trials]
    in_order = [trial for _, trial in sorted(zip(is_done, trials, strict=True), key=lambda pair: pair[0])]
    return {trial.user_attrs["key"]: _record(trial) for trial in in_order if "key" in trial.user_attrs}


def _record(trial: FrozenTrial) -> dict[str, Any]:
    """What is recorded of a run; runs of before there were workers have it among their attributes."""
    attributes = {name: value for name, value in trial.user_attrs.items() if name not in ("record", "run")}
    return attributes | trial.user_attrs.get("record", {})


def confirm_study(study: optuna.Study) -> optuna.Study | None:
    """The study "<name>/confirm" beside a study, whether or not it is of that one; None if there is none."""
    try:
        return optuna.load_study(study_name=f"{study.study_name}/confirm", storage=study._storage)
    except KeyError:
        return None


def of_deleted(study: optuna.Study) -> bool:
    """Whether the confirmation beside a study is of an earlier study of the same name, which has been deleted."""
    found = confirm_study(study)
    if found is None or found.user_attrs.get("of") == study.user_attrs.get("id"):
        return False
    return any("key" in trial.user_attrs for trial in found.get_trials(deepcopy=False))


def records(name: str, storage: str = "") -> tuple[pd.DataFrame, dict] | tuple[None, None]:
    """What confirm.ipynb recorded of a study: (one row for each run and seed, about), or (None, None).

    Columns: name, role, base, factor, level, without, the hyperparameters, n_steps, seed, test_accuracy, test_ce,
    val_accuracy, val_ce (a diverged seed counts as chance), route_accuracy (NaN there), diverged_at, and the cost and
    provenance of the block.
    about holds what Confirmation.record_plan was given, and:
    - best: the roles of the best configurations, by accuracy and by CE;
    - n_seed_runs: the number of trainings of one seed;
    - out_of_time: whether time ended the confirmation.
    """
    tuned = search.load_study(name, storage)
    study = confirm_study(tuned)
    if study is None or of_deleted(tuned) or "plan" not in study.user_attrs:
        return None, None
    found, rows, seed_runs = _blocks(study), [], {}
    for text in study.user_attrs["plan"]:
        blocks = found.get(text["key"], [])  # none where it gave no score, or where time ended the confirmation before
        run = Run(**{k: v for k, v in text.items() if k != "key"} | {"hyperparameters": _hyperparameters(text)})
        named = ("name", "without") if "name" in text else ()  # records of before have neither
        shared = {k: getattr(run, k) for k in ("role", "base", "factor", "level", *named)}
        shared |= asdict(run.hyperparameters)
        cost = ("train_seconds", "step_time_ms", "peak_mem_mib", "n_parameters", *search.ORIGIN)
        n_before = 0
        for record in map(search.by_layer, blocks):
            names = ["test_accuracy", "test_ce", "route_accuracy", "test_balanced_accuracy", *VALIDATION]
            names += [name for name in record if name.startswith("route_accuracy_")]
            scores = {k: _no_gaps(record, k) for k in names if "balanced" not in k or k in record}
            n_seeds = len(scores["test_ce"])
            for s in range(n_seeds):
                each = {k: v[s] for k, v in scores.items()} | {"diverged_at": record["diverged_at"][s]}
                each |= {"n_steps": run.n_steps, "seed": n_before + s}
                rows.append(shared | each | {k: record[k] for k in cost})
            n_before += n_seeds
        seed_runs[text["key"]] = n_before
    runs, about = pd.DataFrame(rows), dict(study.user_attrs["about"])
    about |= {"n_seed_runs": sum(seed_runs.values()), "out_of_time": study.user_attrs.get("out_of_time", False)}
    return runs, about if "best" in about else about | {"best": choose_best(runs)}


def _blocks(study: optuna.Study) -> dict[str, list[dict]]:
    """{key of the first block: records of all blocks of a Run, in their order, up to the first that is missing}."""
    by_first: dict[str, dict[int, dict]] = {}
    for key, record in _by_key(study).items():
        by_first.setdefault(record.get("first_key", key), {})[record.get("block", 0)] = record
    blocks = {}
    for key, numbered in by_first.items():
        whole = itertools.takewhile(numbered.__contains__, itertools.count())
        blocks[key] = [numbered[block] for block in whole]
    return blocks


def _hyperparameters(text: dict[str, Any]) -> Hyperparameters:
    return Hyperparameters(**text["hyperparameters"])  # with those that were added since


def choose_best(runs: pd.DataFrame) -> dict[str, str]:
    """The roles with the best mean test scores: {"accuracy": role, "ce": role}; on a tie the first in runs.

    runs: a row for each role and seed, with test_accuracy and test_ce; rows without a role are passed over.
    """
    by_role = runs[runs["role"] != ""].groupby("role", sort=False)[["test_accuracy", "test_ce"]]
    means = by_role.agg(lambda scores: np.mean(scores.to_numpy()))
    return {"accuracy": str(means["test_accuracy"].idxmax()), "ce": str(means["test_ce"].idxmin())}


VALIDATION = ("val_accuracy", "val_ce", "val_balanced_accuracy")


def _no_gaps(record, name):
    """Scores with chance where a seed diverged, or NaN where the router is scored."""
    values = np.array(record.get(name) or [None] * len(record["test_ce"]), dtype=float)
    routed = name.startswith("route_accuracy")
    return values if routed else search.or_chance(name, values, record["n_classes"])
