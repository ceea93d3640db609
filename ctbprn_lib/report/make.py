"""make report: the notebooks one after another, at a size that this machine can do in a few minutes.

    python -m ctbprn_lib.report.make --help

The sizes follow from the measured speed of the machine: a slower one gets a smaller study, not a longer wait.
"""

from typing import Any

import torch

from ctbprn_lib import search, storage, tasks
from ctbprn_lib.device import resolve_device
from ctbprn_lib.train import Budget, Hyperparameters, Task, fit

Sizes = dict[str, dict[str, Any]]  # {notebook: {parameter: value}}
ROOT = storage.REPORTS.parent
MINUTES = 6.0  # that a quick report is sized for
NOTEBOOK_SECONDS = 15  # to start a notebook, and to draw and write what it has found
N_NOTEBOOKS = 4
AFTER_PRUNING = 0.75  # of the steps of a search: the others are saved by pruning
FEWEST_STEPS = 0.4  # of a quick report's: fewer would decide nothing

QUICK: Sizes = {
    "tune": {"n_trials": 8, "n_replicas": 2, "n_steps": 1000, "space": "notebooks/quick.yaml"},
    "confirm": {"n_seeds": 4, "n_test": 4096, "n_top": 1, "n_levels": 2},
    "reproduce": {"n_seeds": 40, "n_fresh_seeds": 4, "n_spread_seeds": 4, "max_steps": 20, "n_curve_seeds": 2},
    "explore": {"n_steps": 100},
}
FULL: Sizes = {
    "tune": {"n_trials": 100, "n_replicas": 8, "n_steps": 2000},
    "confirm": {"n_seeds": 16},
    "reproduce": {"n_fresh_seeds": 200, "n_spread_seeds": 32, "max_steps": 2000, "n_curve_seeds": 8},
    "explore": {"n_steps": 2000},
}


def products_per_second(device: str = "auto", n_steps: int = 10) -> float:
    """Measure the multiply-adds a second of one worker that trains: on a CPU one thread, on a GPU all of it."""
    hp, task = Hyperparameters(d=32), tasks.RoutingTask()
    n_replicas = 64 if resolve_device(device).type == "cuda" else 2
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        fit(hp, task, Budget(3, n_replicas, n_evals=1, n_validation=32), device=device)  # a warm-up
        budget = Budget(n_steps, n_replicas, n_evals=1, n_validation=32)
        milliseconds = fit(hp, task, budget, device=device).step_time_ms
    finally:
        torch.set_num_threads(n_threads)
    return 1000 * search.products(hp, task, 1, n_replicas) / milliseconds


def products(sizes: Sizes, task: Task) -> dict[str, float]:
    """The multiply-adds that tune and confirm take at these sizes, about: {notebook: number}.

    What confirm trains depends on what tune finds. It is counted with the middle of the search space as the best.
    """
    tune, confirm = sizes["tune"], sizes["confirm"]
    space = search.load_space(ROOT / tune["space"], task) if "space" in tune else search.default_space(task)
    middle = {name: _middle(entry) for name, entry in space.items()}
    best, defaults = Hyperparameters(**middle), Hyperparameters()
    n_levels = confirm.get("n_levels", 5)
    n_moved = sum((n_levels or len(entry)) > 1 for entry in space.values() if not is_fixed(entry))
    one = search.products(best, task, tune["n_steps"], 1)
    other = search.products(defaults, task, tune["n_steps"], 1)
    searched = AFTER_PRUNING * one * tune["n_trials"] * tune["n_replicas"]
    confirmed = confirm["n_seeds"] * (2 * other + one * (1 + n_moved * (n_levels - 1)))
    return {"tune": searched, "confirm": confirmed}
