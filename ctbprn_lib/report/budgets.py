"""The sentences and tables of the page that notebooks/frontier.ipynb publishes: the best for every budget of compute.

points: what frontier.points returns. answers: {configuration of the front: the verdict on it}.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from ctbprn_lib import evidence, frontier
from ctbprn_lib.confirm import Run
from ctbprn_lib.evidence import Answer
from ctbprn_lib.frontier import CHANGED, FRONT, MARGIN, PowerLaw
from ctbprn_lib.report import text
from ctbprn_lib.report.text import UNKNOWN
from ctbprn_lib.tasks import Task
from ctbprn_lib.train import TABLE, Hyperparameters, training_cost

GOALS = {"test_accuracy": 0.995, "test_ce": 0.02}  # what the law is asked for
SCORES = {"test_accuracy": "wrong answers", "test_ce": "cross-entropy"}
SAME, OPEN = f"the same within {100 * MARGIN:g} points", "without a verdict"
VERDICTS = (evidence.BETTER, evidence.SAME, evidence.WORSE, OPEN)
RAISED = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")
SHORT = {
    "lr": "learning rate",
    "d": "d",
    "rank": "rank",
    "temperature": "temperature",
    "batch_size": "batch",
    "n_layers": "layers",
    "weight_decay": "weight decay",
}
ONLY_IF_CHANGED = {"gate_noise": "gate noise"}


def cost(value: float) -> str:
    """A cost as people read it: "5.2 × 10¹¹"."""
    digits, exponent = f"{value:.1e}".split("e")
    return f"{digits} × 10{str(int(exponent)).translate(RAISED)}"


def settings(row: Mapping) -> str:
    """The hyperparameters of a point and its length of training, in one line."""
    usual = Hyperparameters()
    said = [f"{label} {TABLE[name].text(row[name])}" for name, label in SHORT.items()]
    for name, label in ONLY_IF_CHANGED.items():
        if name in row and row[name] != getattr(usual, name):
            said.append(f"{label} {TABLE[name].text(row[name])}")
    return ", ".join([*said, f"{text.commas(row['n_steps'])} steps"])


def scores(row: Mapping) -> str:
    """The test accuracy and CE of a point with their intervals."""
    accuracy, ce = (text.interval(row, name) for name in ("test_accuracy", "test_ce"))
    return f"right on {text.percent(accuracy)}, with {text.nats(ce)} nats"


def errors(points: pd.DataFrame, score: str) -> pd.DataFrame:
    """cost, error, low, high and name of each point: the share of wrong answers, or CE in nats."""
    middle, low, high = (points[column] for column in (score, f"{score}_low", f"{score}_high"))
    if score == "test_accuracy":
        middle, low, high = 1 - middle, 1 - high, 1 - low
    names = [f"{row['name']}: {settings(row)}" for row in points.to_dict("records")]
    return pd.DataFrame(dict(cost=points["cost"], error=middle, low=low, high=high, name=names))


def law(points: pd.DataFrame, score: str, cheaper_half: bool = False) -> PowerLaw | None:
    """The power law along the front, fitted on all its points or on the cheaper half; None if they are too few."""
    front = errors(points[points["kind"] == FRONT], score).sort_values("cost")
    used = front[: math.ceil(len(front) / 2)] if cheaper_half else front
    return PowerLaw.fit(used["cost"], used["error"]) if len(used) >= 3 and (used["error"] > 0).all() else None


def line(points: pd.DataFrame, score: str) -> pd.DataFrame | None:
    """The law of the cheaper half over all costs, with the interval of a new point: cost, error, low and high."""
    fitted = law(points, score, cheaper_half=True)
    if fitted is None:
        return None
    costs = np.geomspace(points["cost"].min(), points["cost"].max(), 50)
    return pd.DataFrame(dict(zip(("cost", "error", "low", "high"), (costs, *fitted.predict(costs)), strict=True)))


def advice(
    points: pd.DataFrame, answers: Mapping[str, Answer], task: Task, is_done: bool, linear_rule: float = math.nan
) -> str:
    """What to use: at any cost, at the cost of the defaults, and how the front stands beside the published trial 2."""
    found, n_points = frontier.best(points, task), int((points["kind"] == FRONT).sum())
    at_any = found["any"]
    said = [
        f"- **The best that was trained again: {at_any['name']}**, {scores(at_any)} over {at_any['seeds']} fresh "
        f"seeds. It costs {cost(at_any['cost'])} multiply-adds: {settings(at_any)}."
    ]
    if "equal" in found and found["equal"]["name"] != at_any["name"]:
        equal = found["equal"]
        said.append(
            f"- **At no more than the cost of 500 steps of the defaults, {cost(frontier.usual_cost(task))}: "
            f"{equal['name']}**, {scores(equal)}: {settings(equal)}."
        )
    counts = text.counted([answer.verdict if answer.decided else OPEN for answer in answers.values()], VERDICTS)
    counts = counts.replace(evidence.SAME, SAME)
    said.append(
        f"- **Beside the published trial 2 trained at equal cost**, of the {n_points} points of the front: {counts}."
    )
    if not math.isnan(linear_rule):
        every = frontier.ours(points)
        above = every[every["test_accuracy_low"] > linear_rule]
        which = (
            f"{above.iloc[0]['name']} for {cost(above.iloc[0]['cost'])} multiply-adds" if len(above) else "none of them"
        )
        rule = f"- **Beside the linear rule**, right on {text.percent(linear_rule)}: "
        said.append(f"{rule}the cheapest point whose interval lies above it is {which}.")
    if not is_done:
        said.append("- Time ended this before all was trained; the same command with more minutes goes on.")
    return "\n".join(said)


def verdict(answer: Answer) -> str:
    """The verdict on a point beside its rival; where there is none, what the difference is at most."""
    if answer.verdict == evidence.SAME:
        return SAME
    bound = f"{evidence.UNDECIDED} (at most {text.most_points(answer)} points)"
    return answer.verdict if answer.decided or answer.verdict == evidence.NOT_TESTED else bound


def front_table(points: pd.DataFrame, answers: Mapping[str, Answer], pairs: Mapping[str, str]) -> str:
    """One row a point of the front: what it costs, its settings, and how it does beside its rival.

    pairs: {point of the front: its rival at equal cost}.
    """
    by_name, rows = points.set_index("name"), []
    for row in points[points["kind"] == FRONT].to_dict("records"):
        rival = by_name.loc[pairs[row["name"]]] if pairs[row["name"]] in by_name.index else None
        beside = UNKNOWN if rival is None else text.percent(text.interval(rival, "test_accuracy"))
        rows.append(
            [
                cost(row["cost"]),
                text.duration(row["seconds"]),
                row["name"],
                settings(row),
                text.percent(text.interval(row, "test_accuracy")),
                text.nats(text.interval(row, "test_ce")),
                beside,
                verdict(answers[row["name"]]),
            ]
        )
    heads = [
        "Cost",
        "Seconds a seed",
        "Point",
        "Settings",
        "Accuracy",
        "CE (nats)",
        "Published trial 2",
        "The point is",
    ]
    return text.table(heads, rows)


def changed_table(points: pd.DataFrame, runs: pd.DataFrame, pairs: Mapping[str, str]) -> str:
    """One row a changed point: its scores, and the difference from the point itself over the seeds that both have.

    runs: confirm.records. pairs: {changed point: the point itself}.
    """
    by_name, rows = points.set_index("name"), []
    scores = runs.pivot_table(index="seed", columns="name", values="test_accuracy")
    for row in points[points["kind"] == CHANGED].to_dict("records"):
        itself = pairs[row["name"]]
        if itself in by_name.index:
            both = scores[[row["name"], itself]].dropna()
            found = evidence.compare(both[row["name"]], both[itself], paired=True)
            rows.append(
                [
                    cost(row["cost"]),
                    row["name"],
                    text.commas(row["seeds"]),
                    *_scores(row),
                    text.percent(text.interval(by_name.loc[itself], "test_accuracy")),
                    text.signed_points((found.effect, found.low, found.high)),
                ]
            )
    heads = ["Cost", "Point", "Seeds", "Accuracy", "CE (nats)", "Looks at the true area", "Unchanged", "Difference"]
    return text.table(heads, rows)


def times_table(
    points: pd.DataFrame, runs: Mapping[float, Run], timed: Mapping[float, pd.DataFrame], task: Task
) -> str:
    """One row for each time that somebody may have: what to train, what to expect, and what timed runs of it gave.

    runs: {minutes: what fits into them}. timed: {minutes: frontier.timed}, of those that were run.
    """
    rows = []
    for minutes, run in runs.items():
        point = points[(points["name"] == run.role) & (points["n_steps"] == run.n_steps)]
        if len(point):
            expected, basis = text.interval(point.iloc[0], "test_accuracy"), text.count(point["seeds"].iloc[0], "seed")
        else:
            whole, price = law(points, "test_accuracy"), training_cost(run.hyperparameters, task, run.n_steps)
            wrong = whole.predict(price) if whole else (math.nan, math.nan, math.nan)
            expected, basis = tuple(1 - float(wrong[i]) for i in (0, 2, 1)), "by the law"
        said = ["not run", UNKNOWN]
        if minutes in timed:
            of, middle = timed[minutes], timed[minutes]["seconds"].median()
            ends = f"{text.duration(of['seconds'].min())} to {text.duration(of['seconds'].max())}"
            said = [
                f"{text.duration(middle)} ({ends}, n = {len(of)})",
                ", ".join(map(text.percent, of["test_accuracy"])),
            ]
        rows.append(
            [
                f"{minutes:g} min",
                f"{re.sub(r', [0-9]+ steps$', '', run.role)}, {text.commas(run.n_steps)} steps",
                f"{text.percent(expected)}, {basis}",
                *said,
            ]
        )
    return text.table(["You have", "Train", "Expect", "Timed", "Timed runs were right on"], rows)


def searched(space: Mapping[str, Any]) -> str:
    """The hyperparameters that were searched, with their levels or ranges."""
    rows = [
        [TABLE[name].label if name in TABLE else "Training steps", text.span(entry)] for name, entry in space.items()
    ]
    return text.table(["Searched", "Range"], rows)


def by_hand(given: Sequence[str], points: pd.DataFrame, longer: Sequence[str] = ()) -> str:
    """How many trials no sampler chose, which points of the front are among them, and which are trained for longer."""
    said = []
    if given:
        said.append(
            f"{text.count(len(given), 'trial')} had settings that were given by hand; the sampler chose the others."
        )
        shown = [name for name in points[points["kind"] == FRONT]["name"] if name in given]
        said += [f"Of the points above, {', '.join(shown)} are among them."] if shown else []
    if longer:
        said.append(f"Not from the search, but its dearest point above trained for longer: {'; '.join(longer)}.")
    return " ".join(said)


def law_sentences(points: pd.DataFrame) -> str:
    """How well the law of the cheaper half predicts the dearer half, and what it would cost to reach the GOALS."""
    said = []
    for score, label in SCORES.items():
        half, whole = law(points, score, cheaper_half=True), law(points, score)
        if half is None or whole is None:
            return "The front has too few points for a law: it needs six."
        front = errors(points[points["kind"] == FRONT], score).sort_values("cost")
        dear = front[half.n :]
        predicted, low, high = half.predict(dear["cost"])
        inside = int(((dear["error"] >= low) & (dear["error"] <= high)).sum())
        ratio = np.log(dear["error"] / predicted)
        mean = np.exp(ratio.mean())
        half_law, all_law = 2**half.slope, 2**whole.slope
        said.append(
            f"- **{text.capitalized(label)}**: each doubling of cost multiplies the error by {half_law:.2f} over the "
            f"{half.n} cheaper points, and by {all_law:.2f} over all points. Of the {len(dear)} dearer points {inside} "
            "lie in the 95 % interval that the cheaper half predicts for them. Their errors are on average "
            f"{mean:.2f} times the predicted ones, from {np.exp(ratio.min()):.2f} to {np.exp(ratio.max()):.2f} times."
        )
        goal = 1 - GOALS[score] if score == "test_accuracy" else GOALS[score]
        every = errors(frontier.ours(points), score)
        reached = every[every["error"] <= goal]
        aim = text.percent(GOALS[score]) + " right" if score == "test_accuracy" else f"{goal:g} nats"
        middle, low_cost, high_cost = whole.cost_for(goal)
        near = every.loc[every["error"].idxmin()]
        nearest = f"{1e2 - 1e2 * near['error']:.2f} %" if score == "test_accuracy" else f"{near['error']:.4f} nats"
        missed = f"The goal of {aim} is not reached; the nearest is {near['name'].split(':')[0]} with {nearest}."
        if len(reached):
            by = f"{reached['name'].iloc[0].split(':')[0]} for {cost(reached['cost'].iloc[0])} multiply-adds"
            said.append(f"    The goal of {aim} is reached by {by}, which is the cheapest to reach it.")
        elif math.isinf(middle):
            said.append(f"    {missed} By this law no cost reaches it.")
        else:
            ends = f"{cost(low_cost)} to " + (cost(high_cost) if math.isfinite(high_cost) else "no end")
            said.append(
                f"    {missed} By the law of the front as it was searched it would take {cost(middle)} multiply-adds "
                f"[{ends}], {middle / front['cost'].max():,.1f} times its dearest point."
            )
    return "\n".join(said)


def _scores(row: Mapping) -> list[str]:
    """Test accuracy, CE and the share that is routed to the true area, each with its interval."""
    share = text.interval(row, "route_accuracy")
    looks = UNKNOWN if math.isnan(share[0]) else text.percent(share)
    return [text.percent(text.interval(row, "test_accuracy")), text.nats(text.interval(row, "test_ce")), looks]


def inside(points: pd.DataFrame) -> str:
    """The share that is routed to the true area along the front, and one point of it without each part."""
    front, parts = points[points["kind"] == FRONT], points[points["kind"] == ""]
    known = front[front["route_accuracy"].notna()]
    said = []
    if len(known):
        first, last = known.iloc[0], known.iloc[-1]
        share = [text.percent(text.interval(row, "route_accuracy")) for row in (first, last)]
        said.append(
            f"The last layer looks at the true area in {share[0]} of samples at the cheapest point and in "
            f"{share[1]} at the dearest."
        )
    if len(parts):
        whole = front[front["name"] == parts["name"].iloc[0].split(":")[0]].iloc[0]
        rows = [["nothing", *_scores(whole)]]
        rows += [[text.PARTS[row["without"]], *_scores(row)] for row in parts.to_dict("records")]
        said.append(f"{text.capitalized(whole['name'])}, trained for as long without a part of the network:")
        said.append(text.table(["Left out", "Accuracy", "CE (nats)", "Looks at the true area"], rows))
    return "\n\n".join(said) if said else "Nothing is known of it."
