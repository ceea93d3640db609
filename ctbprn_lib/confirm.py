"""Confirmation and ablation: chosen configurations trained again with fresh seeds, scored on the test set.

A run is a trial of the study "<name>/confirm" in the tuning study's database. It waits there for a worker, so a
confirmation that was stopped goes on where it was, and several machines can share one.
"""

import hashlib
import json
import math
import multiprocessing
import resource
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
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
from ctbprn_lib.model import CTBPRN, Classifier
from ctbprn_lib.scoring import cross_entropy, route_accuracy, score
from ctbprn_lib.search import Space
from ctbprn_lib.train import TABLE, Budget, Hyperparameters, Task, fit, gumbel_noise, untrained
from ctbprn_lib.workers import FINISHED

OnDone = Callable[[dict[str, Any], int, int], None]

# First spawn keys of the seeds: none has been used for tuning, and the best of the confirmed is measured afresh when it
# is ablated, or every comparison with it would start from its luck.
CONFIRMING, ABLATING = 1, 2
LARGEST_BATCH = 2**16  # samples: nobody trains with more


@dataclass(frozen=True)
class Run:
    """One configuration trained with fresh seeds, and why: its role ("trial 3", "defaults"), or what is ablated.

    base: the role of the configuration from which factor (a hyperparameter, "n_steps" or "batch_size, equal samples")
    has been moved to level.
    """

    role: str
    hyperparameters: Hyperparameters
    n_steps: int
    base: str = ""
    factor: str = ""
    level: float = math.nan


def candidates(trials: pd.DataFrame, task: Task, n_steps: int, n_top: int = 3) -> list[Run]:
    """The n_top trials by accuracy and by CE, the published trials 1 and 2, and the defaults, as Runs.

    trials: search.records; sequence lengths stop at the task's tokens.  Raises InputError if no trial is complete.
    """
    complete = trials[trials["state"] == "complete"]
    if complete.empty:
        raise InputError("the study has no complete trial whose hyperparameters could be confirmed")
    top = [complete.sort_values("val_accuracy", ascending=False), complete.sort_values("val_ce")]
    numbers = dict.fromkeys(n for ordered in top for n in ordered["trial"][:n_top])
    rows = complete.set_index("trial")
    chosen = {f"trial {number}": search.hyperparameters(rows.loc[number]) for number in numbers}
    chosen |= {f"published trial {n}": published.hyperparameters(n) for n in (1, 2)} | {"defaults": Hyperparameters()}
    fit_in = {role: replace(hp, seq_len=min(hp.seq_len, task.n_tokens)) for role, hp in chosen.items()}
    return [Run(role, hp, n_steps) for role, hp in fit_in.items()]


def ablations(best: Run, space: Space, task: Task) -> list[Run]:
    """Each hyperparameter of the Run best through its levels, all else equal; then batch sizes at equal samples, and
    shorter and longer training."""
    hp, runs = best.hyperparameters, []
    for name, entry in space.items():
        for level in levels(name, entry, getattr(hp, name), task):
            runs.append(Run("", replace(hp, **{name: level}), best.n_steps, best.role, name, level))
    for size in levels("batch_size", space["batch_size"], hp.batch_size, task):
        same = max(1, round(best.n_steps * hp.batch_size / size))
        runs.append(Run("", replace(hp, batch_size=size), same, best.role, "batch_size, equal samples", size))
    for n_steps in sorted({best.n_steps // 2 or 1, best.n_steps, 2 * best.n_steps, 4 * best.n_steps}):
        runs.append(Run("", hp, n_steps, best.role, "n_steps", n_steps))
    return runs


def sequence_lengths(base: Run, task: Task) -> list[Run]:
    """The Run base at each sequence length."""
    hp = base.hyperparameters
    lengths = levels("seq_len", [hp.seq_len], hp.seq_len, task)
    return [Run("", replace(hp, seq_len=T), base.n_steps, base.role, "seq_len", T) for T in lengths]


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


class Confirmation:
    """Trains Runs of one task with n_seeds fresh seeds each, and records them beside the tuning study.

    A run is a trial of the study "<name>/confirm". It waits there until a worker takes it, as tuning trials do, so any
    number of machines can do a confirmation together by the same command.
    Raises InputError if the study is of another task.
    """

    def __init__(
        self,
        study: workers.Study,
        task: Task,
        n_seeds: int = 8,
        n_test: int = 8192,
        seed: int = 0,
        device: str = "auto",
        n_workers: int = 1,
        minutes: float = 0,
    ) -> None:
        """n_workers, minutes: as search.run_trials has them; the minutes are those of all trainings together."""
        tuned = study.user_attrs["fingerprint"]
        if tuned["task"] != json.loads(json.dumps(task.description)):
            raise InputError(f"study {study.study_name!r} is of the task {tuned['task']}, got {task.description}")
        self.task, self.n_test, self.device = task, n_test, resolve_device(device)
        self.budget = Budget(**tuned["budget"] | dict(n_replicas=n_seeds, n_evals=1))
        self.precision = resolve_precision(self.budget.precision, self.device)
        self.seed, self.name, self.n_workers = seed, study.study_name, n_workers
        self.ends_at = time.time() + 60 * minutes if minutes else math.inf
        self.weights = storage.REPORTS.parent / "runs" / "weights"
        name = f"{study.study_name}/confirm"
        storage.beside(study, name)
        self.work = Confirming(
            name,
            storage.url_of(study),
            task,
            self.budget,
            n_test,
            seed,
            device,
            self.weights,
            search.seconds_a_product(study, task),
        )
        self.study = self.work.open()
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

    def train(self, runs: Iterable[Run], on_done: OnDone | None = None) -> dict[str, dict]:
        """Train what is not there yet; what failed is tried again.

        on_done(record, done, total) is called after each.  Returns {key: record}: of all runs, unless time ended it.
        """
        wanted = {self.key(run): run for run in runs}
        self._queue(wanted)
        done = wanted.keys() & _by_key(self.study).keys()

        def announce(study: workers.Study, trial: FrozenTrial, n_finished: int) -> None:
            if on_done and trial.user_attrs["key"] in wanted:
                done.add(trial.user_attrs["key"])
                on_done(_record(trial), len(done), len(wanted))

        minutes = max(0.001, (self.ends_at - time.time()) / 60) if math.isfinite(self.ends_at) else 0
        if len(done) < len(wanted):
            is_done = processes.run(
                self.work, self.study, self.n_workers, minutes, announce, self._mib(wanted.values())
            )
            self.study.set_user_attr("out_of_time", not is_done)
        records = _by_key(self.study, failed=True)
        return {key: records[key] for key in wanted if key in records}

    def _queue(self, wanted: dict[str, Run]) -> None:
        """Let the runs that are neither done nor under way wait for a worker, the longest first."""

        def cost(key: str) -> float:
            run = wanted[key]
            return search.products(run.hyperparameters, self.task, run.n_steps, self.budget.n_replicas)

        with storage.locked(storage.url_of(self.study)):
            trials = self.study.get_trials(deepcopy=False)
            taken = {t.user_attrs["key"] for t in trials if t.state != TrialState.FAIL or workers.is_retried(t, trials)}
            for key in sorted(wanted.keys() - taken, key=cost, reverse=True):
                attributes = {"key": key, "run": json.loads(json.dumps(asdict(wanted[key])))}
                self.study.add_trial(optuna.create_trial(state=TrialState.WAITING, user_attrs=attributes))

    def _mib(self, runs: Iterable[Run]) -> float:
        """The memory in MiB that the largest of the runs takes to train on a CPU, about."""
        spaces = [{name: [value] for name, value in asdict(run.hyperparameters).items()} for run in runs]
        return max(search.memory_mib(space, self.task, self.budget.n_replicas) for space in spaces)

    def key(self, run: Run) -> str:
        """What makes two runs the same, as a hash."""
        budget = asdict(replace(self.budget, n_steps=run.n_steps))
        same = [run.hyperparameters.identity(), budget, self.seed, self.n_test, self.task.description]
        same += [self.precision, self.device.type]
        same += ["ablation"] if run.base else []
        return hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()[:16]

    def write_plan(
        self,
        runs: Iterable[Run],
        n_top: int,
        baselines: dict[str, float],
        largest_batch: dict | None,
        best: dict[str, Run] | None = None,
    ) -> None:
        """Record which runs answer which question, so that the report needs nothing but the database.

        best: what save_best returned; the report then names the configurations whose weights are in its files.
        """
        plan = [asdict(run) | {"key": self.key(run)} for run in runs]
        self.study.set_user_attr("plan", json.loads(json.dumps(plan)))
        about: dict[str, Any] = dict(n_seeds=self.budget.n_replicas, n_test=self.n_test, n_top=n_top, seed=self.seed)
        if best:
            about["best"] = {"accuracy": best["best_accuracy"].role, "ce": best["best_ce"].role}
        self.study.set_user_attr("about", about | dict(baselines=baselines, largest_batch=largest_batch))

    def save_best(self, runs: list[Run], records: dict[str, dict]) -> dict[str, Run]:
        """Write best_accuracy and best_ce (.json and .safetensors) of the confirmed runs to the study's folder.

        The weights are those of the seed with the lowest validation CE.  Returns {file name: Run}.
        """
        folder, best = storage.study_folder(self.name), {}
        folder.mkdir(parents=True, exist_ok=True)
        usable = {run.role: run for run in runs if "mean_test_ce" in records.get(self.key(run), {})}
        if not usable:
            failures = [record["failure"] for record in records.values() if "failure" in record]
            raise InputError(
                "no configuration could be trained: " + (failures[0] if failures else "the time was too short")
            )
        scored = {role: records[self.key(run)] for role, run in usable.items()}
        names = ("test_accuracy", "test_ce")
        seeds = [
            pd.DataFrame({"role": role} | {name: _no_gaps(record, name) for name in names})
            for role, record in scored.items()
        ]
        for score_name, role in choose_best(pd.concat(seeds)).items():
            name, run, record = f"best_{score_name}", usable[role], scored[role]
            best[name] = run
            made = self.weights / f"{self.key(run)}.safetensors"
            if not made.exists():  # trained elsewhere; on one CPU the same seeds give the same weights
                self.work.train(run, self.key(run))
            content: dict[str, Any] = {"study": self.name, "role": run.role, "n_steps": run.n_steps}
            content |= {"hyperparameters": asdict(run.hyperparameters), "task": self.task.description}
            content["class_names"] = list(self.task.class_names)
            for kind in ("test_accuracy", "test_ce"):
                mean, low, high = evidence.mean_interval(_no_gaps(record, kind), nats=kind == "test_ce")
                content[kind] = dict(mean=mean, low=low, high=high, seeds=record[kind])
            network, seq_len = CTBPRN.load(made), run.hyperparameters.seq_len
            # scored as whoever loads it will use it, in fp32
            scores = score(network, self.task, "test", self.n_test, seq_len)
            scores |= route_accuracy(scores, score(network, self.task, "validation", self.budget.n_validation, seq_len))
            content["weights"] = {"file": f"{name}.safetensors", "seed": record["kept_seed"]}
            content["weights"] |= {"chosen_by": "lowest validation CE"} | {k: v.item() for k, v in scores.items()}
            content |= {k: record[k] for k in ("ctbprn", *search.ORIGIN)}
            Classifier.of(network, self.task, seq_len).save(folder / f"{name}.safetensors")
            with files.whole(folder / f"{name}.json") as new:
                new.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        return best


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
    weights: Path  # folder for the weights of the configurations that have a role
    seconds_a_product: float  # of the tuning study's trainings, for the time before a run is done here
    n_trials: int | None = None  # until none waits

    def open(self) -> workers.Study:
        """The study, opened by a worker process."""
        return workers.Study(self.study_name, storage.connect(self.url))

    def run(self, study: workers.Study, trial: optuna.Trial) -> float:
        """Train and score the run that a trial holds, and record it; returns the mean test CE."""
        run = _run_of(trial)
        try:
            record = self.train(run, trial.user_attrs["key"])
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
        rates = [search.seconds_of(trial) / self._products(trial) for trial in done]
        return self._products(trial) * (float(np.median(rates)) if rates else self.seconds_a_product)

    def _products(self, trial: FrozenTrial) -> float:
        run = _run_of(trial)
        return search.products(run.hyperparameters, self.task, run.n_steps, self.budget.n_replicas)

    def _checkpoint(self, key: str) -> Path:
        return self.weights.parent / "checkpoints" / f"confirm-{key}.safetensors"

    def train(self, run: Run, key: str) -> dict[str, Any]:
        """Train one Run and score it; writes the weights of the best seed by validation CE if it has a role."""
        budget = replace(self.budget, n_steps=run.n_steps)
        purpose = ABLATING if run.base else CONFIRMING
        seeds = np.random.SeedSequence(
            self.seed, spawn_key=(purpose,)
        )  # the same for all: pairs where shapes are equal
        started, hp = time.perf_counter(), run.hyperparameters
        result = fit(hp, self.task, budget, seeds, self.device, checkpoint=self._checkpoint(key))
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
        if run.role:
            self.weights.mkdir(parents=True, exist_ok=True)
            result.model.replica(record["kept_seed"]).save(self.weights / f"{key}.safetensors")
        return record


def _run_of(trial: optuna.Trial | FrozenTrial) -> Run:
    """The Run that a trial holds."""
    text = trial.user_attrs["run"]
    return Run(**text | {"hyperparameters": Hyperparameters(**text["hyperparameters"])})


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
    """What confirm.ipynb recorded of a study: (one row for each run's role and seed, about), or (None, None).

    Columns: role, base, factor, level, the hyperparameters, n_steps, seed, test_accuracy, test_ce, val_accuracy, val_ce
    (a diverged seed counts as chance), route_accuracy (NaN there), diverged_at, and the run's cost and provenance.
    about holds the roles of the best configurations ("best"), chosen here where an older record does not name them.
    """
    tuned = search.load_study(name, storage)
    study = confirm_study(tuned)
    if study is None or of_deleted(tuned) or "plan" not in study.user_attrs:
        return None, None
    kept, rows = _by_key(study), []
    for run in study.user_attrs["plan"]:
        if run["key"] not in kept:  # it gave no score, or time ended the confirmation before it
            continue
        record = kept[run["key"]]
        shared = {k: run[k] for k in ("role", "base", "factor", "level")}
        shared |= asdict(Hyperparameters(**run["hyperparameters"]))  # with those that were added since
        cost = ("train_seconds", "step_time_ms", "peak_mem_mib", "n_parameters", *search.ORIGIN)
        names = ["test_accuracy", "test_ce", "route_accuracy", "test_balanced_accuracy", *VALIDATION]
        record = search.by_layer(record)
        names += [name for name in record if name.startswith("route_accuracy_")]
        scores = {k: _no_gaps(record, k) for k in names if "balanced" not in k or k in record}
        for s in range(len(scores["test_ce"])):
            each = {k: v[s] for k, v in scores.items()} | {"diverged_at": record["diverged_at"][s]}
            rows.append(shared | {"n_steps": run["n_steps"], "seed": s} | each | {k: record[k] for k in cost})
    runs, about = pd.DataFrame(rows), study.user_attrs["about"]
    return runs, about if "best" in about else about | {"best": choose_best(runs)}


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


def largest_batch(hp: Hyperparameters, task: Task, device: str = "auto") -> dict[str, int | bool]:
    """The largest doubling of hp's batch, up to LARGEST_BATCH, with which one replica trains a step in the free memory.

    On a CPU each size is tried in a process of its own that may not use more than nine tenths of what is available.
    Returns {"batch_size", "free_mib", "tried_twice"}: tried_twice is whether twice as much was tried, and did not fit.
    """
    place, size = resolve_device(device), hp.batch_size  # which has been trained
    if place.type == "cuda":
        free = torch.cuda.mem_get_info(place)[0] / 2**20
    else:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 0.9 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 2**10
        allowed = resource.getrlimit(resource.RLIMIT_DATA)[0]  # what `ulimit -d` says
        free = free if allowed == resource.RLIM_INFINITY else min(free, allowed / 2**20)
    while size < LARGEST_BATCH and fits(replace(hp, batch_size=2 * size), task, str(place), free):
        size *= 2
    return {"batch_size": size, "free_mib": round(free), "tried_twice": size < LARGEST_BATCH}


def fits(hp: Hyperparameters, task: Task, device: str, free_mib: float) -> bool:
    """Whether one replica trains a step within free_mib, tried in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, torch.set_num_threads, (torch.get_num_threads(),)) as process:
        try:
            return process.submit(_one_step, hp, task, device, free_mib).result()
        except BrokenProcessPool:
            return False


def _one_step(hp: Hyperparameters, task: Task, device: str, free_mib: float) -> bool:
    """Train one replica for one step; returns whether the memory was enough."""
    if device == "cpu":
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(resource.RLIMIT_DATA, (int(free_mib * 2**20), hard))
    try:
        model, generator = untrained(hp, task, 1, 0, device)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        batch = task.draw(1, hp.batch_size, generator, hp.seq_len)
        noise = gumbel_noise((1, hp.n_layers, hp.batch_size, task.n_areas), generator)
        cross_entropy(model(batch.x, noise, batch.mask)[0], batch.y).mean().backward()
        optimizer.step()
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        return False
    return True
