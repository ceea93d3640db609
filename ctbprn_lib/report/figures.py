"""Pictures: each function draws on the ax it is given and returns it; none computes.

Colours: Okabe and Ito's palette, which colour-blind readers can tell apart, its light ones darkened until their
contrast with white is at least 3.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator
from numpy.typing import ArrayLike

from ctbprn_lib import evidence, files, search, workers
from ctbprn_lib.report.text import Interval
from ctbprn_lib.search import PLACEBO
from ctbprn_lib.train import TABLE

BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY = (
    "#0072B2", "#B87C00", "#009473", "#D55E00", "#B8649A", "#2A8FC8", "#777777",
)  # fmt: skip
CYCLE = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY)
FOREST = {
    evidence.BETTER: (GREEN, evidence.BETTER),
    evidence.WORSE: (RED, evidence.WORSE),
    evidence.SAME: (BLUE, evidence.SAME),
    evidence.AT_MOST: (PURPLE, "bounded without a verdict"),
    evidence.UNDECIDED: (GREY, evidence.UNDECIDED),
}
Point = tuple[float, float]
LABELS = {
    **{name: entry.axis for name, entry in TABLE.items()},
    "n_steps": "length of training (steps)",
    "batch_size, equal samples": "batch size at equal samples",
    "val_ce": "validation CE (nats)",
    "val_accuracy": "validation accuracy (%)",
    "test_accuracy": "test accuracy (%)",
    "train_ce": "training CE (nats)",
    "route_accuracy": "routed to the true area (%)",
    "train_seconds": "training time of the trial (s)",
    "peak_mem_mib": "peak memory of the trial (MiB)",
}
STYLE: dict[Any, Any] = {
    "figure.dpi": 100,
    "savefig.dpi": 150,
    "figure.constrained_layout.use": True,
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.fonttype": "none",  # text stays text
}
mpl.rcdefaults()  # pictures are the same whatever the user's own matplotlibrc says
mpl.rcParams.update(STYLE)
POINTS: dict[str, Any] = {"fmt": "o", "ms": 5, "lw": 1}  # of an errorbar
TRIAL = "trial: mean and 95 % interval over replicas"  # what a point and its bars are
FEW = 6  # trials, of which each has its number beside it
LONGEST_NAME = 30  # characters of a name from outside that a picture has room for


def name_points(points: Line2D, names: Sequence[str]) -> None:
    """Give each point of a line a name, which a page shows when the mouse rests on the point.

    The names travel as the gid of the line, where SVG has an id (see publish.svg_of).
    """
    points.set_gid(json.dumps(list(names)))


def scatter(
    ax: Axes, trials: pd.DataFrame, x: str, y: str, color: str = BLUE, label: str | None = None, annotate: bool = True
) -> Axes:
    """One point a trial with its interval over replicas, where the columns <name>_low and <name>_high hold one."""
    xs, ys = _scaled(trials, x), _scaled(trials, y)
    bars = ax.errorbar(xs, ys, xerr=_bars(trials, x), yerr=_bars(trials, y), color=color, label=label, **POINTS)
    name_points(bars.lines[0], trial_names(trials))
    ax.set(xlabel=LABELS[x], ylabel=LABELS[y])
    if x == "lr":
        ax.set_xscale("log")
        _plain_numbers(ax.xaxis)
    if annotate:
        _numbers(ax, trials, x, y)
    if label:
        ax.legend()
    return ax


def configurations(
    ax: Axes,
    scores: Mapping[str, ArrayLike],
    intervals: Mapping[str, tuple[float, float, float]],
    references: Mapping[str, float],
) -> Axes:
    """One row a configuration, the first on top: a dot for each seed, and above them the mean with its interval.

    scores: {configuration: (seeds,)} test accuracies. intervals: {configuration: (mean, low, high)}. references:
    {label: accuracy}, drawn as vertical lines.
    """
    rows = range(0, -len(scores), -1)
    for row, (name, values) in zip(rows, scores.items(), strict=True):
        seeds = 100 * np.asarray(values, dtype=float)
        spread = 0.12 * np.sin(2.4 * np.arange(len(seeds)))  # so that equal scores do not cover each other
        (dots,) = ax.plot(seeds, row - 0.12 + spread, "o", ms=3.5, alpha=0.8, mew=0, color=BLUE)
        name_points(dots, [f"{name}, seed {n}: {score:.2f} %" for n, score in enumerate(seeds, 1)])
        mean, low, high = 100 * np.array(intervals[name])
        bar = ax.errorbar([mean], [row + 0.22], xerr=[[mean - low], [high - mean]], color=RED, **POINTS)
        name_points(bar.lines[0], [f"{name}: {mean:.1f} % [{low:.1f}, {high:.1f}]"])
    for (label, value), style in zip(references.items(), ("--", ":", "-."), strict=False):
        ax.axvline(100 * value, color=GREY, ls=style, label=f"{label} {100 * value:.1f} %")
    ax.set_yticks(rows, list(scores))
    ax.set(xlabel=LABELS["test_accuracy"], ylim=(0.6 - len(scores), 0.6))
    ax.grid(axis="y", visible=False)
    ax.legend(loc="lower center", bbox_to_anchor=(0.4, 1), ncols=3)
    return ax


def learning_curves(
    ax: Axes,
    steps: Sequence[int],
    curves: Mapping[str, ArrayLike],
    name: str,
    references: Mapping[str, float] | None = None,
) -> Axes:
    """curves {label: (evaluations, R)}: the mean over replicas and a band from the lowest to the highest replica.

    references {label: value}: horizontal lines in the units of the curves.
    """
    scale = _scale(name)
    for (label, values), color in zip(curves.items(), CYCLE, strict=False):
        values = scale * np.ma.masked_invalid(np.asarray(values, dtype=float))  # replicas that have diverged
        ax.plot(steps, values.mean(1), "o-", ms=4, color=color, label=label)
        ax.fill_between(steps, values.min(1), values.max(1), color=color, alpha=0.2, lw=0)
    for (label, value), style in zip((references or {}).items(), ("--", ":", "-."), strict=False):
        ax.axhline(scale * value, color=GREY, ls=style, label=f"{label} {scale * value:.1f}")
    ax.set(xlabel="training step", ylabel=LABELS[name])
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return ax


def history(ax: Axes, trials: pd.DataFrame, score: str, best: np.ndarray) -> Axes:
    """Every trial's score with its interval in the order they ran, and the running best (an array, one a trial)."""
    for state, color in (("complete", BLUE), ("pruned", ORANGE)):
        part = trials[trials["state"] == state]
        if len(part):
            bars = ax.errorbar(
                part["trial"], _scaled(part, score), _bars(part, score), color=color, label=state, **POINTS
            )
            name_points(bars.lines[0], trial_names(part))
    ax.step(trials["trial"], _scale(score) * best, where="post", color=GREEN, label="best so far")
    ax.set(xlabel="trial", ylabel=LABELS[score])
    ax.xaxis.set_major_locator(_whole_numbers())
    ax.legend()
    return ax


def trial_names(trials: pd.DataFrame) -> list[str]:
    """What a page says of each trial when the mouse rests on its point: number, settings and scores."""
    names = []
    for row in trials.to_dict("records"):
        shown = {"accuracy": ("val_accuracy", "{:.1%}"), "CE": ("val_ce", "{:.3f}")}
        scores = [f"{label} {form.format(row[name])}" for label, (name, form) in shown.items() if name in row]
        settings = [f"{name} {TABLE[name].text(row[name])}" for name in TABLE if name in row and row[name] == row[name]]
        names.append(f"trial {row['trial']}: {', '.join(scores + settings)}")
    return names


def history_of(study: workers.Study) -> Figure:
    """The picture of a search that is under way: see history. It shows nothing while there is no finished trial."""
    fig = Figure(figsize=(7, 3.2))
    ax = fig.subplots()
    accuracy = study.user_attrs["fingerprint"]["objective"] == "val_accuracy"
    score = "val_accuracy" if accuracy else "val_ce"
    ax.set(xlabel="trial", ylabel=LABELS[score])
    if any(trial.state in workers.FINISHED for trial in study.get_trials(deepcopy=False)):
        trials = search.records(study)
        so_far = trials[score].where(trials["state"] == "complete")
        history(ax, trials, score, (so_far.cummax() if accuracy else so_far.cummin()).ffill().to_numpy())
    return fig


def slice_of(ax: Axes, trials: pd.DataFrame, name: str, score: str, levels: Sequence[float] | None = None) -> Axes:
    """Score against one hyperparameter; levels: values to mark where it has a few."""
    scatter(ax, trials, name, score, annotate=False)
    if levels is not None:
        ax.set_xticks(levels, [str(level) for level in levels])
        margin = 0.2 * np.ptp(levels) + 1e-9
        ax.set_xlim(min(levels) - margin, max(levels) + margin)
    return ax


def importance(ax: Axes, table: pd.DataFrame) -> Axes:
    """Shares of evidence.importance as bars with intervals; the placebo is grey, and pale what does not beat it."""
    table = table.iloc[::-1]
    beats = zip(table["name"], table["beats_placebo"], strict=True)
    colors = [GREY if name == PLACEBO else BLUE if better else SKY for name, better in beats]
    bars = 100 * np.abs([table["importance"] - table["low"], table["high"] - table["importance"]]).astype(float)
    names = [LABELS.get(n, n).split(" (")[0] for n in table["name"]]
    ax.barh(names, 100 * table["importance"].astype(float), xerr=bars, color=colors, ecolor="black", capsize=3)
    ax.set(xlabel="share of the importance (%)")
    ax.grid(axis="y", visible=False)
    return ax


def ablation(ax: Axes, panel: pd.DataFrame, own: float, factor: str) -> Axes:
    """Accuracy of each level with its interval (mean, low, high, indexed by level), and a ring around the level own."""
    at = np.arange(len(panel))
    bars = 100 * np.array([panel["mean"] - panel["low"], panel["high"] - panel["mean"]])
    ax.errorbar(at, 100 * panel["mean"], bars, color=BLUE, **POINTS)
    ax.plot(panel.index.get_loc(own), 100 * panel.loc[own, "mean"], "o", ms=11, mfc="none", mec=RED, mew=2)
    names = [f"{level:.3g}" if level < 1000 else f"{level:,.0f}" for level in panel.index]
    ax.set_xticks(at, names, rotation=45 if len(panel) > 5 else 0)
    ax.set(xlabel=LABELS[factor], xlim=(-0.5, len(panel) - 0.5))
    return ax


def forest(ax: Axes, effects: pd.DataFrame, margin: float) -> Axes:
    """Effects on accuracy with their intervals, one below the other, and the band from -margin to margin.

    effects: a row each with group, label, effect, low, high and verdict, which colours it. A line divides the groups.
    """
    at = -np.arange(len(effects))
    ax.axvspan(-100 * margin, 100 * margin, color=GREY, alpha=0.15, lw=0)
    ax.axvline(0, color=GREY, lw=1)
    for verdict, (color, label) in FOREST.items():
        rows = (effects["verdict"] == verdict).to_numpy()
        part = effects[rows]
        bars = 100 * np.array([part["effect"] - part["low"], part["high"] - part["effect"]])
        if len(part):
            drawn = ax.errorbar(100 * part["effect"], at[rows], xerr=bars, color=color, label=label, **POINTS)
            shown = zip(
                part["label"], part["verdict"], *(100 * part[c] for c in ("effect", "low", "high")), strict=True
            )
            name_points(
                drawn.lines[0], [f"{n}: {e:+.1f} [{low:+.1f}, {high:+.1f}], {v}" for n, v, e, low, high in shown]
            )
    for place, (before, group) in enumerate(itertools.pairwise(effects["group"])):
        if before != group:
            ax.axhline(-place - 0.5, color=GREY, lw=0.6)
    ax.set_yticks(at, list(effects["label"]))
    ax.set(xlabel="change of the test accuracy (points)", ylim=(0.5 - len(effects), 0.5))
    ax.grid(axis="y", visible=False)
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)
    return ax


def accuracy_and_routing(ax: Axes, runs: pd.DataFrame, threshold: float) -> Axes:
    """Test accuracy of every seed against the share that it routes to the true area; a line at threshold.

    runs: a row for each seed, with route_accuracy, test_accuracy and group, which colours it.
    """
    for (label, part), color in zip(runs.groupby("group", sort=False), CYCLE, strict=False):
        xs, ys = _scaled(part, "route_accuracy"), _scaled(part, "test_accuracy")
        ax.plot(xs, ys, "o", ms=4, alpha=0.8, color=color, label=label)
    ax.axvline(100 * threshold, color=GREY, ls="--", label="has learnt to route")
    ax.set(xlabel=LABELS["route_accuracy"], ylabel=LABELS["test_accuracy"])
    ax.legend()
    return ax


def parallel_coordinates(ax: Axes, trials: pd.DataFrame, names: list[str], score: str) -> Axes:
    """One line a trial over the hyperparameters in names, each axis from its lowest to its highest value.

    lr is on a logarithmic axis; the colour is the rank by the score (1 is best), and good trials are drawn last.
    """
    values = trials[names].astype(float).to_numpy()
    positions = np.where(np.array(names) == "lr", np.log10(np.maximum(values, 1e-300)), values)
    low, high = positions.min(0), positions.max(0)
    positions = np.where(high > low, (positions - low) / np.where(high > low, high - low, 1), 0.5)
    order = trials[score].rank(method="first", ascending=not score.endswith("accuracy")).to_numpy()
    colors = mpl.cm.ScalarMappable(mpl.colors.Normalize(1, max(len(trials), 2)), "cividis")
    for i in np.argsort(-order):
        ax.plot(range(len(names)), positions[i], color=colors.to_rgba(order[i]), lw=1.5, alpha=0.85)
    for ends, at, side, shift in ((values.min(0), 0, "top", -4), (values.max(0), 1, "bottom", 4)):
        for k, end in enumerate(ends):
            text = f"{end:.2g}" if end < 10 else f"{end:.0f}"
            ax.annotate(text, (k, at), (0, shift), textcoords="offset points", ha="center", va=side, fontsize=9)
    ax.set_xticks(range(len(names)), [LABELS[n].split(" (")[0].replace(" ", "\n", 1) for n in names])
    ax.tick_params(axis="x", pad=16, length=0)
    ax.set(yticks=[], xlim=(-0.4, len(names) - 0.6), ylim=(-0.02, 1.1))
    ax.spines["left"].set_visible(False)
    ax.spines["bottom"].set_visible(False)
    bar = ax.figure.colorbar(colors, ax=ax, label=f"rank by {LABELS[score].split(' (')[0]}, 1 is best")
    bar.ax.yaxis.set_major_locator(_whole_numbers())
    bar.ax.invert_yaxis()
    return ax


def cost_and_accuracy(ax: Axes, trials: pd.DataFrame, front: np.ndarray, cost: str = "train_seconds") -> Axes:
    """Accuracy against a cost column; front (n,) True marks the trials no other beats in both."""
    best = trials[front].sort_values(cost)
    scatter(ax, trials[~front], cost, "val_accuracy", SKY, "beaten in both", annotate=False)
    scatter(ax, best, cost, "val_accuracy", RED, "Pareto front")
    ax.step(best[cost], 100 * best["val_accuracy"], where="post", color=RED, lw=1)
    ax.set_xscale("log")
    _plain_numbers(ax.xaxis)
    ax.legend(loc="lower right")
    return ax


def error_and_cost(
    ax: Axes,
    curves: Mapping[str, pd.DataFrame],
    references: Mapping[str, float],
    line: pd.DataFrame | None = None,
    scale: float = 1,
) -> Axes:
    """Errors against cost, both logarithmic: {label: a row a configuration with cost, error, low, high and name}.

    references: {label: error}, a dashed line each. line: a law with its band (cost, error, low, high). scale: what
    errors are multiplied by.
    """
    for (label, part), color, marker in zip(curves.items(), CYCLE, "os^", strict=False):
        ends = scale * np.clip([part["error"] - part["low"], part["high"] - part["error"]], 0, None)
        bars = ax.errorbar(
            part["cost"], scale * part["error"], ends, color=color, label=label, **(POINTS | {"fmt": f"{marker}-"})
        )
        name_points(bars.lines[0], list(part["name"]))
    for (label, error), color in zip(references.items(), (GREY, PURPLE), strict=False):
        ax.axhline(scale * error, color=color, ls="--", lw=1, label=label)
    if line is not None:
        ax.plot(line["cost"], scale * line["error"], color=GREY, lw=1, label="law of the cheaper half")
        ax.fill_between(line["cost"], scale * line["low"], scale * line["high"], color=GREY, alpha=0.15, lw=0)
    ax.set(xscale="log", yscale="log", xlabel="cost of a training (multiply-adds)")
    _plain_numbers(ax.yaxis)
    ax.legend()
    return ax


def beside(ax: Axes, differences: Mapping[str, Mapping[str, Interval]], best: Mapping[str, str]) -> Axes:
    """A row a data set, the first on top: the difference from its best other method, with its interval and name.

    differences: {data set: {method: (effect, low, high)}}, as shares. best: {data set: method}. Other methods are grey.
    """
    sets = [data for data in differences if best[data] in differences[data]]
    for at, data in enumerate(sets):
        others = [100 * effect for method, (effect, _, _) in differences[data].items() if method != best[data]]
        ax.plot(others, [-at] * len(others), "|", color=GREY, ms=9, label="another method" if at == 0 else None)
        effect, low, high = (100 * x for x in differences[data][best[data]])
        label = "the best other method" if at == 0 else None
        ax.errorbar(effect, -at, xerr=[[effect - low], [high - effect]], fmt="o", color=BLUE, capsize=3, label=label)
        ax.annotate(best[data], (effect, -at), (0, 5), textcoords="offset points", ha="center", fontsize="x-small")
    ax.axvline(0, color="black", lw=1)
    ax.set_yticks([-at for at in range(len(sets))], sets)
    ax.set(xlabel="points by which CTBPRN is more accurate", ylim=(0.4 - len(sets), 0.8))
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
    return ax


def routing(
    ax: Axes, shares: ArrayLike, row_names: Sequence[str], area_names: Sequence[str], title: str, ylabel: str
) -> Axes:
    """shares (rows,K): of the samples of a row (a true area or a class), how many per cent look at which area."""
    ax.imshow(100 * np.asarray(shares), vmin=0, vmax=100, cmap="cividis")
    for (i, j), share in np.ndenumerate(np.asarray(shares)):
        ax.text(j, i, f"{100 * share:.0f} %", ha="center", va="center", color="white" if share < 0.55 else "black")
    for set_ticks, names in ((ax.set_xticks, area_names), (ax.set_yticks, row_names)):
        printable = [files.printable(name) for name in names]
        shown = [name if len(name) <= LONGEST_NAME else name[:LONGEST_NAME] + "…" for name in printable]
        set_ticks(range(len(names)), shown, parse_math=False)
    ax.set(xlabel="area the router looks at", ylabel=ylabel, title=title)
    ax.grid(visible=False)
    return ax


def layer(ax: Axes, K: int) -> Axes:
    """A drawing of one layer with K areas: what flows where, in the symbols of the equations."""
    ax.set(xlim=(0, 10.4), ylim=(0, 6.2))
    ax.axis("off")

    def box(x: float, y: float, w: float, h: float, text: str, color: str) -> None:
        shape = mpl.patches.FancyBboxPatch((x, y), w, h, "round,pad=0.05", fc=color, ec="black", alpha=0.3)
        ax.add_patch(shape)
        ax.text(x + w / 2, y + h / 2, text, ha="center", va="center", fontsize=10)

    def arrow(start: Point, end: Point, label: str = "", at: Point = (0, 0), bend: float = 0.0) -> None:
        ax.annotate("", end, start, arrowprops={"arrowstyle": "->", "connectionstyle": f"arc3,rad={bend}", "lw": 1.4})
        x, y = np.mean([start, end], axis=0) + at
        ax.text(x, y, label, fontsize=9, ha="center")

    box(0.2, 1.0, 1.5, 1.4, f"areas\n$X_1 … X_{K}$", SKY)
    box(2.7, 4.2, 2.6, 1.4, "basal-ganglia controller\n$\\ell$ from the means $m_k$", ORANGE)
    box(5.9, 2.6, 2.2, 1.2, "thalamic router\n$M=\\sum_k\\alpha_k X_kV_kU_k^\\top$", GREEN)
    box(5.9, 0.3, 2.2, 1.3, "column of each area\nbasal $b$, apical $a$", PURPLE)
    box(9.0, 0.3, 1.2, 1.3, f"new\n$X_1 … X_{K}$", SKY)
    arrow((1.0, 2.5), (2.6, 4.9), "mean\nover tokens", (-1.05, 0.55), -0.2)
    arrow((5.4, 4.9), (7.0, 3.9), "gate $\\alpha$ = softmax$((\\ell+g)/\\tau)$", (1.35, 0.25), -0.2)
    arrow((1.8, 2.0), (5.8, 3.1), "every area", (-0.2, 0.2))
    arrow((7.0, 2.5), (7.0, 1.7), "one message $M$ for all", (1.45, -0.1))
    arrow((1.8, 1.3), (5.8, 0.9), "own $X_k$", (0, 0.12))
    arrow((8.2, 0.95), (8.9, 0.95))
    return ax


def histogram(ax: Axes, groups: Mapping[str, ArrayLike], mark: float, mark_label: str, scale: float = 100) -> Axes:
    """Shares of values {label: (n,)} (times scale) in bins between them, and a line at mark."""
    everything = scale * np.concatenate([np.asarray(v) for v in groups.values()])
    distinct = np.unique(everything.round(6))
    width = np.diff(distinct).min() if 1 < len(distinct) <= 40 else np.ptp(everything) / 30 or 1
    bins = np.arange(everything.min() - width / 2, everything.max() + width, width)
    for (label, group), color in zip(groups.items(), CYCLE, strict=False):
        values = np.asarray(group)
        weights = np.full(len(values), 100 / len(values))
        ax.hist(scale * values, bins.tolist(), weights=weights, color=color, alpha=0.6, label=label)
    ax.axvline((scale if mark <= 1 and scale > 1 else 1) * mark, color=RED, lw=2, label=mark_label)
    ax.legend()
    return ax


def tuning_and_confirmed(ax: Axes, gaps: pd.DataFrame) -> Axes:
    """Test accuracy of each confirmed trial against its tuning score, with intervals, and the line of equal scores."""
    scatter(ax, gaps, "val_accuracy", "test_accuracy")
    at = 100 * gaps["test_accuracy"].mean()
    ax.axline((at, at), slope=1, ls="--", color=GREY, label="equal")
    ax.set(xlabel="accuracy while tuning (%)", ylabel="confirmed: accuracy on the test set, fresh seeds (%)")
    ax.legend()
    return ax


def against(ax: Axes, x: ArrayLike, y: ArrayLike, log: bool = False) -> Axes:
    """One point a pair, and the line on which both are equal."""
    ax.plot(x, y, "o", color=BLUE, alpha=0.7)
    ends = [min(np.min(x), np.min(y)), max(np.max(x), np.max(y))]
    ax.plot(ends, ends, "--", color=GREY, label="equal")
    if log:
        ax.set(xscale="log", yscale="log")
    ax.legend()
    return ax


def power(ax: Axes, sizes: Sequence[float], shares: ArrayLike) -> Axes:
    """Share of reports that find an effect of each size (points); shares (sizes, 3): share, low, high."""
    share, low, high = 100 * np.asarray(shares).T
    bars = np.clip([share - low, high - share], 0, None)
    ax.errorbar(sizes, share, bars, color=BLUE, **(POINTS | {"fmt": "o-"}))
    ax.axhline(80, color=GREY, ls="--", label="80 %")
    ax.set(xlabel="true effect (accuracy points)", ylabel="reports that find it (%)", ylim=(-3, 103))
    ax.legend()
    return ax


def growth(ax: Axes, sizes: Sequence[float], throughput: Sequence[float], memory: Sequence[float], label: str) -> Axes:
    """Replica-steps a second against a size, both logarithmic; beside each point its peak memory in MiB."""
    ax.loglog(sizes, throughput, "o-", ms=5, lw=1, color=BLUE)
    beside = (5, -11 if throughput[-1] > throughput[0] else 5)  # points: away from the line
    for x, y, mib in zip(sizes, throughput, memory, strict=True):
        ax.annotate(f"{mib:,.0f} MiB", (x, y), beside, textcoords="offset points", fontsize=7, color=GREY)
    ax.set_xticks(sizes, [f"{x:g}" for x in sizes])
    ax.xaxis.set_minor_locator(NullLocator())
    _plain_numbers(ax.yaxis)
    ax.yaxis.set_major_formatter("{x:,.0f}")
    ax.set(xlabel=label, ylabel="replica-steps a second", xlim=(sizes[0] / 1.3, sizes[-1] * 2))
    ax.set_ylim(min(throughput) / 2, max(throughput) * 2)
    return ax


def _plain_numbers(axis: Axis) -> None:
    """Plain numbers on a logarithmic axis."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _whole_numbers() -> MaxNLocator:
    return MaxNLocator("auto", integer=True, steps=[1, 2, 2.5, 5, 10])


def _numbers(ax: Axes, trials: pd.DataFrame, x: str, y: str) -> None:
    """The number of each trial beside its point; of many trials only the three best by y, at the end of a line."""
    few = len(trials) <= FEW
    best = trials.sort_values(y, ascending=not y.endswith("accuracy"))[: None if few else 3]
    best = best.sort_values(y, ascending=False)  # labels one below the other, so that their lines do not cross
    points = np.column_stack([_scaled(best, x), _scaled(best, y)])
    line = None if few else {"arrowstyle": "-", "color": GREY, "lw": 0.8}
    box = {"fc": "white", "ec": "none", "alpha": 0.8, "pad": 0.5}
    for place, (number, point) in enumerate(zip(best["trial"], points, strict=True)):
        offset = (9, -9 if place % 2 else 9) if few else (40, 16 * (1 - place))  # points
        ax.annotate(str(number), point, offset, textcoords="offset points", fontsize=9, va="center", zorder=5,
                    arrowprops=line, bbox=box)  # fmt: skip


def _scale(name: str) -> int:
    """What a score is multiplied by in a picture: shares are shown in per cent."""
    return 100 if name.endswith("accuracy") else 1


def _scaled(trials: pd.DataFrame, name: str) -> np.ndarray:
    return _scale(name) * trials[name].to_numpy(float)


def _bars(trials: pd.DataFrame, name: str) -> np.ndarray | None:
    if f"{name}_low" not in trials:
        return None
    low, high = (_scale(name) * trials[f"{name}_{end}"].to_numpy(float) for end in ("low", "high"))
    middle = _scaled(trials, name)
    return np.clip(np.nan_to_num([middle - low, high - middle]), 0, None)
