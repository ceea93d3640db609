"""The space, the objective, the study and its records.

A study is a database: each trial holds its hyperparameters, every replica's score, its cost and where it came from.
The study itself holds a fingerprint of what its trials have in common, so that two different questions never mix.
"""

import functools
import json
import math
import os
import platform
import re
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
import optuna
import pandas as pd
import torch
from optuna.trial import FrozenTrial, TrialState

from ctbprn_lib import InputError, __version__, checkpoint, files, processes, storage, workers
from ctbprn_lib.device import device_name, out_of_memory
from ctbprn_lib.evidence import mean_interval
from ctbprn_lib.storage import connect, locked, sqlite_file, storage_url, study_folder
from ctbprn_lib.tasks import Task
from ctbprn_lib.train import KINDS, TABLE, Budget, Fit, Hyperparameters, fit, multiply_adds, training_cost
from ctbprn_lib.workers import FINISHED

Space = dict[str, Any]  # {hyperparameter or LENGTH: levels, or low, high and log}
LENGTH = "n_steps"  # may stand in a space; a trial is then trained for as many steps as it draws
# Each objective and the scores that it makes better.
OBJECTIVES = {
    "val_ce": ["val_ce"],
    "val_accuracy": ["val_accuracy"],
    "both": ["val_ce", "val_accuracy"],
    "ce_cost": ["val_ce", "cost"],  # the values of a trial are their logarithms to the base 10
}
DIRECTIONS: dict[str, Literal["minimize", "maximize"]] = {
    "val_ce": "minimize",
    "val_accuracy": "maximize",
    "cost": "minimize",
}
SAMPLERS: dict[str, Callable[..., optuna.samplers.BaseSampler]] = {
    "tpe": functools.partial(optuna.samplers.TPESampler, constant_liar=True),  # it knows what other workers try now
    "random": optuna.samplers.RandomSampler,
    "nsga2": optuna.samplers.NSGAIISampler,
}
PRUNERS: dict[str, Callable[[], optuna.pruners.BasePruner]] = {
    "median": lambda: optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=1),
    "hyperband": optuna.pruners.HyperbandPruner,
    "none": optuna.pruners.NopPruner,
    "equal_cost": optuna.pruners.NopPruner,  # Optuna has none that fits; see too_bad_for_its_cost
}
LIKE = 2  # trials whose costs differ by at most this factor are compared by the pruner equal_cost
FEWEST = 5  # of such trials; with fewer it prunes nothing
PLACEBO = "placebo"  # drawn for every trial and used for nothing: what importance looks like where there is none
TUNING = 0  # first spawn key of a trial's SeedSequence: seeds of one purpose never serve another
optuna.logging.set_verbosity(optuna.logging.WARNING)
ORIGIN = ("device", "precision", "torch", "optuna", "python", "commit")
MOST = 1_000_000_000  # of a hyperparameter; its reciprocal is the least, for float32's sake
SCORES = ("val_accuracy", "val_ce", "val_balanced_accuracy")
HYPERPARAMETERS = list(TABLE)


def default_space(task: Task) -> Space:
    """The published space; seq_len is a quarter, half and all of the task's tokens (32, 64, 128 there)."""
    return {
        "lr": {"low": 1e-4, "high": 1e-2, "log": True},
        "d": [32, 64, 96],
        "rank": [4, 8, 16],
        "temperature": {"low": 0.5, "high": 2.0},
        "batch_size": [8, 16, 32],
        "seq_len": sorted({max(1, task.n_tokens // 4), max(1, task.n_tokens // 2), task.n_tokens}),
    }


def cost_space(task: Task) -> Space:
    """What the objective ce_cost searches by default: wider than the published space, and with the length of training.

    The sequence is always whole: the label comes from all tokens, so a shorter one has a ceiling of its own.
    """
    return {
        "lr": {"low": 3e-4, "high": 2e-2, "log": True},
        "d": [16, 24, 32, 48, 64, 96, 128],
        "rank": [4, 8, 16, 32],
        "temperature": {"low": 0.5, "high": 2.0},
        "batch_size": [8, 16, 32, 64, 128],
        "seq_len": [task.n_tokens],
        "n_layers": [1, 2, 3],
        "weight_decay": [0.0, 0.01, 0.1],
        LENGTH: {"low": 100, "high": 20000, "log": True},
    }


def load_space(path: str | Path, task: Task, default: Space | None = None) -> Space:
    """A space from a YAML file over a default one: {name: [levels]}, {name: {low, high, log}} or {name: value}.

    default: the space whose entries hold where the file has none; default_space if not given.
    Raises InputError that names the file, the hyperparameter and what was expected.
    """
    given = files.mapping(path, "hyperparameters and their ranges, such as 'd: [32, 64]'")
    space = dict(default or default_space(task))
    for name, entry in given.items():

        def refuse(text: str, name: str = name) -> NoReturn:
            raise InputError(f"{path}: {str(name)[:80]}: {text}")

        if name not in (*HYPERPARAMETERS, LENGTH):
            refuse(f"not a hyperparameter; they are {', '.join(HYPERPARAMETERS)}, and {LENGTH}, the length of training")
        if isinstance(entry, dict):
            if not {"low", "high"} <= set(entry) <= {"low", "high", "log"}:
                refuse("a range has low, high and optionally log")
            if not isinstance(entry.get("log", False), bool):
                refuse(f"log must be true or false, got {entry['log']!r}")
            entry = {key: _number(value) for key, value in entry.items()}
            levels = [entry["low"], entry["high"]]
        else:
            levels = entry = [_number(level) for level in (entry if isinstance(entry, list) else [entry])]
            if not levels or any(levels.count(level) > 1 for level in levels):
                refuse("expected at least one level, each once")
        for level in levels:
            if isinstance(level, (int, float)) and not abs(level) <= MOST:
                refuse(f"out of reach; expected at most {MOST:,}")
            try:
                (Budget if name == LENGTH else Hyperparameters)(**{name: level})
            except InputError as error:
                raise InputError(f"{path}: {error}") from None
            if name == "seq_len" and level > task.n_tokens:
                refuse(f"{level} is out of reach: the task has {task.n_tokens} tokens")
            if 0 < level < 1 / MOST:
                refuse(f"out of reach; expected at least {1 / MOST:g}")
        if isinstance(entry, dict) and entry["low"] >= entry["high"]:
            refuse(f"low must be below high, got {entry['low']} and {entry['high']}")
        if isinstance(entry, dict) and entry.get("log") and not entry["low"]:
            refuse("a range with log must begin above 0")
        space[name] = entry
    return space


def _number(value):
    """A number that YAML 1.1 takes for text because it has no point (1e-4) as a number; anything else as it is."""
    return float(value) if isinstance(value, str) and re.fullmatch(r"[-+]?\d+[eE][-+]?\d+", value) else value


def suggest(trial: optuna.Trial | optuna.trial.FixedTrial, space: Space) -> Hyperparameters:
    """Hyperparameters for one trial."""
    values: dict[str, Any] = {}
    for name, entry in space.items():
        if name == LENGTH:
            continue
        if isinstance(entry, list):
            values[name] = trial.suggest_categorical(name, entry)
        else:
            whole = isinstance(entry["low"], int) and KINDS[name] is int
            suggest_one = trial.suggest_int if whole else trial.suggest_float
            values[name] = suggest_one(name, entry["low"], entry["high"], log=entry.get("log", False))
    return Hyperparameters(**values)


def suggest_length(
    trial: optuna.Trial, space: Space, hyperparameters: Hyperparameters, task: Task, most_cost: float = 0
) -> int:
    """The number of steps of one trial, from a space that has LENGTH.

    most_cost: multiply-adds that a training may cost, so that the longest one depends on the hyperparameters; 0 for no
    limit. A trial that can afford not even the shortest gets that one.
    """
    entry = space[LENGTH]
    if isinstance(entry, list):
        steps: int = trial.suggest_categorical(LENGTH, entry)  # type: ignore[assignment]
        return steps
    high = entry["high"]
    if most_cost:
        high = max(entry["low"], min(high, int(most_cost / training_cost(hyperparameters, task, 1))))
    return trial.suggest_int(LENGTH, entry["low"], high, log=entry.get("log", False))


def too_bad_for_its_cost(study: workers.Study, scoring: int, cost: float, val_ce: float) -> bool:
    """Whether a training's CE at one of its scorings is above the median of the trials that cost about as much.

    scoring: its number, from 1. cost: of the whole training. Trainings of unequal lengths cannot be compared step by
    step, because the rate of a short one has already fallen. So they are compared where their whole costs differ by a
    factor of LIKE at most, after the same share of their steps. With fewer than FEWEST such trials the answer is no.
    """
    others = []
    for trial in study.get_trials(deepcopy=False, states=FINISHED):
        curve = trial.user_attrs["curves"]["val_ce"]
        if len(curve) >= scoring and 1 / LIKE <= trial.user_attrs["whole_cost"] / cost <= LIKE:
            others.append(or_chance("val_ce", curve[scoring - 1], trial.user_attrs["n_classes"]).mean())
    return len(others) >= FEWEST and val_ce > float(np.median(others))


def edge(entry: list | dict, best: float) -> str:
    """ "lower" or "upper" if best lies in the outer twentieth of a range, or on the first or last of several levels."""
    if isinstance(entry, list):
        low, high = min(entry), max(entry)
        if len(entry) < 2 or best not in (low, high):
            return ""
        return "lower" if best == low else "upper"
    scale = math.log if entry.get("log") else float
    at = (scale(best) - scale(entry["low"])) / (scale(entry["high"]) - scale(entry["low"]))
    return "lower" if at < 0.05 else "upper" if at > 0.95 else ""


def study_name_for(task: Task) -> str:
    """A study name made from the task's: "uea:BasicMotions" gives uea-BasicMotions."""
    name = re.sub(r"\.npz$", "", task.description["task"], flags=re.IGNORECASE)
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._")[:64] or "study"


def open_study(
    name: str,
    storage: str = "",
    *,
    task: Task,
    space: Space,
    budget: Budget,
    objective: str = "val_ce",
    sampler: str = "tpe",
    pruner: str = "median",
    seed: int = 0,
    most_cost: float = 0,
) -> workers.Study:
    """Create the study, or load it to go on.

    most_cost: of one training with the objective ce_cost, in multiply-adds (see training_cost); 0 for no limit.
    Raises InputError where the study in the storage asked another question (task, space, budget or objective), and
    says what differs.
    """
    if objective == "both" and pruner != "none":
        raise InputError("objective both (a Pareto front) cannot be pruned; give pruner none with it")
    if objective == "ce_cost" and LENGTH not in space:
        raise InputError(
            f"objective ce_cost needs a space with {LENGTH}, such as '{LENGTH}: {{low: 100, high: 10000}}'"
        )
    if (objective == "ce_cost" or LENGTH in space) and pruner not in ("none", "equal_cost"):
        raise InputError(
            f"pruner {pruner} cannot compare trainings of unequal lengths; give pruner equal_cost or none with "
            f"{LENGTH} in the space"
        )
    if pruner == "equal_cost" and objective != "ce_cost":
        raise InputError("pruner equal_cost goes with the objective ce_cost alone; give pruner median or none")
    if most_cost and objective != "ce_cost":
        raise InputError("most_cost goes with the objective ce_cost alone; leave it at 0")
    url = storage_url(name, storage)
    return _open(name, url, task, space, budget, objective, sampler, pruner, seed, most_cost)


def _open(name, url, task, space, budget, objective, sampler, pruner, seed, most_cost=0.0):
    """The study in the database at url, made where it is not there."""
    fingerprint = dict(protocol="replicated", task=task.description, space=space, budget=asdict(budget))
    fingerprint |= {"most_cost": most_cost} if most_cost else {}  # studies of before have none
    fingerprint = json.loads(json.dumps(fingerprint | dict(objective=objective, seed=seed)))
    directions = [DIRECTIONS[score] for score in OBJECTIVES[objective]]
    database = connect(url)
    with locked(url):
        made = optuna.create_study(study_name=name, storage=database, directions=directions, load_if_exists=True)
        study = workers.Study(name, database, pruner=PRUNERS[pruner]())
        recorded, so_far = study.user_attrs.get("fingerprint"), len(study.get_trials(deepcopy=False))
        if recorded is None:
            _refuse_of_others(made, directions)
            _set_aside(name)
            study.set_user_attr("fingerprint", fingerprint)
            study.set_user_attr("id", uuid.uuid4().hex)  # a study deleted and made again is another one
        elif recorded != fingerprint:
            lines = "\n".join(f"  {line}" for line in differences(recorded or {}, fingerprint))
            raise InputError(
                f"study {name!r} exists and asks another question; give another study_name, or the values it was made "
                f"with:\n{lines}"
            )
        n_before = study.user_attrs.get("n_workers", 0)
        study.set_user_attr("n_workers", n_before + 1)
        study.set_user_attr("facts", json.loads(json.dumps(task.facts | {"given": task.given})))
    if "baselines" not in study.user_attrs:
        study.set_user_attr("baselines", task.baselines())
    # the same seed again would repeat the trials that are there, or those of a worker that has begun beside this one
    sampler_seed = int(np.random.SeedSequence([seed, so_far, n_before]).generate_state(1)[0])
    study.sampler = SAMPLERS[sampler](seed=sampler_seed)
    study.marks, study.outside = {"sampler": sampler, "pruner": pruner}, functools.partial(_outside, space)
    return study


def _set_aside(name):
    """Move what an earlier study of this name has left in its folder to the folder "earlier" in it.

    Its report, weights and tables would stand beside those of the new study.
    """
    folder = study_folder(name)
    left = [path for path in folder.glob("*") if path.name not in ("optuna_studies", "earlier")]
    if left:
        place = folder / "earlier" / time.strftime("%Y-%m-%d %H.%M.%S")
        place.mkdir(parents=True)
        for path in left:
            path.rename(place / path.name)


def _refuse_of_others(study, directions):
    """Refuse a study that another program made and used, or made for something else."""
    n_trials, theirs = len(study.get_trials(deepcopy=False)), [d.name.lower() for d in study.directions]
    if n_trials or theirs != directions:
        raise InputError(
            f"study {study.study_name!r} was made by another program ({n_trials} trials, it is to "
            f"{' and '.join(theirs)}), so its trials cannot be compared with those of this project; give another "
            "study_name"
        )


def _outside(space, values):
    """Why hyperparameters (a dict) that somebody enqueued are not of the space, or ""."""
    for name, value in values.items():
        entry = {"low": 0.0, "high": 1.0} if name == PLACEBO else space.get(name)
        if entry is None:
            return f"{name} is not searched"
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        inside = value in entry if isinstance(entry, list) else number and entry["low"] <= value <= entry["high"]
        try:
            if name != PLACEBO:
                (Budget if name == LENGTH else Hyperparameters)(**{name: value})
        except InputError:
            inside = False
        if not inside:
            return f"{name} = {value!r} lies outside the space"
    return ""


def load_study(name: str, storage: str = "") -> workers.Study:
    """The study to read from.  Raises InputError if it is not there, or not one that open_study made."""
    url = storage_url(name, storage)
    place = sqlite_file(url)
    if place and not place.is_file():
        raise InputError(f"there is no study {name!r} yet; notebooks/tune.ipynb makes one")
    try:
        study = workers.Study(name, connect(url, reading=True))
    except KeyError:
        raise InputError(f"the storage has no study {name!r}") from None
    if "fingerprint" not in study.user_attrs:
        raise InputError(f"study {name!r} does not say what it asks; notebooks/tune.ipynb makes one that does")
    return study


def run_trials(
    study: workers.Study,
    n_trials: int,
    *,
    task: Task,
    space: Space,
    budget: Budget,
    seed: int = 0,
    device: str = "auto",
    on_trial: processes.OnTrial | None = None,
    n_workers: int = 1,
    minutes: float = 0,
) -> None:
    """Run trials until the study has n_trials finished ones (complete or pruned), whoever ran them.

    on_trial(study, trial, n_finished) is called for each trial that ends, in order, whichever worker ran it.
    n_workers: 1 is this process alone, 0 one single-threaded process a core (as memory allows), or one a GPU.
    minutes: no trial is begun that is not expected to end within them; 0 is no limit.
    Ctrl-C and SIGTERM leave the trials that run to be tried again, by this process or another; on this machine they go
    on from their last checkpoints.
    Raises InputError once n_trials of this call's trials in a row (but at least three) have failed: there is nothing to
    report then.
    """
    recorded = study.user_attrs["fingerprint"]
    search = Search(
        study.study_name,
        storage.url_of(study),
        task,
        space,
        budget,
        recorded["objective"],
        seed,
        study.marks["sampler"],
        study.marks["pruner"],
        device,
        n_trials,
        recorded.get("most_cost", 0.0),
    )
    n_failed = 0

    def announce(study: workers.Study, trial: FrozenTrial, n_finished: int) -> None:
        nonlocal n_failed
        n_failed = 0 if trial.state in FINISHED else n_failed + 1
        if n_failed >= max(3, n_trials):
            reason = trial.user_attrs["failure"]
            raise InputError(f"the last {n_failed} trials gave no score; the last one: {reason}")
        if on_trial:
            on_trial(study, trial, n_finished)

    is_done = processes.run(search, study, n_workers, minutes, announce, memory_mib(space, task, budget.n_replicas))
    study.set_user_attr("out_of_time", None if is_done else {"minutes": minutes, "n_trials": n_trials})


def memory_mib(space: Space, task: Task, n_replicas: int) -> float:
    """About the memory in MiB that training the largest configuration of a space takes on a CPU.

    Forty numbers of float32 for each number of an activation (R,K,B,T,d) of a layer are more than any measured.
    """
    largest = asdict(Hyperparameters())
    for name, entry in space.items():
        if name == LENGTH:
            continue
        largest[name] = max(entry) if isinstance(entry, list) else entry["high"]
    tokens = min(largest["seq_len"], task.n_tokens)
    numbers = n_replicas * task.n_areas * largest["batch_size"] * tokens * largest["d"] * largest["n_layers"]
    return 40 * 4 * numbers / 2**20


@dataclass
class Search:
    """The work on a tuning study (see workers.Work): all that another process needs to run its trials."""

    study_name: str
    url: str
    task: Task
    space: Space
    budget: Budget
    objective: str
    seed: int
    sampler: str
    pruner: str
    device: str
    n_trials: int | None
    most_cost: float = 0.0

    def open(self) -> workers.Study:
        """The study, opened by a worker process."""
        return _open(
            self.study_name,
            self.url,
            self.task,
            self.space,
            self.budget,
            self.objective,
            self.sampler,
            self.pruner,
            self.seed,
            self.most_cost,
        )

    def run(self, study: workers.Study, trial: optuna.Trial) -> float | tuple[float, ...]:
        """Train one trial, and put its record into the database; returns its values."""
        try:
            hp, budget = suggest(trial, self.space), self.budget
            if LENGTH in self.space:
                budget = replace(budget, n_steps=suggest_length(trial, self.space, hp, self.task, self.most_cost))
            trial.suggest_float(PLACEBO, 0.0, 1.0)
        except ValueError as error:  # of Optuna: a parameter is of one kind in a whole study
            raise InputError(
                f"study {study.study_name!r} cannot hold this trial, because another program has put in one with "
                f"another kind of the same hyperparameter ({error}); give another study_name"
            ) from None
        seeds = np.random.SeedSequence(self.seed, spawn_key=(TUNING, workers.first_try(trial)))
        whole_cost = training_cost(hp, self.task, budget.n_steps)
        reporter = _Reporter(study, trial, self.objective, self.pruner, budget.n_steps, whole_cost)
        try:
            result = fit(hp, self.task, budget, seeds, self.device, reporter, checkpoint_of(study, trial))
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            raise workers.TrialFailed(f"out of memory at {hp}") from None
        values = scores(result) | {"cost": result.cost}
        wanted = [values[name] for name in OBJECTIVES[self.objective]]
        # A sampler judges a front by the area below it. Without logarithms only its dearest points would count.
        return tuple(math.log10(value) for value in wanted) if self.objective == "ce_cost" else tuple(wanted)

    def clear(self, study: workers.Study, trial: FrozenTrial) -> None:
        """Remove the checkpoint of a trial whose result is in the database."""
        checkpoint.remove(checkpoint_of(study, trial))

    def seconds(self, study: workers.Study, trial: FrozenTrial | None) -> float:
        """The mean time of the trials that are finished; 0 while there is none."""
        finished = [seconds_of(trial) for trial in study.get_trials(deepcopy=False, states=FINISHED)]
        return float(np.mean(finished)) if finished else 0.0


class _Reporter:
    """Tells the database how a training goes, and ends one that is hopeless; fit calls it after each scoring."""

    def __init__(
        self, study: workers.Study, trial: optuna.Trial, objective: str, pruner: str, n_steps: int, whole_cost: float
    ) -> None:
        self.study, self.trial, self.objective, self.pruner = study, trial, objective, pruner
        self.n_steps, self.whole_cost = n_steps, whole_cost
        self.n_reported, self.started = 0, time.perf_counter()

    def __call__(self, result: Fit) -> None:
        if all(result.diverged_at):
            first = min(step for step in result.diverged_at if step)
            raise workers.TrialFailed(f"all {len(result.diverged_at)} replicas diverged, the first at step {first}")
        is_last = result.steps[-1] == self.n_steps
        is_hopeless = False
        if len(OBJECTIVES[self.objective]) == 1:
            (name,) = OBJECTIVES[self.objective]
            for at in range(self.n_reported, len(result.steps)):  # several, after a checkpoint
                self.trial.report(scores(result, at)[name], at + 1)
            self.n_reported = len(result.steps)
            is_hopeless = not is_last and self.trial.should_prune()
        elif self.pruner == "equal_cost" and not is_last:
            at, val_ce = len(result.steps), scores(result)["val_ce"]
            is_hopeless = too_bad_for_its_cost(self.study, at, self.whole_cost, val_ce)
        if is_last or is_hopeless:  # not each time: it takes as long as all else that the database is told
            record = trial_record(result) | provenance()
            record["train_seconds"] = time.perf_counter() - self.started
            record["whole_cost"] = self.whole_cost
            for key, value in record.items():
                self.trial.set_user_attr(key, value)
        if is_hopeless:
            raise optuna.TrialPruned


def checkpoint_of(study: optuna.Study, trial: optuna.Trial | optuna.trial.FrozenTrial) -> Path:
    """The file in which a trial is kept while it runs, and from which its next try goes on."""
    name = f"{study_folder(study.study_name).name}-{workers.first_try(trial)}.safetensors"
    return storage.REPORTS.parent / "runs" / "checkpoints" / name


def relative_time(
    hyperparameters: Hyperparameters, task: Task, n_steps: int, n_replicas: int, n_scored: int = 0
) -> float:
    """How long a training takes beside others on the same machine, in units that time_scale turns into seconds.

    Time goes into reading and writing activations, about 12 numbers for each of a layer's (d), and into products: 128
    multiply-adds take about as long as one number. That fits steps of four shapes (d 16 to 64) on a CPU with AVX2 to
    within 10 %.
    n_scored: samples that each replica is scored on, each of which takes a third of what it takes in a step.
    """
    hp = hyperparameters
    activations = task.n_areas * min(hp.seq_len, task.n_tokens) * (task.n_features + 12 * hp.d * hp.n_layers)
    n_samples = (hp.batch_size * n_steps + n_scored / 3) * n_replicas
    return (activations + multiply_adds(hp, task) / 128) * n_samples


def seconds_of(trial: FrozenTrial) -> float:
    """How long the last try of a trial took."""
    return trial.duration.total_seconds() if trial.duration else 0.0


def time_scale(study: workers.Study, task: Task) -> float:
    """Seconds for each unit of relative_time, the median of a tuning study's complete trials; 0 if it has none."""
    budget, rates = study.user_attrs["fingerprint"]["budget"], []
    for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        known = {name: KINDS[name](value) for name, value in trial.params.items() if name in KINDS}
        n_steps = trial.params.get(LENGTH, budget["n_steps"])
        how_much = n_steps, budget["n_replicas"], budget["n_validation"]
        units = relative_time(Hyperparameters(**known), task, *how_much)
        rates.append(seconds_of(trial) / units)
    return float(np.median(rates)) if rates else 0.0


def scores(result: Fit, at: int = -1) -> dict[str, float]:
    """Mean held-out scores (SCORES) of a Fit at one of its scorings, the last if not said.

    A diverged replica counts as knowing nothing: ln C nats and 1/C.
    """
    C = result.model.config["n_classes"]
    return {k: float(or_chance(k, result.curves[k][at], C).mean()) for k in SCORES}


def or_chance(name: str, values: Sequence[float | None] | np.ndarray, n_classes: int) -> np.ndarray:
    """(R,) scores, with what knowing nothing gives where a replica diverged (NaN or None)."""
    values = np.array(values, dtype=float)
    return np.where(np.isfinite(values), values, math.log(n_classes) if name.endswith("_ce") else 1 / n_classes)


def trial_record(result: Fit) -> dict[str, Any]:
    """What the database keeps of a Fit: plain JSON values."""
    curves = {
        name: [[None if math.isnan(v) else round(float(v), 6) for v in row] for row in rows]
        for name, rows in result.curves.items()
    }
    return scores(result) | dict(
        steps=result.steps,
        curves=curves,
        diverged_at=result.diverged_at,
        n_diverged=sum(step is not None for step in result.diverged_at),
        step_time_ms=round(result.step_time_ms, 3),
        samples_seen=result.samples_seen,
        cost=result.cost,
        n_classes=result.model.config["n_classes"],
        peak_mem_mib=round(result.peak_mem_mib, 1),
        n_parameters=result.n_parameters,
        device=device_name(result.device),
        precision=result.precision,
    )


def records(study: workers.Study) -> pd.DataFrame:
    """One row a trial, in the order of their numbers.  Raises InputError if there is none.

    Columns: trial, state, each of SCORES with _low and _high (95 % t interval over replicas), the space's
    hyperparameters, the placebo, route_accuracy (mean over replicas), cost, sampler, pruner, provenance, and each
    replica's score as val_accuracy_0 and so on (that of chance where it diverged).
    """
    asked, rows = study.user_attrs["fingerprint"], []
    C, how = asked["task"].get("n_classes", 2), study.user_attrs.get("how", {})  # of studies before trials kept it
    for trial in study.trials:
        if trial.state == TrialState.WAITING:  # it has not begun
            continue
        kept = dict(trial.user_attrs)
        if trial.state == TrialState.FAIL:  # how far it had come is no score
            kept = {name: value for name, value in kept.items() if name not in (*SCORES, "curves")}
        row: dict[str, Any] = {"trial": trial.number, "state": trial.state.name.lower()}
        each: dict[str, float] = {}
        curves = by_layer(kept.get("curves", {}))
        for name in SCORES:
            last = or_chance(name, curves.get(name, [[]])[-1], C)
            each |= {f"{name}_{r}": value for r, value in enumerate(last)}
            row[name] = kept.get(name, math.nan)
            ends = mean_interval(last, nats=name == "val_ce")[1:] if last.size > 1 else (math.nan, math.nan)
            row[f"{name}_low"], row[f"{name}_high"] = ends
        row |= {name: trial.params.get(name, math.nan) for name in (*asked["space"], PLACEBO)}
        routed = np.array(curves.get("route_accuracy", [[math.nan]])[-1], dtype=float)
        row["route_accuracy"] = np.nanmean(routed) if np.isfinite(routed).any() else math.nan
        row["n_steps"] = kept.get("steps", [0])[-1]
        cost = ("n_diverged", "train_seconds", "step_time_ms", "peak_mem_mib", "n_parameters", "samples_seen", "cost")
        row |= {name: kept.get(name, math.nan) for name in cost}
        row |= {name: kept.get(name, how.get(name, "")) for name in ("sampler", "pruner")}
        row |= {name: kept.get(name, "") for name in (*ORIGIN, "failure")}
        rows.append(row | each)
    if not rows:
        raise InputError(f"study {study.study_name!r} has no trial yet; notebooks/tune.ipynb runs them")
    table = pd.DataFrame(rows)
    recorded = table.columns[
        table.notna().any() | ~table.columns.str.contains("balanced|^cost$")
    ]  # older studies have none
    return table[recorded]


def by_layer(scores: dict) -> dict:
    """A record's scores with route_accuracy_1 to _L: records of before gave that of the last layer alone, nameless."""
    if "route_accuracy" not in scores or "route_accuracy_1" in scores:
        return scores
    return {k: v for k, v in scores.items() if k != "route_accuracy"}


def hyperparameters(row: pd.Series) -> Hyperparameters:
    """The Hyperparameters of a row of records."""
    known = {name: row[name] for name in HYPERPARAMETERS if name in row and not math.isnan(row[name])}
    return Hyperparameters(**{name: KINDS[name](value) for name, value in known.items()})


def commit() -> str:
    """The commit of the code that runs, with -dirty if the library or notebooks differ from it.

    It is "unknown" unless the project's own folder is the top of a git checkout: a copy of the project may lie inside
    another repository, and a git hook's environment (GIT_DIR) names another one too.
    """
    project = Path(__file__).resolve().parent.parent
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*args: str) -> str:
        done = subprocess.run(("git", *args), cwd=project, env=environment, capture_output=True, check=True)
        return os.fsdecode(done.stdout)

    try:
        if Path(git("rev-parse", "--show-toplevel").removesuffix("\n")).resolve() != project:
            return "unknown"
        dirty = git("status", "--porcelain", "--", "ctbprn_lib", "notebooks")
        return git("rev-parse", "--short=10", "HEAD").strip() + ("-dirty" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@functools.cache
def provenance() -> dict[str, str]:
    """Versions and commit of what runs; they are those of the first call, when the code was loaded."""
    return dict(
        ctbprn=__version__,
        torch=torch.__version__,
        optuna=optuna.__version__,
        python=platform.python_version(),
        commit=commit(),
    )


def differences(there: Any, here: Any, where: str = "") -> Iterator[str]:
    """Leaves at which two nested dicts differ, each as a line."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in sorted(set(there) | set(here)):
            yield from differences(there.get(key, "nothing"), here.get(key, "nothing"), f"{where}.{key}".lstrip("."))
    elif there != here:
        yield f"{where}: there {there}, here {here}"
