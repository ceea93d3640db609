"""How fast training is: against the original's loop, against the limits of the machine, and as sizes grow.

python -m ctbprn_lib.audit.speed prints the tables. That needs torch, numpy and a checkout, because the baseline is
tests/reference.py. A replica-step is one training step of one replica: a batch, the noise of the gate, forward,
backward, clipping and AdamW.
"""

import argparse
import re
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ctbprn_lib import InputError
from ctbprn_lib.device import device_name, out_of_memory, precision_context, resolve_device, resolve_precision
from ctbprn_lib.tasks import RoutingTask
from ctbprn_lib.train import Budget, Hyperparameters, Training, fit

Shape = tuple[Hyperparameters, int, int]  # hyperparameters, areas, replicas
Row = dict[str, Any]

SHAPES: tuple[Shape, ...] = (  # small and large, few and many areas
    (Hyperparameters(d=32, rank=4, seq_len=32, batch_size=16), 2, 8),
    (Hyperparameters(d=32, rank=16, seq_len=128, batch_size=8), 2, 8),
    (Hyperparameters(d=64, rank=16, seq_len=128, batch_size=32), 2, 4),
    (Hyperparameters(d=64, rank=16, seq_len=128, batch_size=32), 6, 4),
)
SHAPE_COLUMNS = ("d", "rank", "n_areas", "seq_len", "batch_size", "n_replicas")
DESCRIPTION = (
    "Print how fast a training step is: beside the original's loop and the limits of this machine, by kind of "
    "operation (CPU), and as replicas, sequence length and width grow. Takes some minutes, and needs a checkout."
)
SECONDS = 0.4  # duration of one timed run
# What an H200 reaches at its best, by NVIDIA's data sheet: dense products, and reading and writing its memory.
H200_FLOP_PER_S: dict[str, float] = {"tf32": 494e12, "bf16": 989e12}
H200_BYTE_PER_S = 4.8e12
KINDS: dict[str, tuple[str, ...]] = {  # kinds of operations, by torch's names for them
    "Products": ("mm", "bmm", "baddbmm"),
    "GELU, sigmoid": ("gelu", "gelu_backward", "sigmoid", "sigmoid_backward"),
    "Random numbers": ("rand", "randn", "randint"),
}
REST = "Sums, copies, all else"
# {heading: how a row of against_the_original fills the column}
SIZES = {"d": "{d}", "rank": "{rank}", "K": "{n_areas}", "T": "{seq_len}", "B": "{batch_size}", "R": "{n_replicas}"}
COLUMNS = {
    "Our precision": "{precision}",
    **SIZES,
    "Original (ms)": "{baseline_ms:.2f}",
    "Ours (ms)": "{ours_ms:.3g}",
    "Times as fast [least, most]": "{ratio:.1f} [{ratio_low:.1f}, {ratio_high:.1f}]",
    "GFLOP, MB": "{gflop:.2f}, {mbyte:.1f}",
    "Of the machine's best": "{arithmetic_share:.0%}, {memory_share:.0%}",
}
TIME_COLUMNS = SIZES | {"Operations a step": "{operations:,}"} | {kind: f"{{{kind}:.0%}}" for kind in (*KINDS, REST)}
HEADER, TIME_HEADER = tuple(COLUMNS), tuple(TIME_COLUMNS)


def against_the_original(
    shapes: Iterable[Shape] = SHAPES, n_runs: int = 7, device: str = "auto", precision: str = "auto"
) -> list[Row]:
    """Time our training beside the original's loop, with both in turns.

    n_runs: pairs of timed runs for each shape. device, precision: as resolve_device and resolve_precision take them.
    Returns one row for each shape. Its keys are precision, SHAPE_COLUMNS, and
    - baseline_ms, ours_ms: milliseconds for a replica-step, medians over the pairs;
    - ratio, ratio_low, ratio_high: median, smallest and largest of baseline / ours over the pairs;
    - gflop, mbyte: the work of a replica-step, as count_work gives it;
    - arithmetic_share, memory_share: the time that this work takes at the limits of the machine, as a share of ours_ms.
    The baseline is one replica in the loop of tests/reference.py, in fp32: it makes a batch sample by sample, and
    evaluates after each step. Both networks have as many features as their width d; ours has a stem besides.
    Raises InputError if tests/reference.py is missing, or if the device or the precision cannot be used.
    """
    torch_device, rows = resolve_device(device), []
    resolved_precision = resolve_precision(precision, torch_device)
    limits = measure_limits(device, precision)
    for hp, n_areas, R in shapes:
        task = RoutingTask(n_areas, hp.d, hp.seq_len)
        seconds_of_original_step = _step_timer(_original_training(hp, n_areas, torch_device), None)
        seconds_of_our_step = _step_timer(_steps_of(_training(hp, task, R, torch_device, precision)), torch_device)
        pairs = [(seconds_of_original_step(), seconds_of_our_step() / R) for _ in range(n_runs)]
        baseline_ms, ours_ms = 1000 * np.array(pairs).T
        ratios, median_ms = baseline_ms / ours_ms, float(np.median(ours_ms))
        flop, n_bytes = count_work(hp, task, precision, device)
        rows.append(
            {
                "precision": resolved_precision,
                **_sizes_of(hp, n_areas, R),
                "baseline_ms": float(np.median(baseline_ms)),
                "ours_ms": median_ms,
                "ratio": float(np.median(ratios)),
                "ratio_low": float(ratios.min()),
                "ratio_high": float(ratios.max()),
                "gflop": flop / 1e9,
                "mbyte": n_bytes / 1e6,
                "arithmetic_share": 1000 * flop / limits["flop_per_s"] / median_ms,
                "memory_share": 1000 * n_bytes / limits["byte_per_s"] / median_ms,
            }
        )
    return rows


def scaling(
    name: str,
    values: Iterable[int],
    shape: Shape = SHAPES[2],
    n_runs: int = 3,
    device: str = "auto",
    precision: str = "auto",
) -> list[Row]:
    """Measure throughput while one size grows and the others stay as in shape.

    name: the size, which is n_replicas, seq_len or d. values: its values, in growing order.
    n_runs: timed runs for each value.
    Returns one row for each value, with the keys name, replica_steps_per_s (median over the runs) and peak_mem_mib.
    The rows end before the first value that does not fit into memory.
    """
    hp, n_areas, R = shape
    torch_device, rows = resolve_device(device), []
    for value in values:
        if name == "n_replicas":
            R = value
        else:
            hp = replace(hp, **{name: value})
        training = step_seconds = None  # frees the memory of the last training before the next one is made
        try:
            training = _training(hp, RoutingTask(n_areas, hp.d, hp.seq_len), R, torch_device, precision)
            step_seconds = _step_timer(_steps_of(training), torch_device)
            seconds = float(np.median([step_seconds() for _ in range(n_runs)]))
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            break
        rows.append({name: value, "replica_steps_per_s": R / seconds, "peak_mem_mib": training.peak_mem_mib()})
    return rows


def measure_limits(device: str = "auto", precision: str = "auto") -> dict[str, float]:
    """Measure this machine at its best.

    Returns flop_per_s, from one large matrix product in the precision, and byte_per_s, from one copy of memory that is
    too large for any cache (bytes read and bytes written).
    """
    torch_device = resolve_device(device)
    precision = resolve_precision(precision, torch_device)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    precision_context(precision, torch_device)  # sets how a GPU computes products of float32
    n, m = (8192, 2**28) if torch_device.type == "cuda" else (2048, 2**26)
    a = torch.randn(n, n, device=torch_device, dtype=dtype)
    b = torch.empty(n, n, device=torch_device, dtype=dtype)
    source, target = torch.zeros(m, device=torch_device), torch.zeros(m, device=torch_device)
    product = min(_seconds(lambda _: torch.mm(a, a, out=b), 1, torch_device) for _ in range(5))
    copy = min(_seconds(lambda _: target.copy_(source), 1, torch_device) for _ in range(5))
    return {"flop_per_s": 2 * n**3 / product, "byte_per_s": 8 * m / copy}


def count_work(
    hp: Hyperparameters, task: RoutingTask, precision: str = "auto", device: str = "auto"
) -> tuple[int, int]:
    """Count the work of one replica-step while it runs on the CPU.

    precision, device: those whose work is counted; a CPU has no tf32, so fp32 stands for it.
    Returns the floating-point operations of the matrix products, and the bytes that all operations read and write if
    nothing stays in a cache.
    """
    if precision == "auto":
        precision = resolve_precision(precision, resolve_device(device))
    precision = "fp32" if precision == "tf32" else precision
    training = _training(hp, task, 1, torch.device("cpu"), precision, n_steps=1)
    with FlopCounterMode(display=False) as flop_counter, _Counter() as counter:
        training.step()
    return flop_counter.get_total_flops(), counter.n_bytes


def where_time_goes(shape: Shape, precision: str = "auto", n_steps: int = 10) -> Row:
    """Time each operation of a training step on the CPU by itself.

    Returns a row with the keys SHAPE_COLUMNS, operations (their number in a step of all replicas), and for each kind
    in KINDS and for REST its share of the time inside the operations.
    """
    hp, n_areas, R = shape
    training = _training(hp, RoutingTask(n_areas, hp.d, hp.seq_len), R, torch.device("cpu"), precision)
    train = _steps_of(training)
    train(3)  # a warm-up
    with _Counter() as counter:
        train(n_steps)
    total = sum(counter.seconds.values())
    shares = {kind: seconds / total for kind, seconds in counter.seconds.items()}
    return {**_sizes_of(hp, n_areas, R), "operations": round(counter.n_operations / n_steps), **shares}


class _Counter(TorchDispatchMode):
    """Counts operations and the bytes of their arguments and results, and adds up their seconds by kind.

    Operations that move nothing are left out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.n_operations, self.n_bytes = 0, 0
        self.seconds: dict[str, float] = dict.fromkeys((*KINDS, REST), 0.0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        started = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        seconds = time.perf_counter() - started
        if _moves_nothing(func):
            return result
        self.n_operations += 1
        name = func.overloadpacket.__name__
        self.seconds[next((kind for kind, names in KINDS.items() if name in names), REST)] += seconds
        for tensor in tree_leaves((args, kwargs, result)):
            if isinstance(tensor, torch.Tensor):
                # a tensor that is broadcast has more elements than its memory holds, and only its memory is read
                self.n_bytes += min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
        return result


def _moves_nothing(func: Any) -> bool:
    """Whether an operation returns a view, or memory with nothing in it."""
    for returned in func._schema.returns:
        if returned.alias_info is not None and not returned.alias_info.is_write:
            return True
    return re.search("empty|_unsafe_view|profiler", str(func)) is not None


def _sizes_of(hp: Hyperparameters, n_areas: int, n_replicas: int) -> Row:
    """{name: size} in the order of SHAPE_COLUMNS."""
    return {name: getattr(hp, name, None) for name in SHAPE_COLUMNS} | {"n_areas": n_areas, "n_replicas": n_replicas}


def _training(
    hp: Hyperparameters, task: RoutingTask, R: int, device: torch.device, precision: str, n_steps: int = 10**6
) -> Training:
    """A training of R replicas before its first step."""
    precision = resolve_precision(precision, device)
    for _ in task.fixed("validation", 1, hp.seq_len, device):
        pass  # as in train.fit
    training = Training(hp, task, Budget(n_steps, R, n_validation=1, schedule="constant"), device, precision)
    training.start(hp, 0)
    return training


def _steps_of(training: Training) -> Callable[[int], None]:
    """A function that takes a number of steps and trains for so many."""

    def train(n_steps: int) -> None:
        for _ in range(n_steps):
            training.step()

    return train


def _step_timer(train: Callable[[int], object], device: torch.device | None) -> Callable[[], float]:
    """A function that trains for about SECONDS and returns the seconds of one step.

    train: takes a number of steps. device: as _seconds takes it.
    """
    _seconds(train, 3, device)  # a warm-up
    n_steps = max(2, round(3 * SECONDS / _seconds(train, 3, device)))
    return lambda: _seconds(train, n_steps, device) / n_steps


def _seconds(function: Callable[[int], object], n: int, device: torch.device | None = None) -> float:
    """The seconds of function(n), until a GPU has finished what the function started on it.

    device: the device that the function works on; None if that is unknown.
    """
    on_gpu = torch.cuda.is_available() and (device is None or device.type == "cuda")
    if on_gpu:
        torch.cuda.synchronize()
    started = time.perf_counter()
    function(n)
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _original_training(hp: Hyperparameters, n_areas: int, device: torch.device) -> Callable[[int], None]:
    """A function that takes a number of steps and runs the loop of tests/reference.py for so many."""
    path = Path(__file__).resolve().parents[2] / "tests" / "reference.py"
    if not path.exists():
        raise InputError(f"the baseline is {path.name} in a checkout's tests/, which is not here")
    loop = runpy.run_path(str(path))["train"]

    def train(n_steps: int) -> None:
        with device:  # where the tensors of the loop are made
            loop(hp.lr, hp.d, hp.rank, hp.temperature, hp.batch_size, hp.seq_len, n_steps, n_areas)

    return train


def trials_an_hour(n_workers: int, n_trials: int = 6, budget: Budget | None = None, space: Any = None) -> float:
    """Measure how many trials of one study some workers finish in an hour.

    n_workers: 1 is this process with torch's threads, more are processes with one thread each. n_trials: for each
    worker. budget: of each trial; None for a small one. space: of the study; None makes all trials alike.
    The clock runs from the beginning of the first trial to the end of the last, so starting a process costs nothing.
    """
    from ctbprn_lib import search

    task, hp = RoutingTask(), Hyperparameters()
    budget = budget or Budget(n_steps=30, n_replicas=3, n_evals=1, n_validation=64)
    space = space or {name: [getattr(hp, name)] for name in search.default_space(task)}
    total = n_trials * n_workers
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{folder}/study.db"
        study = search.open_study("speed", url, sampler="random", pruner="none", task=task, space=space, budget=budget)
        search.run_trials(study, total, device="cpu", task=task, space=space, budget=budget, n_workers=n_workers)
        begun = min(trial.datetime_start for trial in study.trials if trial.datetime_start)
        ended = max(trial.datetime_complete for trial in study.trials if trial.datetime_complete)
    return 3600 * total / (ended - begun).total_seconds()


def thread_gain(n_runs: int = 5) -> float:
    """Measure by how much torch's threads, all of them, make a training step of SHAPES[2] faster than one does.

    Returns the median ratio over n_runs pairs of timed runs, in turns; 1 where torch has one thread.
    """
    hp, n_areas, R = SHAPES[2]
    cpu, n_threads = torch.device("cpu"), torch.get_num_threads()
    step_seconds = _step_timer(_steps_of(_training(hp, RoutingTask(n_areas), R, cpu, "auto")), cpu)
    ratios = []
    try:
        for _ in range(n_runs):
            torch.set_num_threads(1)
            with_one = step_seconds()
            torch.set_num_threads(n_threads)
            ratios.append(with_one / step_seconds())
    finally:
        torch.set_num_threads(n_threads)
    return float(np.median(ratios)) if n_threads > 1 else 1.0


def derived_gains(gain: float, n_threads: int, workers: Iterable[int] = (4, 8, 16)) -> dict[int, float]:
    """{n: how many times the trials of one process with n threads n single-threaded workers make}, by Amdahl's law.

    gain: of n_threads threads beside one, as thread_gain measures it. The part of a step that threads do not share
    follows from it. Workers share nothing, as long as the memory is wide enough for all of them.
    Returns {} for one thread, from which nothing follows.
    """
    if n_threads < 2:
        return {}
    serial = (n_threads / gain - 1) / (n_threads - 1)
    return {n: n * (serial + (1 - serial) / n) for n in workers}


def search_seconds(n_trials: int = 20) -> float:
    """Measure the seconds that a trial costs beyond its training: the sampler, the database (SQLite) and the record.

    A trial here is scored five times.
    """
    from ctbprn_lib import search

    task, budget = RoutingTask(n_features=4, n_tokens=4), Budget(n_steps=5, n_replicas=3, n_validation=1)
    space = search.default_space(task) | {"d": [4], "rank": [1], "batch_size": [32], "seq_len": [4]}
    hp = Hyperparameters(d=4, rank=1, seq_len=4)

    def train(n: int) -> None:
        for seed in range(n):
            fit(hp, task, budget, seed, "cpu")

    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{folder}/study.db"
        study = search.open_study("cost", url, pruner="none", task=task, space=space, budget=budget)

        def run_trials(n: int) -> None:
            search.run_trials(study, n, device="cpu", task=task, space=space, budget=budget)

        with_search = _seconds(run_trials, n_trials)
    return (with_search - _seconds(train, n_trials)) / n_trials


def import_seconds() -> float:
    """Measure the seconds that importing model, tasks and train takes after torch, in a process of its own."""
    timed = "t = time.perf_counter(); from ctbprn_lib import model, tasks, train; print(time.perf_counter() - t)"
    return float(subprocess.check_output((sys.executable, "-c", f"import time, torch; {timed}")))


def protocol_seconds() -> float:
    """Measure the seconds of the whole original protocol with its ten trials."""
    from ctbprn_lib.audit import original

    return _seconds(lambda _: original.run_study(), 1)


def sizes(device: torch.device) -> dict[str, tuple[int, ...]]:
    """{size: values} with which main and the notebook call scaling on a device."""
    n_replicas = (1, 4, 16, 64, 128, 256) if device.type == "cuda" else (1, 2, 4, 8, 16)
    return {"n_replicas": n_replicas, "seq_len": (16, 32, 64, 128), "d": (16, 32, 64, 128)}


def cells(row: Row, columns: Mapping[str, str] = COLUMNS) -> list[str]:
    """A row of against_the_original as text, in the order of HEADER."""
    return [text.format_map(row).replace("%", " %") for text in columns.values()]


def time_cells(row: Row) -> list[str]:
    """A row of where_time_goes as text, in the order of TIME_HEADER."""
    return cells(row, TIME_COLUMNS)


def _print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    for row in (header, ["---"] * len(header), *rows):
        print("|", " | ".join(row), "|")
    print()


def main(
    device: str = "auto", shapes: Sequence[Shape] = SHAPES, grow: Mapping[str, Iterable[int]] | None = None
) -> None:
    """Print the tables: our step beside the original's, where its time goes (CPU), and throughput as sizes grow.

    device: "auto", "cpu" or "cuda". grow: {size: values} for scaling; None for those of sizes.
    """
    torch_device = resolve_device(device)
    print(f"torch {torch.__version__}; {device_name(torch_device)}\n")
    rows = []
    for precision in dict.fromkeys((resolve_precision("auto", torch_device), "fp32")):
        rows += against_the_original(shapes, device=device, precision=precision)
    _print_table(HEADER, map(cells, rows))
    if torch_device.type == "cpu":
        _print_table(TIME_HEADER, (time_cells(where_time_goes(shape)) for shape in shapes))
    grown_shape = shapes[min(2, len(shapes) - 1)]
    for size, values in (grow or sizes(torch_device)).items():
        for row in scaling(size, values, grown_shape, device=device):
            throughput, mib = row["replica_steps_per_s"], row["peak_mem_mib"]
            print(f"{size} {row[size]}: {throughput:,.0f} replica-steps a second, {mib:,.0f} MiB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m ctbprn_lib.audit.speed", description=DESCRIPTION)
    parser.add_argument(
        "device", nargs="?", default="auto", help='"auto" (a GPU if there is one), "cpu" or "cuda:<number>"'
    )
    try:
        main(parser.parse_args().device)
    except InputError as error:
        parser.error(str(error))
