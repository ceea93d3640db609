"""How fast training is: against the original's loop, against what the machine could do, and as shapes grow.

python -m ctbprn_lib.benchmark prints what needs torch and numpy alone, and a checkout (the baseline is
tests/reference.py). A replica-step is one step (batch, noise, forward, backward, clipping, AdamW) of one replica.
"""

import importlib.util
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ctbprn_lib import InputError
from ctbprn_lib.device import device_name, out_of_memory, precision_context, resolve_device, resolve_precision
from ctbprn_lib.tasks import RoutingTask
from ctbprn_lib.train import Budget, Hyperparameters, Training, fit

# (Hyperparameters, areas, replicas): small and large, few and many areas
SHAPES = (
    (Hyperparameters(d=32, rank=4, seq_len=32, batch_size=16), 2, 8),
    (Hyperparameters(d=32, rank=16, seq_len=128, batch_size=8), 2, 8),
    (Hyperparameters(d=64, rank=16, seq_len=128, batch_size=32), 2, 4),
    (Hyperparameters(d=64, rank=16, seq_len=128, batch_size=32), 6, 4),
)
SHAPE = ("d", "rank", "n_areas", "seq_len", "batch_size", "n_replicas")
SECONDS = 0.4  # that one run shall last
# What an H200 does at its best, by NVIDIA's data sheet: dense products, and reading and writing its memory
H200_FLOP_PER_S, H200_BYTE_PER_S = {"tf32": 494e12, "bf16": 989e12}, 4.8e12
KINDS = {  # of operations, by torch's names for them
    "Products": ("mm", "bmm", "baddbmm"),
    "GELU, sigmoid": ("gelu", "gelu_backward", "sigmoid", "sigmoid_backward"),
    "Random numbers": ("rand", "randn", "randint"),
}
REST = "Sums, copies, all else"


def against_the_original(shapes=SHAPES, n_runs=7, device="auto", precision="auto"):
    """Ours beside the original's loop in the same run, alternating: one dict a shape.

    Keys: precision and SHAPE; baseline_ms and ours_ms a replica-step (medians); ratio, ratio_low and ratio_high
    (median, least and largest of n_runs pairs); gflop and mbyte a replica-step (work) and, as
    shares of ours_ms, how long the machine would need for either at its best (limits).
    The baseline is one replica in tests/reference.py's loop: a batch sample by sample, and an evaluation after each
    step. Ours has a stem besides, and F = d for both.
    """
    device, reference = resolve_device(device), _reference()
    kind, can, rows = resolve_precision(precision, device), limits(device, precision), []
    for hp, n_areas, R in shapes:
        task = RoutingTask(n_areas, hp.d, hp.seq_len)
        one_run, pairs = _stepper(hp, task, R, device, precision), []

        def original(n, hp=hp, n_areas=n_areas):
            words = hp.lr, hp.d, hp.rank, hp.temperature, hp.batch_size, hp.seq_len
            with device:  # where its tensors are made
                reference.train(*words, n, n_areas)

        n = _enough(lambda n, f=original: _seconds(f, n))
        for _ in range(n_runs):
            pairs.append((1000 * _seconds(original, n) / n, 1000 * one_run() / R))
        ratios = [baseline / ours for baseline, ours in pairs]
        ours = statistics.median(o for _, o in pairs)
        flop, moved = work(hp, task, precision, device)
        rows.append({"precision": kind} | _sizes(hp, n_areas, R) | dict(
            baseline_ms=statistics.median(b for b, _ in pairs), ours_ms=ours,
            ratio=statistics.median(ratios), ratio_low=min(ratios), ratio_high=max(ratios),
            gflop=flop / 1e9, mbyte=moved / 1e6,
            arithmetic_share=1000 * flop / can["flop_per_s"] / ours,
            memory_share=1000 * moved / can["byte_per_s"] / ours,
        ))  # fmt: skip
    return rows


def _sizes(hp, n_areas, R):
    return {name: getattr(hp, name, None) for name in SHAPE} | {"n_areas": n_areas, "n_replicas": R}


def scaling(name, values, shape=SHAPES[2], n_runs=3, device="auto", precision="auto"):
    """Throughput as one size grows: a dict a value with it, replica_steps_per_s (median of n_runs) and peak_mem_mib.

    name: n_replicas, d or seq_len. Values that no longer fit the memory are left out.
    """
    (hp, n_areas, R), device, rows = shape, resolve_device(device), []
    for value in values:
        training = one_run = None  # its memory is free before the next is made
        R = value if name == "n_replicas" else R
        hp = hp if name == "n_replicas" else replace(hp, **{name: value})
        try:
            training = _training(hp, RoutingTask(n_areas, hp.d, hp.seq_len), R, device, precision)
            one_run = _timed(training, device)
            seconds = statistics.median(one_run() for _ in range(n_runs))
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            break
        rows.append({name: value, "replica_steps_per_s": R / seconds, "peak_mem_mib": training.peak_mem_mib()})
    return rows


def limits(device="auto", precision="auto"):
    """What this machine does at its best, measured: {"flop_per_s", "byte_per_s"}.

    One large matrix product in the precision, and one copy of memory that no cache holds (read and written).
    """
    device = resolve_device(device)
    precision = resolve_precision(precision, device)
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    precision_context(precision, device)
    n, m = (8192, 2**28) if device.type == "cuda" else (2048, 2**26)
    a, b = torch.randn(n, n, device=device, dtype=kind), torch.empty(n, n, device=device, dtype=kind)
    source, target = torch.zeros(m, device=device), torch.zeros(m, device=device)
    product = min(_seconds(lambda _: torch.mm(a, a, out=b), 1, device) for _ in range(5))
    copy = min(_seconds(lambda _: target.copy_(source), 1, device) for _ in range(5))
    return {"flop_per_s": 2 * n**3 / product, "byte_per_s": 8 * m / copy}


def work(hp, task, precision="auto", device="auto"):
    """(floating-point operations, bytes) of one replica-step, counted as it runs: products, and what all operations
    read and write if nothing stays in a cache."""
    if precision == "auto":
        precision = resolve_precision(precision, resolve_device(device))
    precision = "fp32" if precision == "tf32" else precision  # counted on the CPU, which has no tf32
    training = _training(hp, task, 1, torch.device("cpu"), precision, 1)
    with FlopCounterMode(display=False) as flops, _Bytes() as moved:
        training.step()
    return flops.get_total_flops(), moved.total


class _Bytes(TorchDispatchMode):
    """Counts the bytes of every operation's arguments and results."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not _moves_nothing(func):
            for tensor in torch.utils._pytree.tree_leaves((args, kwargs, result)):
                if isinstance(tensor, torch.Tensor):  # broadcast ones are read from the little they hold
                    self.total += min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
        return result


def _moves_nothing(func):
    """Whether an operation gives a view, or memory with nothing in it."""
    view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
    return view or re.search("empty|_unsafe_view|profiler", str(func)) is not None


def where_time_goes(shape, precision="auto", n_steps=10):
    """A dict with SHAPE's sizes, operations (how many a step has), and each kind's share, KINDS and REST, of the time
    inside the operations of a step on the CPU, each timed on its own."""
    hp, n_areas, R = shape
    training = _training(hp, RoutingTask(n_areas, hp.d, hp.seq_len), R, torch.device("cpu"), precision)
    for _ in range(3):
        training.step()
    with _Clock() as clock:
        for _ in range(n_steps):
            training.step()
    inside = sum(clock.seconds.values())
    shares = {kind: seconds / inside for kind, seconds in clock.seconds.items()}
    return _sizes(*shape) | {"operations": round(clock.n / n_steps)} | shares


class _Clock(TorchDispatchMode):
    """Counts operations and adds up their seconds by kind; a view is none."""

    def __init__(self):
        super().__init__()
        self.n, self.seconds = 0, dict.fromkeys((*KINDS, REST), 0.0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, started = func.overloadpacket.__name__, time.perf_counter()
        result = func(*args, **(kwargs or {}))
        took = time.perf_counter() - started
        if not _moves_nothing(func):
            self.n += 1
            self.seconds[next((kind for kind, names in KINDS.items() if name in names), REST)] += took
        return result


def _training(hp, task, R, device, precision, n_steps=10**6):
    precision = resolve_precision(precision, device)
    for _ in task.fixed("validation", 1, hp.seq_len, device):
        pass  # as in train.fit
    training = Training(hp, task, Budget(n_steps, R, n_validation=1, schedule="constant"), device, precision)
    training.start(hp, 0)
    return training


def _stepper(hp, task, R, device, precision):
    return _timed(_training(hp, task, R, device, precision), device)


def _timed(training, device):
    """A function that trains for about SECONDS and returns the seconds of one step."""

    def steps(n):
        for _ in range(n):
            training.step()

    n = _enough(lambda n: _seconds(steps, n, device))
    return lambda: _seconds(steps, n, device) / n


def _enough(seconds_of):
    """How many steps last about SECONDS; the first call is a warm-up."""
    seconds_of(3)
    return max(2, round(3 * SECONDS / seconds_of(3)))


def _seconds(function, n, device=None):
    """Seconds of function(n), to the end of what it started on the device."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() and (device is None or device.type == "cuda") else None
    if wait:
        wait()
    started = time.perf_counter()
    function(n)
    if wait:
        wait()
    return time.perf_counter() - started


def _reference():
    path = Path(__file__).resolve().parent.parent / "tests" / "reference.py"
    if not path.exists():
        raise InputError(f"the baseline is {path.name} in a checkout's tests/, which is not here")
    spec = importlib.util.spec_from_file_location("reference", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def trials_an_hour(n_workers, n_trials=6, budget=None):
    """Trials an hour of one study with this many single-threaded workers, each a process that has started before.

    All trials are the same: n_trials for each worker.
    """
    from ctbprn_lib.confirm import pool

    budget = budget or Budget(n_steps=30, n_replicas=3, n_evals=1, n_validation=64)
    with tempfile.TemporaryDirectory() as folder, pool(n_workers) as workers:
        url = f"sqlite:///{folder}/study.db"
        list(
            workers.map(
                _work, [f"sqlite:///{folder}/{i}.db" for i in range(n_workers)], [1] * n_workers, [budget] * n_workers
            )
        )
        started = time.perf_counter()
        list(workers.map(_work, [url] * n_workers, [n_trials * n_workers] * n_workers, [budget] * n_workers))
        return 3600 * n_trials * n_workers / (time.perf_counter() - started)


def _work(url, n_trials, budget):
    from ctbprn_lib import search, workers

    workers.POLL = 0.05  # or the last one's wait for the others would be most of what is timed
    task, hp = RoutingTask(), Hyperparameters()
    space = {name: [getattr(hp, name)] for name in search.default_space(task)}
    asked = dict(task=task, space=space, budget=budget)
    search.run_trials(search.open_study("speed", url, pruner="none", **asked), n_trials, device="cpu", **asked)


def search_seconds(n_trials=20):
    """Seconds a trial costs beyond its training: the sampler, the database, the record (SQLite; 5 scorings a trial)."""
    from ctbprn_lib import search

    task, budget = RoutingTask(n_features=4, n_tokens=4), Budget(n_steps=5, n_replicas=3, n_validation=1)
    space = search.default_space(task) | {"d": [4], "rank": [1], "batch_size": [32], "seq_len": [4]}
    asked = dict(task=task, space=space, budget=budget)
    with tempfile.TemporaryDirectory() as folder:
        study = search.open_study("cost", f"sqlite:///{folder}/study.db", pruner="none", **asked)
        whole = _seconds(lambda n: search.run_trials(study, n, device="cpu", **asked), n_trials)
    hp = Hyperparameters(d=4, rank=1, seq_len=4)
    training = _seconds(lambda n: [fit(hp, task, budget, seed, "cpu") for seed in range(n)], n_trials)
    return (whole - training) / n_trials


def import_seconds():
    """Seconds that model, tasks and train take to import once torch is there, in a process of its own."""
    timed = "t = time.perf_counter(); from ctbprn_lib import model, tasks, train; print(time.perf_counter() - t)"
    return float(subprocess.check_output((sys.executable, "-c", f"import time, torch; {timed}")))


def published_seconds():
    """Seconds of the whole published protocol, ten trials."""
    from ctbprn_lib import published

    return _seconds(lambda _: published.run_study(), 1)


def sizes(device):
    """{size: values} that scaling is asked for on a device."""
    many = (1, 4, 16, 64, 128, 256) if device.type == "cuda" else (1, 2, 4, 8, 16)
    return {"n_replicas": many, "seq_len": (16, 32, 64, 128), "d": (16, 32, 64, 128)}


HEADER = ("Our precision", "d", "rank", "K", "T", "B", "R", "Original (ms)", "Ours (ms)", "Times as fast [least, most]",
          "GFLOP, MB", "Of the machine's best")  # fmt: skip
TIME_HEADER = (*HEADER[1:7], "Operations a step", *KINDS, REST)


def cells(row):
    """A row of against_the_original as people read it, under HEADER."""
    times = "{baseline_ms:.2f}", "{ours_ms:.3g}", "{ratio:.1f} [{ratio_low:.1f}, {ratio_high:.1f}]"
    measured = (text.format(**row) for text in (*times, "{gflop:.2f}, {mbyte:.1f}"))
    share = f"{100 * row['arithmetic_share']:.0f} %, {100 * row['memory_share']:.0f} %"
    return [row["precision"], *(row[name] for name in SHAPE), *measured, share]


def time_cells(row):
    """A row of where_time_goes as people read it, under TIME_HEADER."""
    shares = (f"{100 * row[kind]:.0f} %" for kind in (*KINDS, REST))
    return [*(row[name] for name in SHAPE), f"{row['operations']:,}", *shares]


def _print(header, rows):
    for row in (header, ["---"] * len(header), *rows):
        print("|", " | ".join(map(str, row)), "|")
    print()


def main(device="auto", shapes=SHAPES, grow=None):
    """Print the tables: each replica-step in milliseconds, where its time goes, then throughput as sizes grow."""
    where = resolve_device(device)
    print(f"torch {torch.__version__}; {device_name(where)}\n")
    kinds = dict.fromkeys((resolve_precision("auto", where), "fp32"))
    compared = (against_the_original(shapes, device=device, precision=precision) for precision in kinds)
    _print(HEADER, (cells(row) for rows in compared for row in rows))
    if where.type == "cpu":
        _print(TIME_HEADER, (time_cells(where_time_goes(shape)) for shape in shapes))
    for size, values in (grow or sizes(where)).items():
        for row in scaling(size, values, shapes[min(2, len(shapes) - 1)], device=device):
            print("{} {}: {:,.0f} replica-steps a second, {:,.0f} MiB".format(size, *row.values()))


if __name__ == "__main__":
    main(*sys.argv[1:2])
