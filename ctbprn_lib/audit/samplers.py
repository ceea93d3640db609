"""python -m ctbprn_lib.audit.samplers: which of Optuna's samplers finds the better front of error and cost.

Both get the same number of trials of the same small searches over cost. A front is judged by its hypervolume: the area
that it dominates, with both objectives as logarithms, up to the worst value that any of the searches has seen.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ctbprn_lib import evidence, files, search, storage
from ctbprn_lib.tasks import RoutingTask, Task
from ctbprn_lib.train import Budget

SAMPLERS = ("tpe", "nsga2")


def hypervolume(points: np.ndarray, reference: np.ndarray) -> float:
    """The area between a reference point (2,) and the points (n,2) that lie below it in both; smaller is better."""
    inside = points[(points < reference).all(1)]
    area, lowest = 0.0, reference[1]
    for x, y in inside[np.lexsort((inside[:, 1], inside[:, 0]))]:
        if y < lowest:
            area += (reference[0] - x) * (lowest - y)
            lowest = y
    return float(area)


def front_of(sampler: str, seed: int, n_trials: int, most_cost: float, task: Task, budget: Budget) -> np.ndarray:
    """(n,2) log10 of validation CE and cost of the complete trials of one search, in a database of its own."""
    space = search.cost_space(task)
    how: dict[str, Any] = dict(task=task, space=space, budget=budget, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{folder}/study.db"
        of: dict[str, Any] = dict(objective="ce_cost", sampler=sampler, pruner="none", most_cost=most_cost)
        study = search.open_study(f"sampler-{sampler}-{seed}", url, **how, **of)
        search.run_trials(study, n_trials, **how)
        return np.array([trial.values for trial in study.trials if trial.values])


def table(fronts: Mapping[tuple[str, int], np.ndarray]) -> pd.DataFrame:
    """One row a search: sampler, seed and hypervolume, against the worst values of all searches."""
    worst = np.concatenate(list(fronts.values())).max(0)
    rows = [(*key, hypervolume(points, worst)) for key, points in fronts.items()]
    return pd.DataFrame(rows, columns=["sampler", "seed", "hypervolume"])


def sentence(volumes: pd.DataFrame) -> str:
    """Which sampler found the better fronts, with the difference over seeds and its interval."""
    by_seed = volumes.pivot(index="seed", columns="sampler", values="hypervolume")
    first, second = SAMPLERS
    gap = evidence.compare(by_seed[first], by_seed[second], paired=True)
    means = ", ".join(f"{name} {by_seed[name].mean():.2f}" for name in SAMPLERS)
    return (
        f"Two samplers were compared over {len(by_seed)} seeds of a small search by the area that their fronts "
        f"dominate (in squared powers of ten): {means}. The difference is {gap.effect:+.2f} "
        f"[{gap.low:+.2f}, {gap.high:+.2f}]."
    )


def main(n_seeds: int = 3, n_trials: int = 24, most_cost: float = 1e11) -> None:
    """Run all searches, and write reports/frontier/samplers.csv."""
    task, budget = RoutingTask(), Budget(100, 1, n_evals=1)
    fronts = {
        (name, seed): front_of(name, seed, n_trials, most_cost, task, budget)
        for seed in range(n_seeds)
        for name in SAMPLERS
    }
    made = table(fronts)
    with files.whole(Path(storage.REPORTS) / "frontier" / "samplers.csv") as new:
        made.to_csv(new, index=False)
    print(sentence(made))


if __name__ == "__main__":
    main()
