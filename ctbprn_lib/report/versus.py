"""The sentences and tables of the page that notebooks/compare.ipynb publishes: whether to use CTBPRN.

records: what compare.run_all returns. answers: what compare.verdicts returns.
"""

import math
from collections.abc import Mapping

import numpy as np
import pandas as pd

from ctbprn_lib import evidence
from ctbprn_lib.compare import CTBPRN, LIBRARY, MAJORITY, MARGIN, METHODS, REGULARISED, Search
from ctbprn_lib.evidence import Answer
from ctbprn_lib.report import text
from ctbprn_lib.report.text import UNKNOWN, Interval

WORTH, NOT_WORTH, OPEN = "Shown to be worth it on", "Shown not to be worth it on", "Not decided on"
Answers = Mapping[tuple[str, str], Answer]


def means(records: pd.DataFrame) -> pd.DataFrame:
    """(data sets, methods) mean accuracy over the resamples that all methods have of a data set."""
    table = _shared(records).groupby("data", sort=False).mean()
    return table.reindex(columns=[method for method in reversed(METHODS) if method in table])


def _shared(records: pd.DataFrame) -> pd.DataFrame:
    """((data set, resample), methods) accuracy where all methods that could be run on the data set have one."""
    table = records.pivot_table(index=["data", "resample"], columns="method", values="accuracy", sort=False)
    could_run = table.notna().groupby("data", sort=False).transform("any")
    return table[(table.notna() | ~could_run).all(axis=1)]


def mean_ranks(records: pd.DataFrame) -> pd.Series:
    """{method: its mean rank over data sets, 1 being the best}; none for a single data set."""
    table = means(records).dropna(axis=1)
    return table.rank(axis=1, ascending=False).mean() if len(table) > 1 else pd.Series(dtype=float)


def rivals(records: pd.DataFrame) -> pd.Series:
    """{data set: the other method with the highest mean accuracy}.  Regularised, CTBPRN is no other method."""
    others = means(records).drop(columns=[CTBPRN, REGULARISED], errors="ignore")
    return others.idxmax(axis=1)


def differences(answers: Answers) -> dict[str, dict[str, Interval]]:
    """{data set: {other method: (effect, low, high)}}: by how much CTBPRN is more accurate; but for the majority."""
    found: dict[str, dict[str, Interval]] = {}
    for (data, other), answer in answers.items():
        if other != MAJORITY:
            (look,) = answer.looks
            found.setdefault(data, {})[other] = (look.effect, *look.interval())
    return found


def verdict(answer: Answer) -> str:
    """The difference from another method in points with its interval, and the verdict where there is one."""
    (look,) = answer.looks
    shown = text.signed_points((look.effect, *look.interval()))
    if answer.decided:
        return f"**{'same' if answer.verdict == evidence.SAME else answer.verdict}** {shown}"
    return shown


def standing(records: pd.DataFrame, answers: Answers) -> dict[str, str]:
    """{data set: WORTH, NOT_WORTH or OPEN}: whether CTBPRN is worth it there.

    It is not where it is worse than some other method, and it is where it is better than the best other one, or the
    same.
    """
    found = {}
    for data, rival in rivals(records).items():
        others = {other: answer for (of, other), answer in answers.items() if of == data and other != REGULARISED}
        if any(answer.verdict == evidence.WORSE for answer in others.values()):
            found[str(data)] = NOT_WORTH
        elif rival in others and others[rival].verdict in (evidence.BETTER, evidence.SAME):
            found[str(data)] = WORTH
        else:
            found[str(data)] = OPEN
    return found


def advice(records: pd.DataFrame, answers: Answers) -> str:
    """On which data CTBPRN is worth it, on which it is not and what to take then, what is open, and the means."""
    ahead, best = means(records), rivals(records)
    said: dict[str, list[str]] = {WORTH: [], NOT_WORTH: [], OPEN: []}
    for data, kind in standing(records, answers).items():
        rival = best[data]
        if kind == WORTH:
            is_better = answers[data, rival].verdict == evidence.BETTER
            how = f"better than {rival}" if is_better else f"the same as {rival}"
        elif kind == NOT_WORTH:
            how = f"take {rival}"
        else:
            gap = ahead.loc[data].get(CTBPRN, math.nan) - ahead.loc[data, rival]
            how = f"{text.signed_points(gap)} points beside {rival}"
        said[kind].append(f"{data} ({how})")
    n_sets = len(best)
    below = sum(ahead.loc[data].get(CTBPRN, math.nan) < ahead.loc[data, rival] for data, rival in best.items())
    lines = []
    for kind, sets in said.items():
        listed = "none of these data sets" if not sets else f"{len(sets)} of {n_sets}: {', '.join(sets)}"
        lines.append(f"- **{kind}** {listed}.")
    lines.append(f"- **Its mean accuracy** is below that of the best other method on {below} of {n_sets}.")
    return "\n".join(lines)


def seldom(records: pd.DataFrame, answers: Answers) -> str:
    """How often CTBPRN was decided to be better, the same and worse, beside libraries and beside networks."""
    said = []
    for label, methods in (
        ("methods of libraries", tuple(LIBRARY)),
        ("other networks", tuple(METHODS[len(LIBRARY) :])),
    ):
        found = [a.verdict if a.decided else "undecided" for (_, other), a in answers.items() if other in methods]
        counts = text.counted(found, (evidence.BETTER, evidence.SAME, evidence.WORSE, "undecided"))
        counts = counts.replace(evidence.SAME, f"the same within {100 * MARGIN:g} points")
        if found:
            said.append(f"Beside {label} CTBPRN was, in {len(found)} questions: {counts}.")
        trivial = sum(a.verdict == evidence.BETTER for (_, other), a in answers.items() if other == MAJORITY)
        if MAJORITY in methods and trivial:
            said.append(f"{trivial} of the better ones are beside naming the commonest class.")
    ranks = mean_ranks(records)
    if len(ranks):
        said.append(
            f"If you have to choose before more is decided, {ranks.idxmin()} has the best mean rank over these data "
            f"sets, {ranks.min():.1f} of {len(ranks)}, where CTBPRN has {ranks[CTBPRN]:.1f}. That is exploration."
        )
    return " ".join(said)


def regularisation(answers: Answers) -> str:
    """Whether dropout, noise, shifts in time and weight decay help: on which sets they were decided to, or to harm."""
    found = {data: answer.verdict for (data, other), answer in answers.items() if other == REGULARISED}
    if not found:
        return ""
    helped = [data for data, verdict in found.items() if verdict == evidence.WORSE]  # plain beside regularised
    harmed = [data for data, verdict in found.items() if verdict == evidence.BETTER]
    kept = "pays, and belongs in the search" if len(helped) >= 2 and not harmed else "is not shown to pay"
    same = sum(verdict == evidence.SAME for verdict in found.values())
    return (
        "Regularisation (dropout, noise, shifts in time) was decided to help on "
        f"{', '.join(helped) or 'none'}, to harm on {', '.join(harmed) or 'none'} and to change nothing on {same} of "
        f"{len(found)} data sets. So it {kept}: it has to help on two and harm none."
    )


def accuracy_table(records: pd.DataFrame) -> str:
    """Mean accuracy of each method on each data set, in per cent, the highest in bold."""
    table = means(records)
    n = _shared(records).groupby("data").size()
    rows = []
    for data, row in table.iterrows():
        best = row.max()
        cells = [UNKNOWN if np.isnan(x) else f"**{100 * x:.1f}**" if x == best else f"{100 * x:.1f}" for x in row]
        rows.append([str(data), str(n[data]), *cells])
    ranks = mean_ranks(records)
    cells = [f"{ranks[m]:.1f}" if m in ranks else UNKNOWN for m in table.columns]
    return text.table(["Data", "Resamples", *table.columns], [*rows, ["mean rank (exploration)", "", *cells]])


def verdict_table(answers: Answers) -> str:
    """What CTBPRN is beside each other method on each data set."""
    others = [method for method in reversed(METHODS) if any(other == method for _, other in answers)]
    sets = dict.fromkeys(data for data, _ in answers)
    rows = [[data, *(verdict(answers[data, o]) if (data, o) in answers else UNKNOWN for o in others)] for data in sets]
    return text.table(["CTBPRN beside", *others], rows)


def cost_table(records: pd.DataFrame) -> str:
    """Medians over data sets and resamples: seconds to train, parameters, and seconds for 1,000 predictions.

    They are those of the processor that most jobs were done on.
    """
    processor = records["processor"].mode().iloc[0]
    rows = []
    for method in METHODS:
        part = records[(records["method"] == method) & records["accuracy"].notna()]
        part = part[part["processor"] == processor]
        if len(part):
            n = part["parameters"].median()
            seconds = part["seconds"].median(), part["seconds"].max(), part["seconds_per_1000"].median()
            once, most, predicting = ("< 0.1 s" if t < 0.1 else text.duration(t) for t in seconds)
            rows.append([method, once, most, UNKNOWN if np.isnan(n) else text.commas(n), predicting])
    table = text.table(["Method", "Training, median", "Longest", "Parameters", "1,000 predictions"], rows)
    return f"{table}\n\nOne core of {processor}, for one network or classifier whose settings are known."


def why_open(records: pd.DataFrame, answers: Answers) -> str:
    """Why large differences may be without a verdict: what each question has to reach."""
    if not answers:
        return ""
    n = int(_shared(records).groupby("data").size().max())
    share = (records["n_test"] / records["n_train"]).median()
    return (
        f"Bold stands where there is a verdict, at 5 % over all {len(answers)} questions together. Each of them must "
        f"reach a p below {0.05 / len(answers):.2g}, with {text.count(n, 'resample')}. Resamples share samples, so "
        f"the corrected test counts {n} of them as about {n / (1 + n * share):.1f} independent ones (at the median "
        f"ratio of test to training samples, {share:.2f}). That is why a large difference may be without a verdict. "
        "The brackets hold 95 % for each pair alone, so one that leaves out zero is a hint and no verdict."
    )


def failures(records: pd.DataFrame) -> str:
    """What could not be run, and why."""
    failed = records[records["failure"].fillna("") != ""]
    said = [f"- {why}: {', '.join(dict.fromkeys(part['data']))}" for why, part in failed.groupby("failure", sort=False)]
    return "\n".join(said)


def protocol(records: pd.DataFrame, how: Search) -> str:
    """The data sets with their sizes, and how each method was trained."""
    rows = []
    for data, part in records[records["accuracy"].notna()].groupby("data", sort=False):
        sizes = part.iloc[0]
        rows.append([str(data), ABOUT.get(str(data), ""), text.commas(sizes["n_train"]), text.commas(sizes["n_test"])])
    trained = (
        f"Each network is tuned on each resample with {text.count(how.n_trials, 'trial')} of {how.n_steps} steps and "
        "one seed each, by one sampler. The settings with the lowest validation CE are trained again on training and "
        f"validation samples with {how.n_seeds} seeds, whose mean accuracy counts. Classifiers of libraries are "
        "trained on the same samples with their recommended settings. The test samples are seen once. "
        "Exact copies of a recording are left out of the sets that packages ship. Two methods within "
        f"{100 * MARGIN:g} points of accuracy are called the same."
    )
    return text.table(["Data", "What it is", "Training samples", "Test samples"], rows) + "\n\n" + trained


WORDS = f"""
- **{CTBPRN}**: a layer decides how much each area (a group of sensors) counts, and mixes the areas into one message.
- **columns alone**: the same network without that decision and without the message.
- **{REGULARISED}**: dropout, noise and shifts in time are searched as well.
- **Transformer**: torch's encoder over all areas, with about as many weights.
- **MultiRocketHydra, MiniRocket**: many fixed convolutions and a linear classifier, from aeon.
- **ridge on means, summaries, Catch22**: a linear classifier on the mean of each channel, on seven summary numbers
  of it, or on 22 known features.
- **{MAJORITY}**: names the commonest class.
- **Resample**: another division of the same recordings into training, validation and test samples.
- **Trial**: one choice of settings that is tried.
""".strip()

ABOUT = {
    "BasicMotions": "smartwatch, four activities",
    "JapaneseVowels": "speech of nine speakers, unequal lengths",
    "FingerMovements": "EEG before a key press, left or right",
    "HandMovementDirection": "MEG, four directions of a hand",
    "SelfRegulationSCP1": "EEG of slow potentials, healthy",
    "SelfRegulationSCP2": "EEG of slow potentials, ALS",
    "EyesOpenShut": "EEG, eyes open or shut",
    "Blink": "EEG, long or short blink",
    "watch": "smartwatch, seven exercises, split by subject",
    "routing": "the routing task of this project, drawn",
}
