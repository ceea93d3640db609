"""From confirmed and ablated scores to verdicts: every comparison of a report, and what it says about each claim."""

import math
from typing import NamedTuple

import numpy as np
import pandas as pd

from ctbprn_lib import InputError, evidence, files
from ctbprn_lib.storage import study_folder
from ctbprn_lib.train import Hyperparameters

MARGIN = 0.01  # the smallest difference of accuracy (or of the share routed well) that anybody should care about
LEVEL = 0.05  # of all tests of a report together
BETTER, WORSE, SAME = "better", "worse", "the same within one point"  # of a level, or of one thing beside another
SUPPORTED, REFUTED, UNDECIDED, NOT_TESTED = "supported", "refuted", "undecided", "not tested yet"  # of a claim


class Contrast(NamedTuple):
    """Each good level of a factor against each other level; base "best" or the role of another run."""

    base: str
    factor: str
    good: tuple
    others: tuple
    score: str = "test_accuracy"


BEST, TRIAL_2 = "best", "published trial 2"
# Claims that other records than confirmed runs decide.
SCORED = "Best accuracy (78.1%) achieved with CE loss of 0.6495"
LOWER_CE = "Lower CE loss (0.6470) possible but with reduced accuracy (62.5%)"
LITTLE_MEMORY = "Current configuration uses minimal GPU memory"
LARGER_BATCH = "Can increase batch size if more GPU memory is available"
HELPS_ROUTING = "Temperature around 1.7-2.0 helps with routing"
# Every claim under the original's "Key Findings" and "Recommendations", quoted; what could decide it; the contrasts.
CLAIMS = [
    ("Model dimension of 64-96 works best", "d 64 and 96 against 32 and 128, all else equal",
     [Contrast(BEST, "d", (64, 96), (32, 128))]),
    ("Router rank of 16 provides good performance", "rank 16 against 4, 8 and 32, all else equal",
     [Contrast(BEST, "rank", (16,), (4, 8, 32))]),
    ("Larger sequence lengths (128) yield better accuracy", "accuracy at 128 against 32 and 64 on one fixed task",
     [Contrast(BEST, "seq_len", (128,), (32, 64))]),
    ("Moderate batch size of 32 works well", "batch 32 against 8, 16 and 64, equal steps and equal samples",
     [Contrast(BEST, "batch_size", (32,), (8, 16, 64)),
      Contrast(BEST, "batch_size, equal samples", (32,), (8, 16, 64))]),
    ("Learning rate around 0.0015 gives best accuracy", "lr 0.0015 against levels from 0.0001 to 0.01",
     [Contrast(BEST, "lr", (0.0015,), (0.0001, 0.0004, 0.004, 0.01))]),
    (HELPS_ROUTING, "share routed to the true area, 1.7 and 2.0 against 0.5 and 1",
     [Contrast(BEST, "temperature", (1.7, 2.0), (0.5, 1.0), "route_accuracy")]),
    (SCORED, "whether it holds on fresh samples, over seeds", []),
    (LOWER_CE, "trials 1 and 2 on fresh samples", []),
    ("Sequence length of 128 consistently better than shorter sequences",
     "128 against 32 and 64 at the best and at trial 2's other settings",
     [Contrast(BEST, "seq_len", (128,), (32, 64)), Contrast(TRIAL_2, "seq_len", (128,), (32, 64))]),
    ("Use the best accuracy parameters (Trial 2)", "trial 2 against the best confirmed configuration",
     [Contrast("", "role", (TRIAL_2,), (BEST,))]),
    ("Consider increasing model dimension to 96 if more capacity is needed", "d 96 against 64, all else equal",
     [Contrast(BEST, "d", (96,), (64,))]),
    ("Keep sequence length at 128 for best results", "128 against 32 and 64 at trial 2's other settings",
     [Contrast(TRIAL_2, "seq_len", (128,), (32, 64))]),
    ("Try learning rates between 0.001 and 0.002", "that range against levels outside it",
     [Contrast(BEST, "lr", (0.001, 0.0015, 0.002), (0.0001, 0.0004, 0.004, 0.01))]),
    ("Experiment with rank values between 8-32", "rank 8, 16 and 32 against 4",
     [Contrast(BEST, "rank", (8, 16, 32), (4,))]),
    ("Test temperature values between 1.5-2.0", "1.7 and 2.0 against 0.5 and 1",
     [Contrast(BEST, "temperature", (1.7, 2.0), (0.5, 1.0))]),
    (LITTLE_MEMORY, "peak GPU memory of trial 2 beside the rest of the space", []),
    (LARGER_BATCH, "the largest batch that fits the GPU", []),
    ("Model dimension of 64 provides good balance between performance and memory usage",
     "d 64 against 32, which takes less memory", [Contrast(BEST, "d", (64,), (32,))]),
]  # fmt: skip


# Of next_space, as people read it.
NEXT_RULE = (
    f"Its rule: a level goes if its accuracy is decided to be worse and lies more than {100 * MARGIN:g} point lower, "
    "whatever its CE; a range then ends at the outermost level that was tested in it and stays; a level outside comes "
    "in if it is better."
)


class Evidence:
    """All tests of one report, Holm-adjusted together, and the verdicts that follow.

    runs: confirm.records; the best configuration is the role that was ablated.
    tests: one row a comparison: kind ("confirmed", "ablation", "claim"), base, factor, a, b, score, effect = a - b
    with low and high, p_value and p_equivalence with their Holm-adjusted p_holm and p_equivalence_holm (equivalence:
    accuracies differ by less than MARGIN), sd over seeds (if paired, of differences), and the verdict on a.
    n_test: test samples; where they are too few to see a difference of MARGIN, equivalence is not tested.
    """

    def __init__(self, runs, n_test=8192):
        runs = runs[
            (runs["base"] == "") | runs["base"].isin(runs["role"])
        ]  # a base may have failed where levels have not
        self.n_seeds = int(runs["seed"].max()) + 1
        what, self._groups = ["role", "base", "factor", "level"], {}
        for (role, base, factor, level), rows in runs.sort_values("seed", kind="stable").groupby(
            what, dropna=False, sort=False
        ):
            key = (role, base, factor, None if math.isnan(level) else level)
            self._groups[key] = {name: rows[name].to_numpy() for name in rows}
        means = {name: runs[runs["role"] != ""].groupby("role")[name].mean() for name in ("test_accuracy", "test_ce")}
        self.roles = list(means["test_ce"].sort_values().index)
        self.best_ce, self.best_accuracy = means["test_ce"].idxmin(), means["test_accuracy"].idxmax()
        factors = runs[runs["factor"] != ""]
        ablated = [base for base in dict.fromkeys(factors["base"]) if base != TRIAL_2]
        self.base = ablated[0] if ablated else self.best_ce  # what "best" means in a Contrast
        low, high = evidence.sample_interval(means["test_accuracy"].max(), n_test)
        self.sees_margin = (high - low) / 2 <= MARGIN
        self.tests = self._all_tests()

    def group(self, base, factor, level):
        """{column: (R,)} of one run or None: a level of an ablation, or factor "role" and the role's name."""
        base = self.base if base == BEST else base
        return self._groups.get((level, "", "", None) if factor == "role" else ("", base, factor, level))

    def again(self, role):
        """{column: (R,)} of a role or "best" as measured for its ablation, by seeds that did not choose it, or None."""
        role = self.base if role == BEST else role
        factor = next((factor for base, factor in self.ablated() if base == role), None)
        return factor and self.group(role, factor, self.own_level(role, factor))

    def levels(self, base, factor):
        """The levels of an ablation, in order."""
        base = self.base if base == BEST else base
        return sorted(level for role, b, f, level in self._groups if not role and (b, f) == (base, factor))

    def ablated(self):
        """(base, factor) of every ablation, in the order of the plan."""
        return list(dict.fromkeys((b, f) for role, b, f, _ in self._groups if not role))

    def own_level(self, base, factor):
        """The level that the base configuration itself has."""
        base = self.base if base == BEST else base
        return self.group("", "role", base)[factor.removesuffix(", equal samples")][0]

    def means(self, base, factor):
        """One row a level of an ablation: level, and mean, low, high of its test accuracy."""
        groups = {level: self.group(base, factor, level)["test_accuracy"] for level in self.levels(base, factor)}
        rows = [(level, *evidence.mean_interval(accuracy)) for level, accuracy in groups.items()]
        return pd.DataFrame(rows, columns=["level", "mean", "low", "high"])

    def moved(self, base, factor):
        """{level: (accuracy test, CE test)} of an ablation against the base's own level."""
        t = self.tests
        mine = t[(t["kind"] == "ablation") & (t["base"] == base) & (t["factor"] == factor)]
        levels = [level for level in self.levels(base, factor) if _said(level) in set(mine["a"])]
        return {x: tuple(row for _, row in mine[mine["a"] == _said(x)].iterrows()) for x in levels}

    def _all_tests(self):
        rows = []
        for role in self.roles:
            for best, score in ((self.best_accuracy, "test_accuracy"), (self.best_ce, "test_ce")):
                if role != best:
                    rows.append(self._test("confirmed", "", "role", role, best, score))
        for base, factor in self.ablated():
            own = self.own_level(base, factor)
            for level in self.levels(base, factor):
                if level != own:
                    rows += [self._test("ablation", base, factor, level, own, s) for s in ("test_accuracy", "test_ce")]
        contrasts = dict.fromkeys(c for _, _, contrasts in CLAIMS for c in contrasts)
        claimed = [(b, f, g, other, score) for b, f, good, others, score in contrasts for g in good for other in others]
        rows += [self._test("claim", *words) for words in dict.fromkeys(claimed)]
        tests = pd.DataFrame([row for row in rows if row])
        tests["p_holm"] = evidence.holm(tests["p_value"])
        has = tests["p_equivalence"].notna()
        tests["p_equivalence_holm"] = math.nan
        tests.loc[has, "p_equivalence_holm"] = evidence.holm(tests.loc[has, "p_equivalence"])
        tests["verdict"] = [self._verdict(row) for _, row in tests.iterrows()]
        return tests

    def seeds_needed(self, tests):
        """Seeds a level that would decide all these tests in 80 % of such reports, if effects are as they look.

        An effect further from 0 than from MARGIN shows as a difference first, another as equivalence, where there are
        test samples enough to show that.
        """
        margin = MARGIN if self.sees_margin else 0
        gaps = [max(abs(test["effect"]), margin - abs(test["effect"])) for test in tests]
        return max(self.n_seeds + 1, *map(self.seeds_to_find, tests, gaps))

    def what_decides(self, tests):
        """seeds_needed, as people read it."""
        seeds = self.seeds_needed(tests)
        if seeds == math.inf:
            return "more test samples, not more seeds, would decide it"
        return f"about {seeds} seeds a level would decide it"

    def seeds_to_find(self, test, gap):
        """Seeds a level with which a test of this spread shows a difference of gap in 80 % of such reports."""
        return evidence.seeds_needed(test["sd"], gap, LEVEL / len(self.tests), test["paired"])

    def _test(self, kind, base, factor, good, other, score):
        """One row: one level against another; None where one has not been run."""
        if kind == "claim" and factor == "role":
            a, b = self.again(good), self.again(other)
        else:
            a, b = self.group(base, factor, good), self.group(base, factor, other)
        if a is None or b is None or a is b or min(np.isfinite(g[score]).sum() for g in (a, b)) < 2:
            return None  # the last: the task knows no true area
        shapes = ["d", "rank", "batch_size", "seq_len", "n_layers"]
        paired = all(a[name][0] == b[name][0] for name in shapes)  # the same seeds and shapes
        found, same = evidence.compare(a[score], b[score], paired), math.nan
        if score != "test_ce" and self.sees_margin:
            same = evidence.equivalence(a[score], b[score], MARGIN, paired)
        sd = np.nanstd(a[score] - b[score], ddof=1)
        if not paired:
            sd = math.sqrt((np.nanvar(a[score], ddof=1) + np.nanvar(b[score], ddof=1)) / 2)
        return dict(kind=kind, base=base, factor=factor, a=_said(good), b=_said(other), score=score, paired=paired,
                    **found._asdict(), p_equivalence=same, sd=sd)  # fmt: skip

    @staticmethod
    def _verdict(row):
        if row["p_equivalence_holm"] < LEVEL:
            return SAME
        if row["p_holm"] >= LEVEL:
            return UNDECIDED
        return BETTER if (row["effect"] < 0) == (row["score"] == "test_ce") else WORSE

    def claims(self, others=None):
        """One row a claim of the original: claim, decided_by, verdict, detail.

        others: {claim: (verdict, detail)} for those that other records decide.
        """
        rows = []
        for quote, decided_by, contrasts in CLAIMS:
            tests = [t for c in contrasts for t in self.of(c)]
            verdict, detail = (others or {}).get(quote, (NOT_TESTED, ""))
            if contrasts and len(tests) == sum(len(c.good) * len(c.others) for c in contrasts):
                words = {t["verdict"] for t in tests}
                # worse than a rival refutes; better than some, and from the others not a point away, supports
                verdict = SAME if words == {SAME} else SUPPORTED
                verdict = REFUTED if WORSE in words else UNDECIDED if UNDECIDED in words else verdict
                said = dict.fromkeys(f"{self._at(t)}: {effect(t)}" for t in tests)
                detail = "; ".join(said) + " (the best is published trial 2)" * (len(said) < len(tests))
                if verdict == UNDECIDED:
                    more = self.what_decides([t for t in tests if t["verdict"] == UNDECIDED])
                    detail += f". If the effects are what they look like, {more}"
            elif contrasts and self.base == TRIAL_2 and contrasts[0].factor == "role":
                rivals = self.tests[(self.tests["kind"] == "confirmed") & (self.tests["b"] == TRIAL_2)]
                verdict = UNDECIDED if (rivals["p_holm"] >= LEVEL).any() else SUPPORTED
                detail = "it is the best confirmed configuration"
                detail += ", but not told from all others" * (verdict != SUPPORTED)
            rows.append({"claim": quote, "decided_by": decided_by, "verdict": verdict, "detail": detail})
        return pd.DataFrame(rows)

    def _at(self, test):
        """What is compared with what, as people read it."""
        if test["factor"] == "role":
            return f"{test['a']} against {'the best' if test['b'] == BEST else test['b']}"
        place = " at published trial 2's settings" if test["base"] == TRIAL_2 != self.base else ""
        samples = " (equal samples)" if test["factor"].endswith("equal samples") else ""
        return f"{test['a']} against {test['b']}{place}{samples}"

    def shared(self, claims):
        """How many of these claims rest on comparisons that another of them rests on as well, and on nothing else."""
        bases = {BEST: self.base}
        mine = [contrasts for quote, _, contrasts in CLAIMS if quote in claims]
        rest = [{(bases.get(c.base, c.base), *c[1:]) for c in contrasts} for contrasts in mine]
        return sum(bool(one) and rest.count(one) > 1 for one in rest)

    def of(self, contrast):
        """The tests of one contrast."""
        base, factor, good, others, score = contrast
        t = self.tests
        mine = (t["kind"] == "claim") & (t["base"] == base) & (t["factor"] == factor) & (t["score"] == score)
        mine &= t["a"].isin([_said(g) for g in good]) & t["b"].isin([_said(other) for other in others])
        return [row for _, row in t[mine].iterrows()]

    def next_space(self, space):
        """The space for the next search: decided evidence alone changes the one that was searched.

        NEXT_RULE says how: a level that goes is dead; the base's own level joins the space too.
        """
        t, new = self.tests, {}
        t = t[(t["kind"] == "ablation") & (t["base"] == self.base) & (t["score"] == "test_accuracy")]
        for name, entry in space.items():
            if (self.base, name) not in self.ablated():
                new[name] = entry
                continue
            mine, kind = t[t["factor"] == name].set_index("a"), type(getattr(Hyperparameters, name))
            dead = set(mine[(mine["verdict"] == WORSE) & (mine["effect"] < -MARGIN)].index)
            better = {*mine[mine["verdict"] == BETTER].index, _said(self.own_level(self.base, name))}
            tested = self.levels(self.base, name)
            inside = entry
            if not isinstance(entry, list):  # an end that was not tested itself goes with the level beside it
                inside = [x for x in tested if entry["low"] <= x <= entry["high"]]
                ends = zip((entry["low"], entry["high"]), (inside[:1], inside[-1:]), strict=True)
                inside += [end for end, beside in ends if not (beside and _said(beside[0]) in dead)]
            stay = [x for x in inside if _said(x) not in dead] + [x for x in tested if _said(x) in better]
            kept = sorted({kind(x) for x in stay})
            if not isinstance(entry, list):
                kept = entry | {"low": kept[0], "high": kept[-1]} if len(kept) > 1 else entry
            new[name] = kept
        return new


def effect(test):
    """A test's effect with its interval and adjusted p, as people read it."""
    if test["score"] == "test_ce":
        said = f"{test['effect']:+.3f} [{test['low']:+.3f}, {test['high']:+.3f}] nats"
    else:
        said = "{:+.1f} [{:+.1f}, {:+.1f}] points".format(*(100 * test[k] for k in ("effect", "low", "high")))
    p = test["p_holm"]
    digits = 4 if p < LEVEL <= round(p, 3) else 3  # a decided p is not printed as if it were not
    return f"{said}, {'p < 0.001' if p < 0.001 else f'p = {p:.{digits}f}'}"


def from_reproduction(trial_1, trial_2, published):
    """{claim: (verdict, detail)} for the two claims that the scores of seeds of trials 1 and 2 decide.

    published: the published accuracy of trial 2.
    """
    mean, low, high = evidence.mean_interval(trial_2["test_accuracy"])
    there = REFUTED if not low <= published <= high else UNDECIDED
    there = SUPPORTED if max(published - low, high - published) <= MARGIN else there
    holds = {REFUTED: "does not hold", SUPPORTED: "holds", UNDECIDED: "may hold or not"}[there]
    ce = evidence.compare(trial_1["test_ce"], trial_2["test_ce"])
    gap = evidence.compare(trial_1["test_accuracy"], trial_2["test_accuracy"])
    lower = SUPPORTED if ce.high < 0 and gap.high < 0 else REFUTED if ce.low > 0 or gap.low > 0 else UNDECIDED
    return {
        SCORED: (there, f"it was measured, as the best of five looks at 32 samples, and {holds} on fresh samples: "
                        f"{100 * mean:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"),
        LOWER_CE: (lower, f"trial 1 has {ce.effect:+.3f} [{ce.low:+.3f}, {ce.high:+.3f}] nats and "
                       f"{100 * gap.effect:+.1f} [{100 * gap.low:+.1f}, {100 * gap.high:+.1f}] points beside trial 2 "
                       "on fresh samples"),
    }  # fmt: skip


def recorded_claims(study_name, decided):
    """(claim, decided by, verdict, detail) of every claim, from reports/<study_name>/claims.csv where it is there.

    decided: {claim: (verdict, detail)}, which is newer.  Raises InputError for a file without a verdict on each.
    """
    path = study_folder(study_name) / "claims.csv"
    kept = files.table(path, ("claim", "verdict", "detail"), {}) if path.exists() else None
    for quote, decided_by, _ in CLAIMS:
        there = (NOT_TESTED, "")
        if kept is not None:
            known = kept["verdict"].isin([SUPPORTED, REFUTED, UNDECIDED, SAME, NOT_TESTED])
            row = kept[known & (kept["claim"] == quote)]
            if len(row) != 1:
                raise InputError(f"{path}: expected one row with a verdict for the claim {quote!r}, got {len(row)}")
            there = row["verdict"].item(), row["detail"].item()
        yield quote, decided_by, *decided.get(quote, there)


def _said(level):
    return level if isinstance(level, str) else f"{level:g}"
