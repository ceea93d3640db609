"""Peak memory: a rule fitted to what was measured, and the largest batch that fits this machine."""

import itertools
import resource
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy import optimize

from ctbprn_lib import InputError, published
from ctbprn_lib.confirm import pool
from ctbprn_lib.device import out_of_memory, resolve_device
from ctbprn_lib.model import CTBPRN
from ctbprn_lib.scoring import cross_entropy
from ctbprn_lib.search import default_space, hyperparameters
from ctbprn_lib.tasks import RoutingTask
from ctbprn_lib.train import Hyperparameters, gumbel_noise, untrained
from ctbprn_lib.verdicts import LARGER_BATCH, LITTLE_MEMORY, REFUTED, SUPPORTED, UNDECIDED

MOST = 2**16  # samples: nobody trains with more
SIZES = ["A_mib", "W_mib", "I_mib"]


class MemoryRule(NamedTuple):
    """MiB = per_activation A + per_parameter W + per_input I + constant; error: |error| / MiB of a shape left out.

    A, W, I: MiB of one float for each activation of the layers, parameter, and input feature (see terms).
    """

    per_activation: float
    per_parameter: float
    per_input: float
    constant: float
    error: float

    def predict(self, sizes):
        """sizes (n,3) as terms gives them -> MiB (n,)."""
        return np.asarray(sizes) @ self[:3] + self.constant


def terms(hp, task, n_replicas, n_parameters):
    """The three sizes in MiB that peak memory is made of, at four bytes a number: (A, W, I) of MemoryRule."""
    tokens = n_replicas * hp.batch_size * task["n_areas"] * hp.seq_len
    floats = tokens * hp.d * hp.n_layers, n_replicas * n_parameters, tokens * task["n_features"]
    return [4 * n / 2**20 for n in floats]


def fit_rule(sizes, mib):
    """Least squares with no negative coefficient on relative errors: sizes (n,3), mib (n,) measured.  A MemoryRule.

    Raises InputError for fewer than six measurements.
    """
    mib = np.asarray(mib, dtype=float)
    if len(mib) < 6:
        raise InputError(f"a rule for memory needs at least six measurements, got {len(mib)}")
    X = np.column_stack([sizes, np.ones(len(mib))]) / mib[:, None]  # every measurement counts by its relative error
    shapes, errors = np.unique(np.round(sizes, 9), axis=0, return_inverse=True)[1].ravel(), []
    for shape in np.unique(shapes):  # runs of one shape leave together, or each would be predicted by its twins
        out = shapes == shape
        coefficients = optimize.nnls(X[~out], np.ones((~out).sum()))[0]
        errors.append(np.median(abs(X[out] @ coefficients - 1)))
    return MemoryRule(*map(float, optimize.nnls(X, np.ones(len(mib)))[0]), float(np.median(errors)))


def measured(trials, n_replicas, task):
    """One row a training whose memory was measured: its shape, measured_mib, and the three sizes of the rule.

    trials: rows with hyperparameters, peak_mem_mib and n_parameters; task: its description.
    """
    rows = []
    for _, row in trials[trials["peak_mem_mib"] > 0].iterrows():
        hp = hyperparameters(row)
        shape = dict(n_replicas=n_replicas, d=hp.d, rank=hp.rank, batch_size=hp.batch_size, seq_len=hp.seq_len)
        sizes = terms(hp, task, n_replicas, row["n_parameters"])
        rows.append(shape | {"measured_mib": row["peak_mem_mib"]} | dict(zip(SIZES, sizes, strict=True)))
    return pd.DataFrame(rows)


def predicted(rule, hp, task):
    """MiB that one replica of hp takes by the rule."""
    model = CTBPRN(task["n_features"], hp.d, hp.rank, task["n_areas"], hp.n_layers)
    return float(rule.predict(terms(hp, task, 1, sum(p.numel() for p in model.parameters()))))


def over_space(rule, space, task):
    """(n,) MiB that one replica of every shape of a space with levels takes by the rule."""
    levels = {name: space[name] for name in ("d", "rank", "batch_size", "seq_len")}
    shapes = (dict(zip(levels, shape, strict=True)) for shape in itertools.product(*levels.values()))
    return np.array([predicted(rule, Hyperparameters(**shape), task) for shape in shapes])


def claims(rule, task, largest, on_gpu):
    """{claim: (verdict, detail)} for the two claims about GPU memory, which nothing but a GPU decides.

    largest: what largest_batch found; on_gpu: whether that and the rule are of a GPU's memory.
    """
    mine = predicted(rule, published.hyperparameters(2), task)
    need = over_space(rule, default_space(RoutingTask()), task)
    less, size = float((need < mine).mean()), largest["batch_size"]
    little = (
        f"trial 2 needs {mine:.0f} MiB a replica by the fitted rule, and {100 * less:.0f} % of the {len(need)} shapes "
        f"of the search space need less (down to {need.min():.0f} MiB)"
    )
    larger = f"a batch of {size:,} trains in {largest['free_mib']:,} MiB"
    if not on_gpu:
        said = "no GPU here to decide it; in main memory"
        return {LITTLE_MEMORY: (UNDECIDED, f"{said} {little}"), LARGER_BATCH: (UNDECIDED, f"{said} {larger}")}
    return {LITTLE_MEMORY: (REFUTED if less > 0 else SUPPORTED, little + ": little, but not the least" * (less > 0)),
            LARGER_BATCH: (SUPPORTED if size > 32 else REFUTED, larger)}  # fmt: skip


def peak(trials, n_replicas):
    """What these complete trials took at their peak, and on a CPU what that figure is, for people to read."""
    least, most = trials["peak_mem_mib"].min(), trials["peak_mem_mib"].max()
    said = f"Peak memory of {n_replicas} replicas trained together ran from {least:.0f} to {most:.0f} MiB."
    if trials["device"].str.startswith("CPU").any():
        said += " On a CPU that is how far the process's peak grew, what its allocator keeps for later included."
    return said


def considerations(rule, table, role, largest):
    """The lines of a report on the fitted rule (None without one), the table it was fitted to, and the largest batch.

    table: measured's with predicted_mib; role: whose batch the largest (largest_batch's; None without one) is.
    """
    lines = []
    if rule:
        miss = abs(table["predicted_mib"] / table["measured_mib"] - 1)
        n_shapes = len(table.drop_duplicates(["n_replicas", "d", "rank", "batch_size", "seq_len"]))
        lines.append(
            f"It roughly follows {rule.per_activation:.1f} A + {rule.per_parameter:.1f} W + {rule.per_input:.1f} I + "
            f"{rule.constant:.0f} MiB, with A = 4 R B K T d L bytes, W = 4 R bytes a parameter, I = 4 R B K T "
            "F bytes (R replicas, B batch size, K areas, T sequence length, d width, L layers, F features). Over the "
            f"{len(table)} measured runs of {n_shapes} shapes it misses by {100 * miss.median():.0f} % (median) and "
            f"{100 * miss.max():.0f} % (worst), a shape that it was not fitted to by {100 * rule.error:.0f} % (median)."
        )
    if largest:
        lines.append(
            f"One replica of {role} trained with a batch of {largest['batch_size']:,} in the "
            f"{largest['free_mib']:,} MiB that were free"
            + (", and not with twice as much." if largest["tried_twice"] else "; more was not tried.")
        )
    return lines


def largest_batch(hp, task, device="auto"):
    """The largest doubling of hp's batch, up to MOST, with which one replica trains a step in the memory free now.

    On a CPU each size is tried in a process of its own that may not use more than nine tenths of what is available.
    Returns {"batch_size", "free_mib", "tried_twice"}: tried_twice is whether twice as much was tried, and did not fit.
    """
    device, size = resolve_device(device), hp.batch_size  # which has been trained
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] / 2**20
    else:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 0.9 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 2**10
        allowed = resource.getrlimit(resource.RLIMIT_DATA)[0]  # what `ulimit -d` says
        free = free if allowed == resource.RLIM_INFINITY else min(free, allowed / 2**20)
    while size < MOST and fits(replace(hp, batch_size=2 * size), task, str(device), free):
        size *= 2
    return {"batch_size": size, "free_mib": round(free), "tried_twice": size < MOST}


def fits(hp, task, device, free_mib):
    """Whether one replica trains a step within free_mib, tried in a process of its own."""
    with pool(1, torch.get_num_threads()) as process:
        try:
            return process.submit(_one_step, hp, task, device, free_mib).result()
        except BrokenProcessPool:
            return False


def _one_step(hp, task, device, free_mib):
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
