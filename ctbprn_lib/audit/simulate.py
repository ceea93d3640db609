"""Simulated records whose truth is known, to see how often the statistics are wrong."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd

from ctbprn_lib import InputError, files
from ctbprn_lib.report.comparisons import TRIAL_2
from ctbprn_lib.train import TABLE, Hyperparameters

ACCURACY = 0.97  # mean test accuracy of a configuration to which no effect is added
CE_PER_ERROR = 2.4  # nats of simulated cross-entropy for an error of 1
EQUAL_SAMPLES = ", equal samples"  # end of a factor's name


def spreads(path: Path) -> pd.Series:
    """The spread of each configuration of a confirmed study over its seeds.

    path: the study's confirmed.csv. The spread is the standard deviation of log(error), where the error is one less
    the test accuracy. An error of 0 counts as half an error in 8,192 samples.
    Raises InputError for a file that cannot be read, or in which no configuration has two seeds.
    """
    columns = ["role", "base", "factor", "level"]
    table = files.table(path, columns, {"test_accuracy": 1})
    log_errors = np.log((1 - table["test_accuracy"]).clip(lower=0.5 / 8192))
    spread = log_errors.groupby([table[name] for name in columns]).std().dropna()
    if spread.empty:
        raise InputError(f"{path}: expected at least two seeds of a configuration, each with its test_accuracy")
    return spread


def runs(
    n_seeds: int,
    rng: np.random.Generator,
    effects: Mapping[tuple[str, float], float] | None = None,
    spread: float = 0.25,
) -> pd.DataFrame:
    """Simulate the confirmed runs of an ordinary report, in which only the given effects act.

    effects: {(factor, level): what it adds to the accuracy, as a share}; None for no effect.
    spread: standard deviation of log(error) over seeds. Errors are lognormal, so they are skewed and stay above 0.
    Returns a table like that of confirm.records, with one row for each run and seed.
    """
    base = asdict(Hyperparameters(lr=0.0012, rank=16, temperature=1.3, batch_size=16)) | {"n_steps": 500}
    ladder: dict[str, tuple[float, ...]] = {
        name: TABLE[name].ladder for name in ("lr", "d", "rank", "temperature", "batch_size")
    }
    ladder |= {"seq_len": (32, 64, 128), f"batch_size{EQUAL_SAMPLES}": (8, 16, 32, 64), "n_steps": (250, 500, 1000)}
    roles = ("trial 7", "trial 3", "published trial 1", TRIAL_2, "defaults")
    rows: list[dict[str, object]] = []
    drawn: dict[tuple[object, ...], np.ndarray] = {}  # errors of each run that has been drawn

    def draw_errors(factor: str, level: float) -> np.ndarray:
        error = (1 - ACCURACY) * np.exp(spread * rng.normal(size=n_seeds) - spread**2 / 2)
        return error - (effects or {}).get((factor, level), 0)

    def add_run(role: str, base_role: str, factor: str, level: float) -> float:
        """Add the rows of one run; returns its mean cross-entropy in nats."""
        name = factor.removesuffix(EQUAL_SAMPLES)
        key: tuple[object, ...] = (base_role, factor, level)
        if not base_role:
            key = (role,)
        elif level == base[name]:
            key = (base_role, "its own level")  # one run belongs to all factors here
        if key not in drawn:
            drawn[key] = draw_errors(factor, level)
        changed = {name: level} if base_role else {}
        for seed, error in enumerate(drawn[key]):
            scores = dict(seed=seed, test_accuracy=1 - error, test_ce=CE_PER_ERROR * error, route_accuracy=1 - error)
            rows.append(dict(role=role, base=base_role, factor=factor, level=level) | base | changed | scores)
        return float((CE_PER_ERROR * drawn[key]).mean())

    ce = {role: add_run(role, "", "", math.nan) for role in roles}
    best = min(roles, key=lambda role: ce[role])
    for factor, levels in ladder.items():
        for level in sorted({*levels, base[factor.removesuffix(EQUAL_SAMPLES)]}):
            add_run("", best, factor, level)
    if best != TRIAL_2:
        for level in (32, 64, 128):
            add_run("", TRIAL_2, "seq_len", level)
    return pd.DataFrame(rows)
