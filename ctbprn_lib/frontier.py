"""The best for every budget of compute: the front of a search over cost, and the power law that errors follow along it.

notebooks/frontier.ipynb trains the front again with fresh seeds, beside the published trial 2 at equal cost.
"""

import json
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
from numpy.typing import ArrayLike
from scipy.special import stdtrit

from ctbprn_lib import InputError, evidence, files, published, search, storage
from ctbprn_lib.confirm import Run
from ctbprn_lib.evidence import Contrast, Plan, Question, Schedule
from ctbprn_lib.scoring import score
from ctbprn_lib.search import Space
from ctbprn_lib.tasks import Task
from ctbprn_lib.train import KINDS, TABLE, Budget, Hyperparameters, fit, training_cost

DOUBLING = 2.0
# kinds of points; CHANGED: a point of the front of which one hyperparameter has another value
FRONT, RIVAL, CHANGED = "front of the search", "published trial 2", "changed"
MARGIN = 0.002  # a fifth of a point of accuracy: near the ceiling all differences are small
FEW_STEPS = 20  # after which it is known how fast a network is trained
SHARE = 0.95  # of a time that a training may take; the rest is for scoring
TIMING = 3  # first spawn key of the seeds of timed runs; see confirm.CONFIRMING
DEAREST = 1e30  # multiply-adds: what no law can promise


def check(study: optuna.Study) -> None:
    """Raise InputError for a study that is not over cost, or whose front would be confirmed by another notebook."""
    objective = study.user_attrs["fingerprint"]["objective"]
    if objective != "ce_cost":
        raise InputError(
            f"study {study.study_name!r} has the objective {objective}, so it has no front over cost; confirm.ipynb "
            "confirms it, and tune.ipynb with -p objective ce_cost makes a study with a front"
        )


def front(trials: pd.DataFrame) -> pd.DataFrame:
    """The complete trials that no other beats in both validation CE and cost, the cheapest first.

    trials: search.records of a study with the objective ce_cost.
    Raises InputError if no trial is complete.
    """
    complete = trials[trials["state"] == "complete"].sort_values("cost")
    if complete.empty:
        raise InputError("the study has no complete trial, so it has no front; run tune.ipynb on")
    return complete[evidence.pareto_front(complete["cost"], -complete["val_ce"])]


def given_by_hand(study: optuna.Study) -> list[str]:
    """The names of the trials whose settings somebody enqueued, so that no sampler chose them."""
    trials = study.get_trials(deepcopy=False)
    return [f"trial {trial.number}" for trial in trials if trial.system_attrs.get("fixed_params")]


def thinned(trials: pd.DataFrame, factor: float = DOUBLING) -> pd.DataFrame:
    """Of a front those whose costs differ by at least this factor, the cheapest first.  The dearest always stays.

    Raises InputError if there is none.
    """
    if trials.empty:
        raise InputError("no point of the front costs so little; give a larger most_cost, or 0 for all of them")
    kept: list[int] = []
    for index in trials.sort_values("cost", ascending=False).index:
        if not kept or trials.loc[index, "cost"] <= trials.loc[kept[-1], "cost"] / factor:
            kept.append(index)
    return trials.loc[kept[::-1]]


def steps_for(hyperparameters: Hyperparameters, task: Task, cost: float) -> int:
    """The number of training steps whose cost is nearest to this one, in multiply-adds; at least 1."""
    return max(1, round(cost / training_cost(hyperparameters, task, 1)))


def next_space(trials: pd.DataFrame, space: Space) -> Space:
    """Where to search next: the span of each hyperparameter along a front, with some room on both sides.

    Levels outside it are left out. A range gets half as much again on a logarithmic scale, else a tenth of itself. The
    longest training may be four times as long as the longest of the front.
    """
    found: Space = {}
    for name, entry in space.items():
        low, high = trials[name].min(), trials[name].max()
        if isinstance(entry, list):
            found[name] = [level for level in entry if low <= level <= high]
        elif name == search.LENGTH:
            found[name] = entry | {"low": int(min(entry["low"], low)), "high": int(4 * high)}
        elif entry.get("log"):
            found[name] = entry | {"low": float(low / 1.5), "high": float(high * 1.5)}
        else:
            room = (entry["high"] - entry["low"]) / 10
            found[name] = entry | {"low": float(max(low - room, low / 2)), "high": float(high + room)}
    return found


def cost_of(run: Run, task: Task) -> int:
    """The multiply-adds of training one seed of a Run."""
    return training_cost(run.hyperparameters, task, run.n_steps)


def runs(trials: pd.DataFrame, task: Task, factors: list[float]) -> tuple[list[Run], list[Run]]:
    """Each trial of a front as a Run, and for each of them the published trial 2 trained at equal cost.

    factors: times the cost of the dearest for which its settings are trained as well, beyond what was searched.
    """
    two = published.hyperparameters(2)
    two = replace(two, seq_len=min(two.seq_len, task.n_tokens))
    found = []
    for row in trials.to_dict("records"):
        hp = search.hyperparameters(pd.Series(row))
        found.append(Run(f"trial {row['trial']}", hp, int(row[search.LENGTH])))
    found += longer(found[-1], factors, task)
    lengths = [steps_for(two, task, cost_of(run, task)) for run in found]
    return found, [Run(f"published trial 2, {n} steps", two, n) for n in lengths]


def changed(found: list[Run], setting: str) -> list[Run]:
    """Each Run with another value of one hyperparameter, such as "gate_noise=0".  "" changes nothing: no Runs.

    Raises InputError for an unknown hyperparameter, a value that it cannot have, or one that changes nothing.
    """
    if not setting:
        return []
    name, _, given = setting.partition("=")
    if name not in TABLE or not given:
        raise InputError(f"changed must be a hyperparameter and its value, such as gate_noise=0, got {setting!r}")
    try:
        value = KINDS[name](given)
    except ValueError:
        raise InputError(f"changed: {name} cannot be {given!r}") from None
    runs = [
        replace(
            run,
            role=f"{run.role}, {TABLE[name].label.lower()} {TABLE[name].text(value)}",
            hyperparameters=replace(run.hyperparameters, **{name: value}),
            name="",
        )
        for run in found
    ]
    if any(new.hyperparameters == run.hyperparameters for new, run in zip(runs, found, strict=True)):
        raise InputError(f"changed: {setting} is what a point of the front has already")
    return runs


def taken_apart(found: list[Run], task: Task) -> Run:
    """The point that is trained without its parts: the dearest that costs at most an eighth of the dearest of all.

    If there is none, it is the cheapest.
    """
    most = cost_of(found[-1], task) / 8
    return max(
        (run for run in found if cost_of(run, task) <= most), key=lambda run: cost_of(run, task), default=found[0]
    )


def plan(found: list[Run], rivals: list[Run], schedule: Schedule) -> Plan:
    """Whether each Run of the front is better than its rival at equal cost: one question each."""
    questions = []
    for run, rival in zip(found, rivals, strict=True):
        same = (getattr(run.hyperparameters, k) == getattr(rival.hyperparameters, k) for k in TABLE if TABLE[k].shapes)
        contrast = Contrast(run.name, rival.name, paired=all(same))
        questions.append(Question(run.name, (contrast,), margin=MARGIN))
    return Plan(tuple(questions), schedule)


def pooled(runs: pd.DataFrame, about: dict[str, Any]) -> pd.DataFrame:
    """runs with more seeds of changed points with gate_noise 0: those of the same point without the part noise.

    Both are one configuration, trained with seeds of their own.
    """
    for name, itself in about.get("changed", {}).items():
        more = runs[runs["name"] == f"{itself}: without noise"]
        if (runs.loc[runs["name"] == name, "gate_noise"] == 0).any() and len(more):
            apart = more["seed"] + runs["seed"].max() + 1
            runs = pd.concat([runs, more.assign(name=name, without="", gate_noise=0.0, seed=apart)], ignore_index=True)
    return runs


def points(runs: pd.DataFrame, about: dict[str, Any], task: Task) -> pd.DataFrame:
    """One row a configuration that has been trained, the cheapest first within each kind.

    runs, about: confirm.records, whose about has "front", the names of the front's points, and "changed", {name of a
    changed point: that of the point itself}.
    Columns: name, kind (FRONT, RIVAL, CHANGED or "", for one without a part), without, the hyperparameters, n_steps,
    cost in multiply-adds, seeds, seconds of one seed on one core, device, val_ce, and test_accuracy, test_ce and
    route_accuracy, each with _low and _high (95 % interval over seeds).
    """
    rows = []
    for configuration, part in pooled(runs, about).groupby("name", sort=False):
        first = part.iloc[0]
        hp = search.hyperparameters(first)
        kind = "" if first["without"] else RIVAL
        kind = FRONT if configuration in about["front"] else kind
        kind = CHANGED if configuration in about.get("changed", {}) else kind
        row = {"name": configuration, "kind": kind, "without": first["without"]} | asdict(hp)
        row |= {"n_steps": int(first["n_steps"]), "cost": training_cost(hp, task, int(first["n_steps"]))}
        row |= {"seeds": len(part), "seconds": part["train_seconds"].mean() / about["n_seeds"]}
        row |= {"device": first["device"], "val_ce": part["val_ce"].mean()}
        for name in ("test_accuracy", "test_ce", "route_accuracy"):
            ends = evidence.mean_interval(part[name], nats=name == "test_ce")
            row |= dict(zip((name, f"{name}_low", f"{name}_high"), ends, strict=True))
        rows.append(row)
    table = pd.DataFrame(rows).sort_values("cost", kind="stable")
    return pd.concat([table[table["kind"] == kind] for kind in (FRONT, RIVAL, CHANGED, "")], ignore_index=True)


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
        half = stdtrit(self.n - 2, 0.975) * self.sd * np.sqrt(share)
        return np.exp(y), np.exp(y - half), np.exp(y + half)

    def cost_for(self, error: float) -> tuple[float, float, float]:
        """(cost, low, high): the multiply-adds at which the line reaches an error, and where its interval does.

        An end is infinite where the interval does not reach the error at any cost up to DEAREST.
        """
        costs = np.geomspace(1.0, DEAREST, 20_001)
        reached = [costs[band <= error] for band in self.predict(costs, of_mean=True)]
        middle, low, high = (float(part[0]) if part.size else math.inf for part in reached)
        return middle, low, high


def usual_cost(task: Task) -> int:
    """The multiply-adds of 500 steps of the untuned defaults: the cost of the study that came before."""
    return training_cost(Hyperparameters(seq_len=min(128, task.n_tokens)), task, 500)


def ours(points: pd.DataFrame) -> pd.DataFrame:
    """The points of the front and the changed ones, the cheapest first."""
    return points[points["kind"].isin((FRONT, CHANGED))].sort_values("cost", kind="stable")


def best(points: pd.DataFrame, task: Task) -> dict[str, dict[str, Any]]:
    """Two points, of the front or changed, as dicts of their columns: "any", and "equal", at no more than usual_cost.

    Each is the one with the lowest validation CE over the fresh seeds. There is no "equal" if no point is so cheap.
    """
    front = ours(points)
    cheap = front[front["cost"] <= 1.05 * usual_cost(task)]
    rows = {"any": front, "equal": cheap}
    return {name: of.loc[of["val_ce"].idxmin()].to_dict() for name, of in rows.items() if len(of)}


def keep(points: pd.DataFrame, task: Task, path: Path) -> None:
    """Write what best finds to a file front.json, from which the reports of other studies of the task read it."""
    content = json.dumps({"task": task.description, **best(points, task)}, default=float, indent=1)
    with files.whole(path) as new:
        new.write_text(content + "\n", encoding="utf-8")


def known(task: dict[str, Any], but: str = "") -> dict[str, Any] | None:
    """What keep has written in a folder of reports/ for a task (its description), with the folder's name as "study".

    but: the name of a study that is passed over.
    """
    for path in sorted(storage.REPORTS.glob("*/front.json")):
        content = files.mapping(path, "what frontier.ipynb wrote there")
        if content.get("task") == task and path.parent.name != but:
            return content | {"study": path.parent.name}
    return None


def numbers(text: str, name: str, kind: str, above: float = 0) -> list[float]:
    """Numbers between commas, such as "1,10,60".  Raises InputError for anything else, or one not above a limit.

    name and kind: of the parameter that text is, and of its numbers, for the message.
    """
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(above < number < math.inf for number in found):
        raise InputError(f"{name} must be {kind} above {above:g} between commas, such as 2,10,60, got {text!r}")
    return found


def longer(run: Run, factors: list[float], task: Task) -> list[Run]:
    """The settings of a Run, trained for so many times the cost."""
    lengths = [steps_for(run.hyperparameters, task, factor * cost_of(run, task)) for factor in factors]
    return [replace(run, role=f"{run.role}, {n} steps", n_steps=n, name="") for n in lengths]


def rates(points: pd.DataFrame, task: Task, device: str = "auto") -> list[float]:
    """Multiply-adds a second at which this process trains one network of each point, from a few steps of each."""
    found = []
    for _, row in points.iterrows():
        hp = search.hyperparameters(row)
        tried = fit(hp, task, Budget(FEW_STEPS, 1, n_evals=1, n_validation=1), 0, device)
        found.append(1000 * training_cost(hp, task, 1) / tried.step_time_ms)
    return found


def within(points: pd.DataFrame, rates: list[float], seconds: float, task: Task) -> Run:
    """The point with the lowest validation CE of those that are trained within a time, as a Run; points: see ours.

    rates: multiply-adds a second, one for each point. If the dearest point takes less than half of the time, it is
    trained for as many steps as the time has room for. If none can be trained, it is the cheapest.
    """
    used = SHARE * seconds * np.array(rates) / points["cost"].to_numpy()  # how often each could be trained
    if used[-1] >= 2:
        row, factor = points.iloc[-1], used[-1]
    else:
        fitting = points[used >= 1]
        row = fitting.loc[fitting["val_ce"].idxmin()] if len(fitting) else points.iloc[0]
        factor = 1.0
    run = Run(str(row["name"]), search.hyperparameters(row), int(row["n_steps"]))
    n_steps = run.n_steps if factor == 1 else steps_for(run.hyperparameters, task, factor * row["cost"])
    return replace(run, n_steps=n_steps)


def timed(run: Run, task: Task, n_runs: int, n_test: int, seed: int = 0, device: str = "auto") -> pd.DataFrame:
    """Train one network of a Run n_runs times by itself: columns seconds, test_accuracy and test_ce."""
    rows = []
    for i in range(n_runs):
        seeds = np.random.SeedSequence(seed, spawn_key=(TIMING, i))
        started = time.perf_counter()
        result = fit(run.hyperparameters, task, Budget(run.n_steps, 1, n_evals=1), seeds, device)
        seconds = time.perf_counter() - started
        scores = score(result.model, task, "test", n_test, run.hyperparameters.seq_len)
        rows.append({"seconds": seconds} | {name: scores[name].item() for name in ("test_accuracy", "test_ce")})
    return pd.DataFrame(rows)
