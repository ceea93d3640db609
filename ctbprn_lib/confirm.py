"""Confirmation and ablation: chosen configurations trained again with fresh seeds, scored on the test set.

A run is kept as a trial of the study "<name>/confirm" in the tuning study's database as soon as it is done, so a
confirmation that was stopped goes on where it was.
"""

import hashlib
import json
import math
import multiprocessing
import resource
import signal
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
import torch

from ctbprn_lib import InputError, evidence, files, published, search, storage
from ctbprn_lib.device import out_of_memory, precision_context, resolve_device, resolve_precision
from ctbprn_lib.model import CTBPRN, Classifier
from ctbprn_lib.scoring import cross_entropy, route_accuracy, score
from ctbprn_lib.search import Space
from ctbprn_lib.train import TABLE, Budget, Hyperparameters, Task, fit, gumbel_noise, untrained

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
    """Trains Runs of one task with n_seeds fresh seeds each, and keeps what came of them beside the tuning study.

    Raises InputError if the study is of another task.
    """

    def __init__(self, study, task, n_seeds=8, n_test=8192, seed=0, device="auto"):
        asked = study.user_attrs["fingerprint"]
        if asked["task"] != json.loads(json.dumps(task.description)):
            raise InputError(f"study {study.study_name!r} is of the task {asked['task']}, got {task.description}")
        self.task, self.n_test, self.device = task, n_test, resolve_device(device)
        self.budget = Budget(**asked["budget"] | dict(n_replicas=n_seeds, n_evals=1))
        self.precision = resolve_precision(self.budget.precision, self.device)
        self.seed, self.name = seed, study.study_name
        self.study = storage.beside(study, f"{study.study_name}/confirm")
        if self.study.directions != [optuna.study.StudyDirection.MINIMIZE]:
            raise InputError(
                f"the storage holds a study {self.study.study_name!r} that another program made for something else; "
                f"delete it (optuna delete-study --study-name {self.study.study_name} --storage <URL>), or tune under "
                "another study_name"
            )
        if of_deleted(study):
            raise InputError(
                f"the storage holds the confirmation of a study {study.study_name!r} that has been deleted; delete it "
                f"too (optuna delete-study --study-name {study.study_name}/confirm --storage <URL>), or tune under "
                "another study_name"
            )
        self.study.set_user_attr("of", study.user_attrs.get("id"))
        self.weights = storage.REPORTS.parent / "runs" / "weights"

    def train(self, runs: Iterable[Run], on_done: Callable[[dict, int, int], None] | None = None) -> dict[str, dict]:
        """Train what is not there yet; on a CPU one single-threaded process for each of torch's threads.

        on_done(record, done, total) is called after each.  Returns {key: record} of all runs.
        """
        wanted = {self.key(run): run for run in runs}
        kept, origin = {}, search.provenance()
        for trial in self.study.get_trials(deepcopy=False):
            if trial.user_attrs.get("key") in wanted and trial.state.name == "COMPLETE":  # failures are tried again
                kept[trial.user_attrs["key"]] = trial.user_attrs
        for key, record in self._trained({key: run for key, run in wanted.items() if key not in kept}):
            kept[key] = json.loads(json.dumps({"key": key} | record | origin))
            ce = record.get("mean_test_ce")
            state = optuna.trial.TrialState.FAIL if ce is None else optuna.trial.TrialState.COMPLETE
            self.study.add_trial(optuna.create_trial(state=state, value=ce, user_attrs=kept[key]))
            if on_done:
                on_done(record, len(kept), len(wanted))
        return kept

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
        """Keep which runs answer which question, so that the report needs nothing but the database.

        best: what save_best returned; the report then names the configurations whose weights are in its files.
        """
        plan = [asdict(run) | {"key": self.key(run)} for run in runs]
        self.study.set_user_attr("plan", json.loads(json.dumps(plan)))
        about = dict(n_seeds=self.budget.n_replicas, n_test=self.n_test, n_top=n_top, seed=self.seed)
        if best:
            about["best"] = {"accuracy": best["best_accuracy"].role, "ce": best["best_ce"].role}
        self.study.set_user_attr("about", about | dict(baselines=baselines, largest_batch=largest_batch))

    def save_best(self, runs: list[Run], records: dict[str, dict]) -> dict[str, Run]:
        """Write best_accuracy and best_ce (.json and .safetensors) of the confirmed runs to the study's folder.

        The weights are those of the seed with the lowest validation CE.  Returns {file name: Run}.
        """
        folder, best = storage.study_folder(self.name), {}
        folder.mkdir(parents=True, exist_ok=True)
        usable = {run.role: run for run in runs if "mean_test_ce" in records[self.key(run)]}
        if not usable:
            raise InputError(f"no configuration could be trained: {records[self.key(runs[0])]['failure']}")
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
            if not made.exists():  # trained by an earlier call; on one CPU the same seeds give the same weights
                _train(self.task, run, self.budget, self.n_test, self.seed, str(self.device), made)
            content = {"study": self.name, "role": run.role, "hyperparameters": asdict(run.hyperparameters),
                       "n_steps": run.n_steps, "task": self.task.description}  # fmt: skip
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

    def _trained(self, todo):
        """Yield (key, record) as they are done."""
        same, words = (self.budget, self.n_test, self.seed, str(self.device)), {}
        for key, run in todo.items():
            words[key] = (self.task, run, *same, self.weights / f"{key}.safetensors" if run.role else None)
        workers = 1 if self.device.type == "cuda" else min(torch.get_num_threads(), len(todo))
        if workers <= 1:
            for key, word in words.items():
                yield key, _train(*word)
            return
        longest_first = sorted(words, key=lambda key: -todo[key].n_steps * todo[key].hyperparameters.batch_size)
        with pool(workers) as processes:
            futures = {processes.submit(_train, *words[key]): key for key in longest_first}
            broken = None
            try:
                for future in as_completed(futures):
                    if future.cancelled():
                        continue
                    if error := future.exception():
                        broken = broken or error
                        for other in futures:  # what runs is still kept, and only what has not begun is not
                            other.cancel()
                    else:
                        yield futures[future], future.result()
            except (KeyboardInterrupt, GeneratorExit):
                for process in multiprocessing.active_children():  # or the end of what runs would be waited for
                    process.terminate()
                raise
        if isinstance(broken, BrokenProcessPool):
            raise InputError("a process that trained was ended from outside, as happens where memory is short; what "
                             "was done is kept, and the same command goes on from there")  # fmt: skip
        if broken:
            raise broken


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
    kept, rows = {}, []
    for trial in sorted(study.trials, key=lambda trial: trial.state.name == "COMPLETE"):
        if "key" in trial.user_attrs:
            kept[trial.user_attrs["key"]] = trial.user_attrs
    for run in study.user_attrs["plan"]:
        record = kept[run["key"]]
        if "mean_test_ce" not in record:
            continue
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


def _train(task, run, budget, n_test, seed, device, weights=None):
    """Train one Run and score it; writes the weights of the best seed by validation CE if a path is given."""
    budget = replace(budget, n_steps=run.n_steps)
    purpose = ABLATING if run.base else CONFIRMING
    seeds = np.random.SeedSequence(seed, spawn_key=(purpose,))  # the same for all: pairs where shapes are equal
    started = time.perf_counter()
    try:
        result = fit(run.hyperparameters, task, budget, seeds, device)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        return {"failure": f"out of memory at {run.hyperparameters}", "n_classes": task.n_classes}
    seconds = time.perf_counter() - started
    autocast = precision_context(result.precision, torch.device(result.device))
    test = score(result.model, task, "test", n_test, run.hyperparameters.seq_len, autocast)
    last = {name: values[-1] for name, values in result.curves.items()}
    test |= route_accuracy(test, last) | {name: last[name] for name in VALIDATION}
    alive = np.array([step is None for step in result.diverged_at])
    listed = {k: [float(x) if ok else None for x, ok in zip(v, alive & np.isfinite(v), strict=True)]
              for k, v in test.items()}  # fmt: skip
    record = listed | search.trial_record(result) | listed | {"n_classes": task.n_classes, "train_seconds": seconds}
    record = {k: v for k, v in record.items() if k not in ("curves", "steps")}
    for name in ("test_accuracy", "test_ce"):
        record[f"mean_{name}"] = float(np.mean(_no_gaps(record, name)))
    record["kept_seed"] = int(np.argmin(np.where(alive, test["val_ce"], np.inf)))
    if weights:
        weights.parent.mkdir(parents=True, exist_ok=True)
        result.model.replica(record["kept_seed"]).save(weights)
    return record


def pool(workers: int, threads: int = 1) -> ProcessPoolExecutor:
    """Processes that start afresh: a fork of a process with threads can hang."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_prepare, initargs=(threads,))


def _prepare(threads):
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits for this one


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
    with pool(1, torch.get_num_threads()) as process:
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
