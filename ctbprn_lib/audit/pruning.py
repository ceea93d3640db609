"""Whether few validation samples prune the same trials as all of them, and what scoring costs.

Before its last scoring a trial is scored on few samples (tasks.INTERIM_SAMPLES). These scores serve the pruner alone.
"""

import time
from collections.abc import Callable

import numpy as np
import optuna
import pandas as pd
import torch

from ctbprn_lib import scoring, search
from ctbprn_lib.device import precision_context
from ctbprn_lib.tasks import RoutingTask, Task
from ctbprn_lib.train import Budget, Fit, Hyperparameters, fit

TRIALS = 10**6  # first spawn key of the seeds of these trials, which are no study's


def draw_trials(n_trials: int, task: Task, seed: int = 0, space: search.Space | None = None) -> list[Hyperparameters]:
    """The hyperparameters of random trials of a space, by default of the default one."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    return [search.suggest(study.ask(), space or search.default_space(task)) for _ in range(n_trials)]


def score_twice(
    n_trials: int,
    budget: Budget,
    task: Task | None = None,
    seed: int = 0,
    on_trial: Callable[[int], None] | None = None,
) -> pd.DataFrame:
    """Train random trials to their end, and score them each time on few validation samples and on all.

    Returns one row for each trial and scoring, with the columns trial, scoring (from 1), few and all (mean validation
    CE in nats). on_trial(number) is called after each trial.
    """
    task, rows = task or RoutingTask(), []
    for number, hp in enumerate(draw_trials(n_trials, task, seed)):

        def score_all(result: Fit, number: int = number) -> None:
            seq_len = result.hyperparameters.seq_len
            autocast = precision_context(result.precision, torch.device(result.device))
            everything = scoring.score(result.model, task, "validation", budget.n_validation, seq_len, autocast)
            few = search.scores(result)["val_ce"]
            rows.append((number, len(result.steps), few, everything["val_ce"].mean()))

        fit(hp, task, budget, np.random.SeedSequence(seed, spawn_key=(TRIALS, number)), on_eval=score_all)
        if on_trial:
            on_trial(number)
    return pd.DataFrame(rows, columns=["trial", "scoring", "few", "all"])


def outcomes(scores: pd.DataFrame, column: str, order: np.ndarray) -> dict[int, int]:
    """{trial: the scoring at which it is pruned, or 0} if the trials of score_twice run in this order.

    column: "few" or "all", the scores that the pruner is told before the last scoring.
    """
    study = optuna.create_study(pruner=search.PRUNERS["median"]())
    pruned = {}
    for number in order:
        rows = scores[scores["trial"] == number].sort_values("scoring")
        trial, last = study.ask(), int(rows["scoring"].max())
        pruned[int(number)] = 0
        for row in rows.itertuples():
            is_last = row.scoring == last
            trial.report(row.all if is_last else getattr(row, column), row.scoring)
            if not is_last and trial.should_prune():
                pruned[int(number)] = int(row.scoring)
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                break
        else:
            study.tell(trial, rows["all"].iloc[-1])
    return pruned


def agreement(scores: pd.DataFrame, n_orders: int = 100, seed: int = 0) -> dict[str, float]:
    """How often few samples decide about a trial as all do, over random orders of the trials of score_twice.

    Returns shares of trials: same (pruned by both or by neither), same_scoring (and at the same scoring), pruned (by
    few samples), and best_kept: the share of orders in which the best trial is kept by few samples if all keep it.
    """
    rng, numbers = np.random.default_rng(seed), scores["trial"].unique()
    finals = scores[scores["scoring"] == scores["scoring"].max()].set_index("trial")["all"]
    best = int(finals.idxmin())
    shares: dict[str, list[float]] = {"same": [], "same_scoring": [], "pruned": [], "best_kept": []}
    for _ in range(n_orders):
        order = rng.permutation(numbers)
        few, everything = outcomes(scores, "few", order), outcomes(scores, "all", order)
        shares["same"] += [float(bool(few[n]) == bool(everything[n])) for n in few]
        shares["same_scoring"] += [float(few[n] == everything[n]) for n in few]
        shares["pruned"] += [float(few[n] > 0) for n in few]
        if not everything[best]:
            shares["best_kept"].append(float(not few[best]))
    return {name: float(np.mean(values)) for name, values in shares.items()}


def scoring_share(
    n_trials: int, n_steps: int, n_replicas: int, space: search.Space | None = None, seed: int = 0
) -> float:
    """Measure the share of the time of random trials that goes into their scorings.

    n_steps, n_replicas: of a trial. space: of the trials, by default the default one. The trials are run to their end.
    """
    task, budget = RoutingTask(), Budget(n_steps, n_replicas)
    training = total = 0.0
    for number, hp in enumerate(draw_trials(n_trials, task, seed, space)):
        started = time.perf_counter()
        result = fit(hp, task, budget, np.random.SeedSequence(seed, spawn_key=(TRIALS, number)))
        total += time.perf_counter() - started
        training += n_steps * result.step_time_ms / 1000
    return 1 - training / total
