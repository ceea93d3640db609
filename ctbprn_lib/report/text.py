"""How a report writes numbers and names, and the template that holds its sentences.

Each function here formats one kind of value, once, for the template and for the other notebooks.
"""

import collections
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jinja2
import pandas as pd
from jinja2.environment import TemplateModule

from ctbprn_lib import evidence, files
from ctbprn_lib.report import comparisons
from ctbprn_lib.report.comparisons import Finding
from ctbprn_lib.report.facts import GOAL, LEARNT, SHAPE, Facts
from ctbprn_lib.train import TABLE

Interval = Sequence[float]  # mean, low, high
NAMES = {name: entry.label for name, entry in TABLE.items()}
FACTORS = NAMES | {comparisons.EQUAL_SAMPLES: "Batch size at equal samples", "n_steps": "Length of training"}
RULES = {"majority class": "always naming the largest class", "linear rule": "the linear rule"}
PARTS = {
    "routing": "routing (all areas alike)",
    "message": "the message between areas",
    "noise": "noise on the gates in training",
}
UNKNOWN = "–"


def percent(share: float | Interval, unit: str = " %") -> str:
    """A share, or (mean, low, high) of one, in per cent.  A dash for NaN, the mean alone if the ends are NaN."""
    return _with_ends(share, lambda x: f"{100 * x:.1f}", unit)


def nats(x: float | Interval) -> str:
    """A cross-entropy or (mean, low, high) of one, without its unit.  NaN as percent has it."""
    return _with_ends(x, lambda x: f"{x:.3f}")


def signed_points(share: float | Interval) -> str:
    """A difference of shares, or (effect, low, high) of one, in points with a sign, without its unit."""
    return _with_ends(share, lambda x: f"{100 * x:+z.1f}")


def signed_nats(x: float | Interval) -> str:
    """A difference of cross-entropies, or (effect, low, high) of one, with a sign, without its unit."""
    return _with_ends(x, lambda x: f"{x:+z.3f}")


def _with_ends(x: Any, form: Any, unit: str = "") -> str:
    mean, *ends = x if isinstance(x, Sequence) else (x,)
    if math.isnan(mean):
        return UNKNOWN
    if not ends or math.isnan(ends[0]):
        return form(mean) + unit
    return f"{form(mean)}{unit} [{form(ends[0])}, {form(ends[1])}]"


def interval(row: Mapping[str, Any], name: str) -> Interval:
    """(mean, low, high) of a score in a row of search.records."""
    return row[name], row[f"{name}_low"], row[f"{name}_high"]


def p(p_value: float) -> str:
    """A p-value with its relation sign; a decided one is not printed as if it were not."""
    if p_value < 0.001:
        return "< 0.001"
    digits = 4 if p_value < evidence.LEVEL <= round(p_value, 3) else 3
    return f"= {p_value:.{digits}f}"


def effect(finding: Finding) -> str:
    """The effect that decides a question, with its interval and seeds, and p times the number of questions."""
    p_value = f"p (× {finding.n_questions}) {p(finding.answer.p_value)}"
    return f"{signed_points(finding.effect)} points, {count(finding.n_seeds, 'seed')}, {p_value}"


def verdict(finding: Finding) -> str:
    """The verdict on a question; where there is none, what the difference is at most, in points rounded up."""
    answer, question = finding.answer, finding.question
    bound = f"{evidence.AT_MOST} {most_points(answer)} points" + (" worse" if question.is_claim else "")
    if answer.verdict == evidence.AT_MOST:
        return bound
    if answer.verdict == evidence.UNDECIDED:
        return f"{evidence.UNDECIDED} ({bound})"
    if answer.verdict == evidence.SAME and question.margin != evidence.MARGIN:
        return f"the same within {100 * question.margin:g} points"
    return answer.verdict


def most_points(answer: evidence.Answer) -> str:
    """By how many points two configurations may differ at most, rounded up."""
    return f"{math.ceil(round(1000 * answer.at_most, 6)) / 10:.1f}"


def configuration(name: str) -> str:
    """The name of a configuration as people read it: "trial 3 with learning rate 0.001" for "trial 3: lr 0.001"."""
    base, _, change = name.partition(": ")
    if not change:
        return f"{base.removesuffix(' again')} with other seeds" if base.endswith(" again") else base
    if change.startswith("without "):
        part, _, length = change.removeprefix("without ").partition(", ")
        return f"{base} without {PARTS[part]}" + (f", {length}" if length else "")
    factor, _, level = change.rpartition(" ")
    if factor == "n_steps":
        return f"{base}, trained for {count(float(level), 'step')}"
    if factor not in FACTORS:
        return name
    return f"{base} with {FACTORS[factor][0].lower()}{FACTORS[factor][1:]} {setting(level, factor)}"


def question(name: str) -> str:
    """The name of a question as people read it: "Learning rate 0.001" for "lr 0.001"."""
    level = re.fullmatch(r"(\w+) ([\d.e+-]+)(, equal samples)?", name)
    if not level or level[1] not in FACTORS:
        return name
    return f"{FACTORS[level[1] + (level[3] or '')]} {setting(level[2], level[1])}"


def duration(seconds: float) -> str:
    """A time as people read it: "0.4 s", "12 s", "3 min", "1.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 9.5 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def capitalized(text: str) -> str:
    """The text with a capital first letter, and the rest as it is."""
    return text[0].upper() + text[1:]


def fixed(x: float, digits: int) -> str:
    """x with so many digits after the point."""
    return f"{x:.{digits}f}"


def number(x: float, digits: int) -> str:
    """x with so many digits after the point, halves away from zero, as the original printed 0.78125 as 0.7813."""
    return f"{x + math.copysign(1e-9, x):.{digits}f}"


def commas(n: float) -> str:
    """A whole number with a comma between thousands."""
    return f"{n:,.0f}"


def count(n: float, noun: str) -> str:
    """A number of things: "1 trial", "1,200 trials"."""
    return f"{commas(n)} {noun}" + ("" if n == 1 else "s")


def setting(x: Any, name: str) -> str:
    """A value of a hyperparameter or of another factor, as people read it.  x: a number or, from a test, its text."""
    if x is None or (isinstance(x, float) and math.isnan(x)):
        return UNKNOWN
    x = float(x) if isinstance(x, str) else x
    name = name.split(",")[0]  # "batch_size, equal samples"
    return TABLE[name].text(x) if name in TABLE else f"{x:g}"


def span(entry: Any) -> str:
    """The levels or the range of a hyperparameter in a space."""
    if isinstance(entry, list):
        return ", ".join(f"{x:g}" for x in entry)
    return f"{entry['low']:g} to {entry['high']:g}" + (" (log)" if entry.get("log") else "")


def counted(names: Iterable[str], order: Iterable[str]) -> str:
    """How often each name of order is among names, as "3 first, 1 second", without those that are not."""
    counts = collections.Counter(names)
    return ", ".join(f"{counts[name]} {name}" for name in order if name in counts)


def distinct(values: Iterable[Any]) -> str:
    """The distinct values, in order."""
    return ", ".join(sorted(set(map(str, values))))


def outside(text: Any) -> str:
    """Text from outside as Markdown shows it literally, on one line.

    A backslash before punctuation does that, but for the dollar, with which mathematics begins.
    """
    escaped = re.sub(r"[\\`*_{}\[\]<>#|~&]", r"\\\g<0>", files.printable(text))
    return escaped.replace("$", "&#36;")


def quoted(names: Sequence[Any], most: int = 3) -> str:
    """Names from outside in quotation marks, the first few of them."""
    shown = ", ".join(f"“{outside(name)}”" for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


def header(cells: Iterable[Any]) -> str:
    """The first two lines of a Markdown table."""
    names = list(cells)
    return f"{_line(names)}\n{_line(['---'] * len(names))}"


def plain(markdown: str) -> str:
    """Markdown as a terminal shall show it: without the marks of bold and code, and without the addresses of links."""
    return re.sub(r"\[([^][]+)\]\([^()]*\)", r"\1", markdown).replace("**", "").replace("`", "")


def table(cells: Iterable[Any], rows: Iterable[Iterable[Any]]) -> str:
    """A Markdown table: its header, and rows of cells that are Markdown already."""
    return "\n".join([header(cells), *map(_line, rows)])


def _line(cells: Iterable[Any]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


@functools.cache
def environment() -> jinja2.Environment:
    """The Jinja2 environment of the template: an undefined name is an error."""
    env = jinja2.Environment(
        loader=jinja2.PackageLoader("ctbprn_lib.report", ""),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda x: x.rstrip("\n") if isinstance(x, str) else x,  # a macro is part of a line or of a list
    )
    filters: list[Callable[..., Any]] = [percent, nats, signed_points, signed_nats, interval, p, effect, fixed]
    filters += [commas, configuration, question, capitalized, duration, count, verdict, setting, span, counted]
    filters += [distinct, outside, quoted, header]
    env.filters |= {function.__name__: function for function in filters}
    env.filters |= {"label": FACTORS.__getitem__, "rule": RULES.__getitem__, "part": PARTS.__getitem__}
    env.filters |= {"is_finite": math.isfinite, "command_word": files.word, "verdict_on": verdict_on}
    for name in ("AT_MOST", "BETTER", "MARGIN", "REFUTED", "SAME", "SUPPORTED", "UNDECIDED", "WORSE"):
        env.globals[name] = getattr(evidence, name)
    for name in ("DEFAULTS", "EQUAL_SAMPLES", "VERDICTS"):
        env.globals[name] = getattr(comparisons, name)
    env.globals |= {"GOAL": GOAL, "LEARNT": LEARNT, "SHAPE": SHAPE}
    return env


def _module(facts: Facts | None) -> TemplateModule:
    return environment().get_template("report.md.j2").make_module({"facts": facts})


def sections() -> list[str]:
    """The names of the template's sections: its macros without arguments."""
    macros = vars(_module(None)).values()
    return sorted(m.name for m in macros if isinstance(m, jinja2.runtime.Macro) and not m.arguments)


def render(facts: Facts | None, section: str, *arguments: Any) -> str:
    """The Markdown of one section of report.md.j2, or of a part of it that takes arguments.

    Raises jinja2.UndefinedError for a name that the template or the facts do not have.
    """
    text = getattr(_module(facts), section)(*arguments)
    text = re.sub(r"\n[ \t]+(?=\n|$)", "", text)
    text = re.sub(r"\n[ \t]+(?=\S)", " ", text)  # an indented line goes on with the one before it
    text = re.sub(r"\n{3,}", "\n\n", text)
    numbers = itertools.count(1)
    return re.sub(r"^1\. ", lambda _: f"{next(numbers)}. ", text, flags=re.MULTILINE).strip()


def verdict_on(decision: comparisons.Decision) -> str:
    """The verdict on a claim."""
    return verdict(decision.values["finding"]) if decision.basis == "question" else decision.verdict


def claims_table(decisions: Mapping[comparisons.Claim, comparisons.Decision]) -> pd.DataFrame:
    """One row for each claim: claim, decided_by, verdict, and detail, the sentence behind the verdict."""
    rows = [
        (claim.quote, claim.decided_by, verdict_on(decision), render(None, "claim_detail", decision))
        for claim, decision in decisions.items()
    ]
    return pd.DataFrame(rows, columns=["claim", "decided_by", "verdict", "detail"])
