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

from ctbprn_lib import InputError
from ctbprn_lib.confirm import pool
from ctbprn_lib.device import out_of_memory, resolve_device
from ctbprn_lib.model import CTBPRN
from ctbprn_lib.scoring import cross_entropy
from ctbprn_lib.search import hyperparameters
from ctbprn_lib.train import Hyperparameters, gumbel_noise, untrained

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
