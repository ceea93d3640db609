"""Pictures: each function draws on the ax it is given and returns it; none computes.

Colours: Okabe and Ito's palette, which colour-blind readers can tell apart.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator, StrMethodFormatter
from numpy.typing import ArrayLike

from ctbprn_lib import files
from ctbprn_lib.search import PLACEBO
from ctbprn_lib.train import TABLE

BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#777777",
)  # fmt: skip
CYCLE = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY)
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
}
mpl.rcdefaults()  # pictures are the same whatever the user's own matplotlibrc says
mpl.rcParams.update(STYLE)
FEW = 6  # trials, of which each has its number beside it
LONGEST_NAME = 30  # characters of a name from outside that a picture has room for


def scatter(
    ax: Axes, trials: pd.DataFrame, x: str, y: str, color: str = BLUE, label: str | None = None, annotate: bool = True
) -> Axes:
    """One point a trial with its interval over replicas, where the columns <name>_low and <name>_high hold one."""
    xs, ys = _scaled(trials, x), _scaled(trials, y)
    ax.errorbar(xs, ys, xerr=_bars(trials, x), yerr=_bars(trials, y), fmt="o", ms=5, lw=1, color=color, label=label)
    ax.set(xlabel=LABELS[x], ylabel=LABELS[y])
    if x == "lr":
        _log_axis(ax)
    if annotate:
        _numbers(ax, trials, x, y)
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
    scale = 100 if name.endswith("accuracy") else 1
    for (label, values), color in zip(curves.items(), CYCLE, strict=False):
        values = scale * np.ma.masked_invalid(np.asarray(values, dtype=float))  # replicas that have diverged
        ax.plot(steps, values.mean(1), "o-", ms=4, color=color, label=label)
        ax.fill_between(steps, values.min(1), values.max(1), color=color, alpha=0.2, lw=0)
    for (label, value), style in zip((references or {}).items(), ("--", ":", "-."), strict=False):
        ax.axhline(scale * value, color=GREY, ls=style, label=f"{label} {scale * value:.1f}")
    ax.set(xlabel="training step", ylabel=LABELS[name])
    ax.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    return ax


def history(ax: Axes, trials: pd.DataFrame, score: str, best: np.ndarray) -> Axes:
    """Every trial's score with its interval in the order they ran, and the running best (an array, one a trial)."""
    for state, color in (("complete", BLUE), ("pruned", ORANGE)):
        part = trials[trials["state"] == state]
        if len(part):
            ax.errorbar(part["trial"], _scaled(part, score), yerr=_bars(part, score), fmt="o", ms=5, lw=1,
                        color=color, label=state)  # fmt: skip
    ax.step(
        trials["trial"],
        best * (100 if score.endswith("accuracy") else 1),
        where="post",
        color=GREEN,
        label="best so far",
    )
    ax.set(xlabel="trial", ylabel=LABELS[score])
    ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 2.5, 5, 10]))
    ax.legend(fontsize=9)
    return ax


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
    """Accuracy of each level (DataFrame of mean, low, high, indexed by level) with its interval; a ring around the level own."""
    at = np.arange(len(panel))
    bars = 100 * np.array([panel["mean"] - panel["low"], panel["high"] - panel["mean"]])
    ax.errorbar(at, 100 * panel["mean"], yerr=bars, fmt="o", ms=5, lw=1, color=BLUE)
    at_own = panel.index.to_numpy() == own
    ax.plot(at[at_own], 100 * panel["mean"].to_numpy()[at_own], "o", ms=11, mfc="none", mec=RED, mew=2)
    ax.set_xticks(
        at,
        [f"{level:.3g}" if level < 1000 else f"{level:,.0f}" for level in panel.index],
        rotation=45 if len(panel) > 5 else 0,
    )
    ax.set(xlabel=LABELS[factor], xlim=(-0.5, len(panel) - 0.5))
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
    for k, _name in enumerate(names):
        for edge, at, up in ((values[:, k].min(), 0, "top"), (values[:, k].max(), 1, "bottom")):
            ax.annotate(f"{edge:.2g}" if edge < 10 else f"{edge:.0f}", (k, at), xytext=(0, 4 if at else -4),
                        textcoords="offset points", ha="center", va=up, fontsize=9)  # fmt: skip
    ax.set_xticks(range(len(names)), [LABELS[n].split(" (")[0].replace(" ", "\n", 1) for n in names])
    ax.tick_params(axis="x", pad=16, length=0)
    ax.set(yticks=[], xlim=(-0.4, len(names) - 0.6), ylim=(-0.02, 1.1))
    ax.spines["left"].set_visible(False)
    ax.spines["bottom"].set_visible(False)
    bar = ax.figure.colorbar(colors, ax=ax, label=f"rank by {LABELS[score].split(' (')[0]}, 1 is best")
    bar.ax.yaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 2.5, 5, 10]))
    bar.ax.invert_yaxis()
    return ax


def cost_and_accuracy(ax: Axes, trials: pd.DataFrame, front: np.ndarray, cost: str = "train_seconds") -> Axes:
    """Accuracy against a cost column; front (n,) True marks the trials no other beats in both."""
    scatter(ax, trials[~front], cost, "val_accuracy", SKY, "beaten in both", annotate=False)
    best = trials[front].sort_values(cost)
    scatter(ax, best, cost, "val_accuracy", RED, "Pareto front", annotate=False)
    ax.step(best[cost], 100 * best["val_accuracy"], where="post", color=RED, lw=1)
    _log_axis(ax)
    _numbers(ax, best, cost, "val_accuracy")
    ax.legend(fontsize=9, loc="lower right")
    return ax


def routing(
    ax: Axes, shares: ArrayLike, row_names: Sequence[str], area_names: Sequence[str], title: str, ylabel: str
) -> Axes:
    """shares (rows,K): of the samples of a row (a true area or a class), how many per cent look at which area."""
    ax.imshow(100 * np.asarray(shares), vmin=0, vmax=100, cmap="cividis")
    for (i, j), share in np.ndenumerate(np.asarray(shares)):
        ax.text(j, i, f"{100 * share:.0f} %", ha="center", va="center", color="white" if share < 0.55 else "black")
    for set_ticks, names in ((ax.set_xticks, area_names), (ax.set_yticks, row_names)):
        shown = [
            name if len(name) <= LONGEST_NAME else name[:LONGEST_NAME] + "…" for name in map(files.printable, names)
        ]
        set_ticks(range(len(names)), shown, parse_math=False)
    ax.set(xlabel="area the router looks at", ylabel=ylabel, title=title)
    ax.grid(visible=False)
    return ax


def layer(ax: Axes, K: int) -> Axes:
    """A drawing of one layer with K areas: what flows where, in the symbols of the equations."""
    ax.set(xlim=(0, 10.4), ylim=(0, 6.2))
    ax.axis("off")

    def box(x: float, y: float, w: float, h: float, text: str, color: str) -> None:
        ax.add_patch(
            mpl.patches.FancyBboxPatch((x, y), w, h, boxstyle="round,pad=0.05", fc=color, ec="black", alpha=0.3)
        )
        ax.text(x + w / 2, y + h / 2, text, ha="center", va="center", fontsize=10)

    def arrow(
        start: tuple[float, float],
        end: tuple[float, float],
        label: str = "",
        at: tuple[float, float] = (0, 0),
        bend: float = 0.0,
    ) -> None:
        ax.annotate("", end, start, arrowprops={"arrowstyle": "->", "connectionstyle": f"arc3,rad={bend}", "lw": 1.4})
        ax.text((start[0] + end[0]) / 2 + at[0], (start[1] + end[1]) / 2 + at[1], label, fontsize=9, ha="center")

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
    ax.legend(fontsize=9)
    return ax


def tuning_and_confirmed(ax: Axes, gaps: pd.DataFrame) -> Axes:
    """Test accuracy of each confirmed trial against its tuning score, with intervals, and the line of equal scores."""
    scatter(ax, gaps, "val_accuracy", "test_accuracy")
    at = 100 * gaps["test_accuracy"].mean()
    ax.axline((at, at), slope=1, ls="--", color=GREY, label="equal")
    ax.set(xlabel="accuracy while tuning (%)", ylabel="confirmed: accuracy on the test set, fresh seeds (%)")
    ax.legend(fontsize=9)
    return ax


def against(ax: Axes, x: ArrayLike, y: ArrayLike, log: bool = False) -> Axes:
    """One point a pair, and the line on which both are equal."""
    ax.plot(x, y, "o", color=BLUE, alpha=0.7)
    ends = [min(np.min(x), np.min(y)), max(np.max(x), np.max(y))]
    ax.plot(ends, ends, "--", color=GREY, label="equal")
    if log:
        ax.set(xscale="log", yscale="log")
    ax.legend(fontsize=9)
    return ax


def power(ax: Axes, sizes: Sequence[float], shares: ArrayLike) -> Axes:
    """Share of reports that find an effect of each size (points); shares (sizes, 3): share, low, high."""
    share, low, high = 100 * np.asarray(shares).T
    ax.errorbar(sizes, share, yerr=np.clip([share - low, high - share], 0, None), fmt="o-", ms=5, lw=1, color=BLUE)
    ax.axhline(80, color=GREY, ls="--", label="80 %")
    ax.set(xlabel="true effect (accuracy points)", ylabel="reports that find it (%)", ylim=(-3, 103))
    ax.legend(fontsize=9)
    return ax


def growth(ax: Axes, sizes: Sequence[float], throughput: Sequence[float], memory: Sequence[float], label: str) -> Axes:
    """Replica-steps a second against a size, both logarithmic; beside each point its peak memory in MiB."""
    ax.loglog(sizes, throughput, "o-", ms=5, lw=1, color=BLUE)
    beside = (5, -11 if throughput[-1] > throughput[0] else 5)  # points: away from the line
    for x, y, mib in zip(sizes, throughput, memory, strict=True):
        ax.annotate(f"{mib:,.0f} MiB", (x, y), beside, textcoords="offset points", fontsize=7, color=GREY)
    ax.set_xticks(sizes, [f"{x:g}" for x in sizes])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set(xlabel=label, ylabel="replica-steps a second", xlim=(sizes[0] / 1.3, sizes[-1] * 2))
    ax.set_ylim(min(throughput) / 2, max(throughput) * 2)
    return ax


def legend_of_states(ax: Axes) -> Axes:
    """A legend that says what points and bars are."""
    label = "trial: mean and 95 % interval over replicas"
    ax.legend(handles=[Line2D([], [], marker="o", ls="-", color=BLUE, label=label)], fontsize=9)
    return ax


def _log_axis(ax: Axes) -> None:
    """A logarithmic x axis with plain numbers."""
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda x, _: f"{x:g}"))
    ax.xaxis.set_minor_formatter(mpl.ticker.NullFormatter())


def _numbers(ax: Axes, trials: pd.DataFrame, x: str, y: str) -> None:
    """The number of each trial beside its point; of many trials only the three best by y, at the end of a line."""
    few = len(trials) <= FEW
    best = trials.sort_values(y, ascending=not y.endswith("accuracy"))[: None if few else 3]
    best = best.sort_values(y, ascending=False)  # labels one below the other, so that their lines do not cross
    points = zip(best["trial"], _scaled(best, x), _scaled(best, y), strict=True)
    for place, (number, *at) in enumerate(points):
        x_at, y_at = at
        offset = (9, -9 if place % 2 else 9) if few else (40, 16 * (1 - place))  # points
        ax.annotate(
            str(number),
            (x_at, y_at),
            offset,
            textcoords="offset points",
            fontsize=9,
            va="center",
            arrowprops=None if few else {"arrowstyle": "-", "color": GREY, "lw": 0.8},
            zorder=5,
            bbox={"fc": "white", "ec": "none", "alpha": 0.8, "pad": 0.5},
        )


def _scaled(trials: pd.DataFrame, name: str) -> np.ndarray:
    return trials[name].astype(float).to_numpy() * (100 if name.endswith("accuracy") else 1)


def _bars(trials: pd.DataFrame, name: str) -> np.ndarray | None:
    if f"{name}_low" not in trials:
        return None
    middle, low, high = (_scaled(trials, name), *(trials[f"{name}_{end}"].to_numpy(float) for end in ("low", "high")))
    scale = 100 if name.endswith("accuracy") else 1
    return np.clip(np.nan_to_num([middle - scale * low, scale * high - middle]), 0, None)
