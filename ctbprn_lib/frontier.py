"""The best for every budget of compute: the front of a search over cost, and the power law that errors follow along it.

notebooks/frontier.ipynb trains the front again with fresh seeds, beside the published trial 2 at equal cost.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.stats import t as student

from ctbprn_lib import InputError, evidence, published, search
from ctbprn_lib.confirm import Run
from ctbprn_lib.evidence import Contrast, Plan, Question, Schedule
from ctbprn_lib.tasks import Task
from ctbprn_lib.train import Hyperparameters, training_cost

DOUBLING = 2.0
MARGIN = 0.002  # a fifth of a point of accuracy: near the ceiling all differences are small
DEAREST = 1e30  # multiply-adds: what no law can promise


def front(trials: pd.DataFrame) -> pd.DataFrame:
    """The complete trials that no other beats in both validation CE and cost, the cheapest first.

    trials: search.records of a study with the objective ce_cost.
    Raises InputError if no trial is complete.
    """
    complete = trials[trials["state"] == "complete"].sort_values("cost")
    if complete.empty:
        raise InputError("the study has no complete trial, so it has no front; run tune.ipynb on")
    return complete[evidence.pareto_front(complete["cost"], -complete["val_ce"])]


def thinned(trials: pd.DataFrame, factor: float = DOUBLING) -> pd.DataFrame:
    """Of a front those whose costs differ by at least this factor, the cheapest first.  The dearest always stays."""
    kept: list[int] = []
    for index in trials.sort_values("cost", ascending=False).index:
        if not kept or trials.loc[index, "cost"] <= trials.loc[kept[-1], "cost"] / factor:
            kept.append(index)
    return trials.loc[kept[::-1]]


def steps_for(hyperparameters: Hyperparameters, task: Task, cost: float) -> int:
    """The number of training steps whose cost is nearest to this one, in multiply-adds; at least 1."""
    return max(1, round(cost / training_cost(hyperparameters, task, 1)))


def cost_of(run: Run, task: Task) -> int:
    """The multiply-adds of training one seed of a Run."""
    return training_cost(run.hyperparameters, task, run.n_steps)


def runs(trials: pd.DataFrame, task: Task) -> tuple[list[Run], list[Run]]:
    """Each trial of a front as a Run, and for each of them the published trial 2 trained at equal cost."""
    two = published.hyperparameters(2)
    two = replace(two, seq_len=min(two.seq_len, task.n_tokens))
    found = []
    for row in trials.to_dict("records"):
        hp = search.hyperparameters(pd.Series(row))
        found.append(Run(f"trial {row['trial']}", hp, int(row[search.LENGTH])))
    lengths = [steps_for(two, task, cost_of(run, task)) for run in found]
    return found, [Run(f"published trial 2, {n} steps", two, n) for n in lengths]


def plan(found: list[Run], rivals: list[Run], schedule: Schedule) -> Plan:
    """Whether each Run of the front is better than its rival at equal cost: one question each."""
    questions = []
    for run, rival in zip(found, rivals, strict=True):
        shapes = [(hp.d, hp.rank, hp.n_layers) for hp in (run.hyperparameters, rival.hyperparameters)]
        contrast = Contrast(run.name, rival.name, paired=shapes[0] == shapes[1])
        questions.append(Question(run.name, (contrast,), margin=MARGIN))
    return Plan(tuple(questions), schedule)


@dataclass(frozen=True)
class PowerLaw:
    """error = exp(level) * cost ** slope, as a straight line of logarithms, fitted by least squares.

    n: the points that it was fitted on. at, spread: the mean of their log costs, and the sum of squares around it.
    sd: the standard deviation of log errors around the line, with n - 2 degrees of freedom.
    """

    level: float
    slope: float
    n: int
    at: float
    spread: float
    sd: float

    @classmethod
    def fit(cls, costs: ArrayLike, errors: ArrayLike) -> "PowerLaw":
        """The law of points: costs (n,) in multiply-adds, errors (n,) as shares or nats.

        Raises InputError for fewer than three points, as two leave nothing to judge the line by, and for values that
        are not above 0.
        """
        cost, error = np.asarray(costs, dtype=float), np.asarray(errors, dtype=float)
        if cost.size < 3:
            raise InputError(f"a power law needs at least three points, got {cost.size}")
        if not ((cost > 0) & (error > 0) & np.isfinite(cost) & np.isfinite(error)).all():
            raise InputError("a power law needs costs and errors above 0")
        x, y = np.log(cost), np.log(error)
        spread = float(((x - x.mean()) ** 2).sum())
        if not spread:
            raise InputError("a power law needs different costs")
        slope = float(((x - x.mean()) * (y - y.mean())).sum() / spread)
        level = float(y.mean() - slope * x.mean())
        sd = math.sqrt(float(((y - level - slope * x) ** 2).sum()) / (x.size - 2))
        return cls(level, slope, x.size, float(x.mean()), spread, sd)

    def predict(self, cost: ArrayLike, of_mean: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(error, low, high) at each cost, with a 95 % interval for one new configuration, or for the line itself.

        Source: the prediction interval of simple linear regression.
        """
        x = np.log(np.asarray(cost, dtype=float))
        y = self.level + self.slope * x
        share = 1 / self.n + (x - self.at) ** 2 / self.spread + (0 if of_mean else 1)
        half = student.ppf(0.975, self.n - 2) * self.sd * np.sqrt(share)
        return np.exp(y), np.exp(y - half), np.exp(y + half)

    def cost_for(self, error: float) -> tuple[float, float, float]:
        """(cost, low, high): the multiply-adds at which the line reaches an error, and where its interval does.

        An end is infinite where the interval does not reach the error at any cost up to DEAREST.
        """
        costs = np.geomspace(1.0, DEAREST, 20_001)
        reached = [costs[band <= error] for band in self.predict(costs, of_mean=True)]
        middle, low, high = (float(part[0]) if part.size else math.inf for part in reached)
        return middle, low, high
