"""Made-up records whose truth is known, to see how often the statistics are wrong."""

import math

import numpy as np
import pandas as pd

from ctbprn_lib import InputError, files
from ctbprn_lib.confirm import LADDER
from ctbprn_lib.verdicts import TRIAL_2

ACCURACY = 0.97  # where nothing acts


def spreads(path):
    """(configurations,) standard deviation over seeds of the error's logarithm, from a study's confirmed.csv.

    An error of none counts as half of one in 8,192 samples.  Raises InputError for a file without repeated runs.
    """
    what = ["role", "base", "factor", "level"]
    table = files.table(path, what, {"test_accuracy": 1})
    errors = np.log((1 - table["test_accuracy"]).clip(lower=0.5 / 8192))
    spread = errors.groupby([table[name] for name in what]).std().dropna()
    if spread.empty:
        raise InputError(f"{path}: expected at least two seeds of a configuration, each with its test_accuracy")
    return spread


def runs(n_seeds, rng, effects=None, spread=0.25):
    """Made-up confirm.records of an ordinary report in which only effects act: {(factor, level): share of accuracy}.

    Errors are lognormal over seeds (skewed, near 0): spread is the standard deviation of their logarithm.
    """
    base = dict(lr=0.0012, d=64, rank=16, temperature=1.3, batch_size=16, seq_len=128, n_layers=2, n_steps=500)
    ladder = {name: LADDER[name] for name in ("lr", "d", "rank", "temperature", "batch_size")}
    ladder |= {"seq_len": (32, 64, 128), "batch_size, equal samples": (8, 16, 32, 64), "n_steps": (250, 500, 1000)}
    roles = ("trial 7", "trial 3", "published trial 1", TRIAL_2, "defaults")
    rows, drawn = [], {}

    def draw(role, of, factor, level):
        name = factor.removesuffix(", equal samples")
        key = (of, level == base[name] or (factor, level)) if of else role  # the base's own level is one run
        if key not in drawn:
            error = (1 - ACCURACY) * np.exp(spread * rng.normal(size=n_seeds) - spread**2 / 2)
            error = error - (effects or {}).get((factor, level), 0)
            drawn[key] = error, 2.4 * error
        for s, (error, ce) in enumerate(zip(*drawn[key], strict=True)):
            scores = dict(seed=s, test_accuracy=1 - error, test_ce=ce, route_accuracy=1 - error)
            changed = {name: level} if of else {}
            rows.append(dict(role=role, base=of, factor=factor, level=level) | base | changed | scores)
        return drawn[key][1].mean()

    ce = {role: draw(role, "", "", math.nan) for role in roles}
    best = min(roles, key=ce.get)
    for factor, levels in ladder.items():
        for level in sorted({*levels, base[factor.removesuffix(", equal samples")]}):
            draw("", best, factor, level)
    if best != TRIAL_2:
        for level in (32, 64, 128):
            draw("", TRIAL_2, "seq_len", level)
    return pd.DataFrame(rows)
