"""A confirmed study's report: the sections of report.py, written from verdicts instead of tuning scores."""

import json

import pandas as pd
import yaml

from ctbprn_lib import InputError, confirm, evidence, files, memory, published, storage, verdicts
from ctbprn_lib.report import NAMES, Report, best_rule, escape, nats, percent, rules, sections, span, table, value
from ctbprn_lib.search import HYPERPARAMETERS, PLACEBO
from ctbprn_lib.verdicts import BEST, BETTER, LEVEL, SAME, TRIAL_2, UNDECIDED, WORSE, Contrast, effect

EQUAL_SAMPLES = "batch_size, equal samples"
FACTORS = NAMES | {EQUAL_SAMPLES: "Batch size at equal samples", "n_steps": "Length of training"}
GOAL = {"test_accuracy": 0.995, "test_ce": 0.02}  # this project's, on the routing task


def load(study_name, storage=""):
    """The Report of a study: a ConfirmedReport if confirm.ipynb has been run on it."""
    runs, about = confirm.records(study_name, storage)
    if runs is not None:
        return ConfirmedReport(study_name, storage, runs, about)
    report = Report(study_name, storage)
    report.stale = confirm.of_deleted(report.study)
    return report


class ConfirmedReport(Report):
    """A Report whose findings and recommendations come from confirmed scores and their verdicts."""

    confirmed = True

    def __init__(self, study_name, storage, runs, about):
        super().__init__(study_name, storage)
        self.runs, self.about, self.baselines = runs, about, rules(about["baselines"])
        self.evidence = verdicts.Evidence(runs, self._n_test())
        self.best = {"test_accuracy": self.evidence.best_accuracy, "test_ce": self.evidence.best_ce}
        self.is_original_task = self.task["task"] == "routing" and self.task["n_tokens"] == 128
        self.memory_table = pd.concat([memory.measured(self.trials, self.budget["n_replicas"], self.task),
                                       memory.measured(self._once(), self.evidence.n_seeds, self.task)])  # fmt: skip
        self.memory = None
        if len(self.memory_table) >= 6:
            sizes = self.memory_table[memory.SIZES].to_numpy()
            self.memory = memory.fit_rule(sizes, self.memory_table["measured_mib"])
            self.memory_table["predicted_mib"] = self.memory.predict(sizes)
        self.claims_table = self.evidence.claims(self._other_verdicts()) if self.is_original_task else None
        self.next_space = self.evidence.next_space(self.space)

    def summary(self):
        e = self.evidence
        return super().summary() + (
            f" {len(e.roles)} configurations were trained again with {e.n_seeds} fresh seeds and scored on "
            f"{self._n_test():,} test samples{self._unseen('test', ' that no training and no tuning has seen')}: only "
            "those scores are called results."
        )

    def best_parameters(self):
        parts = []
        for name, title in (("test_accuracy", "Best Test Accuracy"), ("test_ce", "Best Test CE")):
            role = self.best[name]
            lines = [f"### For {title} ({role})", f"- **Test accuracy**: {self._score(role, 'test_accuracy')}",
                     f"- **Test CE**: {self._score(role, 'test_ce')}"]  # fmt: skip
            if self.show_balanced:
                lines.insert(2, f"- **Balanced test accuracy**: {self._score(role, 'test_balanced_accuracy')}")
            lines += [f"- **{NAMES[n]}**: {value(n, self._value(role, n))}" for n in self.names]
            parts.append("\n".join(lines))
        parts.append("The networks: `best_accuracy.safetensors` and `best_ce.safetensors`, with `.json` beside them.")
        return "\n\n".join(parts)

    def confirmed_results(self):
        """A table of all confirmed configurations: test scores beside tuning scores."""
        tuned = self.trials.set_index("trial")
        header = ["Configuration", "Test accuracy (%)", "Test CE (nats)", "Routed to the true area (%; range)",
                  "Tuning accuracy (%)", "Tuning CE (nats)", *(NAMES[name] for name in self.names)]  # fmt: skip
        rows = []
        for role in self.evidence.roles:
            routed, then = 100 * self.evidence.group("", "role", role)["route_accuracy"], ["–", "–"]
            routed = f"{routed.mean():.1f} ({routed.min():.1f} to {routed.max():.1f})" if routed.mean() >= 0 else "–"
            if role.startswith("trial "):
                row = tuned.loc[int(role.removeprefix("trial "))]
                then = [f"{100 * row['val_accuracy']:.1f}", f"{row['val_ce']:.3f}"]
            scores = [self._score(role, name).replace(" %", "").replace(" nats", "") for name in self.best]
            settings = [value(name, self._value(role, name)) for name in self.names]
            rows.append([role, *scores, routed, *then, *settings])
        if self.show_balanced:
            header.insert(2, "Balanced test accuracy (%)")
            for cells in rows:
                cells.insert(2, self._score(cells[0], "test_balanced_accuracy").replace(" %", ""))
        return table(header, rows)

    def ablation(self):
        """What each level costs or gains against the configuration it was moved from, a table a hyperparameter."""
        parts = []
        for base, factor in self.evidence.ablated():
            moved = self.evidence.moved(base, factor).items()
            rows = [[self._level(factor, x), effect(p), effect(ce), p["verdict"]] for x, (p, ce) in moved]
            own = self._level(factor, self.evidence.own_level(base, factor))
            header = ["Level", "Accuracy", "CE", "Verdict on accuracy"]
            how = self._steps(base) if factor == EQUAL_SAMPLES else ""
            parts.append(f"**{FACTORS[factor]}**{self._where(base)}, against {own}{how}:\n\n{table(header, rows)}")
        return "\n\n".join(parts)

    def claims(self):
        if self.claims_table is None:
            return "The original's claims are about the routing task; they are tested in its report."
        counts = self.claims_table["verdict"].value_counts()
        order = (verdicts.SUPPORTED, verdicts.REFUTED, SAME, UNDECIDED, verdicts.NOT_TESTED)
        said = ", ".join(f"{counts[word]} {word}" for word in order if word in counts) + "."
        supported = self.claims_table.loc[self.claims_table["verdict"] == verdicts.SUPPORTED, "claim"]
        if shared := self.evidence.shared(set(supported)):
            said += f" {shared} of those supported rest on the same comparisons."
        rows = [
            [f"“{claim}”", decided_by, f"**{verdict}**" + f": {detail}" * bool(detail)]
            for claim, decided_by, verdict, detail in self.claims_table.itertuples(index=False)
        ]
        return f"Of {len(rows)} claims: {said}\n\n" + table(["Claim", "Decided by", "Verdict"], rows)

    def key_findings(self):
        e = self.evidence
        findings = [
            f"**{title}: {self.best[score]}**, {self._score(self.best[score], score)} over {e.n_seeds} fresh seeds. "
            + self._like(score)
            for score, title in (("test_accuracy", "Best accuracy"), ("test_ce", "Best CE"))
        ]
        for test in e.of(Contrast("", "role", (TRIAL_2,), (BEST,))):
            scores = percent(evidence.mean_interval(e.again(TRIAL_2)["test_accuracy"]))
            word = test["verdict"].replace(UNDECIDED, "not told apart")
            findings.append(
                f"**The published best settings (trial 2), trained and scored the same way**, reach {scores}: {word} "
                f"beside {e.base} ({effect(test)}, both with seeds that did not choose the best)."
            )
        findings += [self._against_rule(), self._winners_curse(), self._goal()]
        undecided = []
        for base, factor in e.ablated():
            decided = [p for p, _ in e.moved(base, factor).values() if p["verdict"] in (BETTER, WORSE)]
            if base == e.base and decided:
                own = self._level(factor, e.own_level(base, factor))
                said = "; ".join(f"{self._level(factor, float(p['a']))}: {effect(p)}" for p in decided)
                also = self._equal_samples() if factor == "batch_size" else ""
                findings.append(f"**{FACTORS[factor]} matters.** Against {own}, {said}.{also}")
            elif base == e.base:
                undecided.append(FACTORS[factor])
        if undecided:
            findings.append(f"**No level is shown to change accuracy for**: {', '.join(undecided)}.")
        findings.append(self._importance_finding())
        return "\n".join(f"{i}. {finding}" for i, finding in enumerate(filter(None, findings), 1))

    def recommendations(self):
        e, role = self.evidence, self.evidence.best_ce
        settings = ", ".join(f"{name} {value(name, self._value(role, name))}" for name in self.names)
        steps = f"trained for {self._value(role, 'n_steps'):,} steps (`best_ce`)"
        production = [f"Use {role}: {settings}, {steps}. {self._like('test_ce')}"]
        for factor in ("d", "rank", "batch_size", "seq_len"):
            own = e.own_level(e.base, factor)
            smaller = [pair for level, pair in self.evidence.moved(e.base, factor).items() if level < own]
            good = [points for points, ce in smaller
                    if points["verdict"] in (SAME, BETTER) and ce["verdict"] != WORSE]  # fmt: skip
            if good:
                production.append(f"{FACTORS[factor]} {good[0]['a']} instead of {own:g} costs less: {effect(good[0])}.")
        further = [f"{FACTORS[name]}: search {span(entry)} instead of {span(self.space[name])}."
                   for name, entry in self.next_space.items() if entry != self.space[name]]  # fmt: skip
        further = further or ["No range is changed by this evidence."]
        next_space = f"`next_space.yaml` is this space; `-p space` of tune.ipynb takes it. {verdicts.NEXT_RULE}"
        further += filter(None, [self._longer(), next_space])
        cost = memory.considerations(self.memory, self.memory_table, role, self.about["largest_batch"])
        return sections(production, further, [memory.peak(self.complete, self.budget["n_replicas"]), *cost])

    def undecided(self):
        e, lines = self.evidence, []
        for base, factor in e.ablated():
            pairs = [pair for pair in e.moved(base, factor).values() if pair[0]["verdict"] == UNDECIDED]
            if pairs:
                levels = [(self._level(factor, float(points["a"])), ce["verdict"]) for points, ce in pairs]
                said = ", ".join(x + f" (its CE is {word})" * (word != UNDECIDED) for x, word in levels)
                decides = e.what_decides([points for points, _ in pairs])
                lines.append(
                    f"{FACTORS[factor]}{self._where(base)}: {said}. If the effects are what they look like, {decides} "
                    "in 80 % of reports."
                )
        if self.claims_table is not None:
            still = self.claims_table[self.claims_table["verdict"].isin([UNDECIDED, verdicts.NOT_TESTED])]
            lines += [f"“{row['claim']}”: {row['verdict']}." for _, row in still.iterrows()]
        listed = "\n".join(f"- {line}" for line in lines) or "- Nothing that was asked."
        return f"Levels are listed whose accuracy is undecided; where their CE is not, it is said.\n\n{listed}"

    def measured(self):
        e, t = self.evidence, self.evidence.tests
        spreads = t[t["score"] == "test_accuracy"].groupby("paired")["sd"].median()
        found = [f"{e.seeds_to_find({'sd': sd, 'paired': paired}, 0.02)} seeds where "
                 f"{'pairs differ' if paired else 'scores vary'} by {100 * sd:.2f} points"
                 for paired, sd in spreads.items()]  # fmt: skip
        return super().measured() + (
            f"\n- **Confirmation**: {e.n_seeds} fresh seeds a configuration, the same for all; the score is on "
            f"{self._n_test():,} test samples{self._unseen('test', ' that no training and no tuning has seen')}. "
            "Comparisons are Welch's "
            "test, or a paired one where shapes are equal; an interval is 95 % for its comparison alone, while all "
            f"{len(t)} p-values of this report are Holm-adjusted together, and so are the "
            f"{t['p_equivalence'].notna().sum()} equivalence tests (two one-sided tests, one accuracy point). "
            "(The two claims about what trials 1 and 2 scored are decided by 95 % intervals of `reports/reproduce`.) "
            "The best is ablated with other seeds than those that chose it. Comparisons find a true "
            f"effect of two points in 80 % of reports with {' and with '.join(found)} (median standard deviation over "
            "seeds)."
        )

    def reproduce(self):
        a, runs, task = self.about, self._once(), self._given()
        command = (
            f"papermill notebooks/confirm.ipynb runs/confirm.ipynb -p study_name again -p task {task} "
            f"-p n_seeds {a['n_seeds']} -p n_test {a['n_test']} -p n_top {a['n_top']} -p seed {a['seed']}"
        )
        used = "; ".join(", ".join(sorted(set(map(str, runs[name])))) for name in ("commit", "torch", "device"))
        minutes = runs["train_seconds"].sum() / 60
        return super().reproduce() + (
            f"\n\n- Confirmation and ablation: {escape(used)}; {len(runs)} configurations, {minutes:.1f} minutes of "
            f"training and scoring.\n\n```\n{command}\n```"
        )

    def raw_data(self):
        """Write the tables and the next space beside the database too, and list them."""
        tables = {"confirmed.csv": (self.runs, "every confirmed and ablated run, a row a seed"),
                  "comparisons.csv": (self.evidence.tests, "every test of this report"),
                  "importance.csv": (self.importance, "importance with intervals"),
                  "memory.csv": (self.memory_table, "peak memory, measured and predicted"),
                  "claims.csv": (self.claims_table, "the original's claims with their verdicts")}  # fmt: skip
        lines = [super().raw_data()]
        for name, (frame, what) in tables.items():
            if frame is not None:
                frame.to_csv(self.folder / name, index=False)
                lines.append(f"- [`{name}`]({name}): {what}")
        about = self.about | {"memory_rule": self.memory._asdict() if self.memory else None}
        texts = {"next_space.yaml": (yaml.safe_dump(self.next_space, sort_keys=False), "the space for the next search"),
                 "about.json": (json.dumps(about, indent=1) + "\n", "seeds, samples, memory")}  # fmt: skip
        for name, (text, what) in texts.items():
            (self.folder / name).write_text(text, encoding="utf-8")
            lines.append(f"- [`{name}`]({name}): {what}")
        return "\n".join(lines)

    def gaps(self):
        """One row a confirmed trial: trial, val_accuracy of its tuning and test_accuracy, with _low and _high."""
        rows = []
        for role in self.evidence.roles:
            if role.startswith("trial "):
                row = self.trials.set_index("trial").loc[int(role.removeprefix("trial "))]
                interval = evidence.mean_interval(self.evidence.group("", "role", role)["test_accuracy"])
                now = zip(("test_accuracy", "test_accuracy_low", "test_accuracy_high"), interval, strict=True)
                then = row[["val_accuracy", "val_accuracy_low", "val_accuracy_high"]]
                rows.append({"trial": row.name} | dict(then) | dict(now))
        return pd.DataFrame(rows)

    def _once(self):
        """One row a training, however many questions it answers."""
        runs = self.runs.assign(ablated=self.runs["base"] != "")
        return runs.drop_duplicates([*HYPERPARAMETERS, "n_steps", "ablated"])

    def _n_test(self):
        return self.task.get("n_samples", {}).get("test", self.about["n_test"])

    def _value(self, role, name):
        return self.evidence.group("", "role", role)[name][0]

    def _score(self, role, name):
        scores = self.evidence.group("", "role", role)[name]
        interval = evidence.mean_interval(scores, nats=name == "test_ce")
        return f"{nats(interval)} nats" if name == "test_ce" else percent(interval)

    @staticmethod
    def _level(factor, level):
        return value(factor.split(",")[0], level)

    def _where(self, base):
        return "" if base == self.evidence.base else " at published trial 2's other settings"

    def _like(self, score):
        """Which confirmed configurations are not told from the best by a score."""
        t = self.evidence.tests
        others = t[(t["kind"] == "confirmed") & (t["score"] == score)]
        same = others.loc[others["p_holm"] >= LEVEL, "a"]
        by = ("accuracy" if score == "test_accuracy" else "CE") + f" ({', '.join(same)})" * bool(len(same))
        return f"{len(same)} of the {len(others)} other confirmed configurations cannot be told from it by {by}."

    def _against_rule(self):
        role, (rule, level, others) = self.evidence.best_accuracy, best_rule(self.baselines)
        mean, *ends = evidence.mean_interval(self.evidence.group("", "role", role)["test_accuracy"])
        ends += evidence.sample_interval(mean, self._n_test())  # seeds and samples both leave something open
        word = "above" if min(ends) > level else "below" if max(ends) < level else "not distinguishable from"
        return (
            f"**The best accuracy is {word} {rule}**, the best simple rule, which scores {100 * level:.1f} % of test "
            f"samples{others}."
        )

    def _winners_curse(self):
        gaps = self.gaps()
        if len(gaps) < 2:
            return None
        then, now = gaps["val_accuracy"], gaps["test_accuracy"]
        mean, low, high, _ = (100 * x for x in evidence.compare(then, now, paired=True))
        return (
            f"**The winner's curse{'' if low > 0 else ' is not shown'}**: tuning scores lay {mean:+.1f} [{low:+.1f}, "
            f"{high:+.1f}] accuracy points from confirmed ones on average over {len(gaps)} trials, and "
            f"{100 * max(then - now):+.1f} at most."
        )

    def _goal(self):
        if not self.is_original_task:
            return None
        reached = {name: self.evidence.group("", "role", self.best[name])[name].mean() for name in GOAL}
        points, ce = GOAL["test_accuracy"] - reached["test_accuracy"], reached["test_ce"] - GOAL["test_ce"]
        missed = [(points, f"accuracy by {100 * points:.1f} points"), (ce, f"CE by {ce:.3f} nats")]
        missed = [what for gap, what in missed if gap > 0]
        goal = f"This project's goal of {100 * GOAL['test_accuracy']:.1f} % and {GOAL['test_ce']} nats is "
        goal += f"missed**: {' and '.join(missed)}" if missed else "reached**: both"
        return f"**{goal}. {self._longer()}".rstrip()

    def _steps(self, base):
        """For how many steps each batch size is trained where all see equally many samples."""
        e = self.evidence
        steps = [f"{e.group(base, EQUAL_SAMPLES, x)['n_steps'][0]:,} at {x:g}" for x in e.levels(base, EQUAL_SAMPLES)]
        return f" (as many steps as let each see equally many samples: {', '.join(steps)})"

    def _equal_samples(self):
        """What the batch size does where all see equally many samples."""
        found = [points for points, _ in self.evidence.moved(self.evidence.base, EQUAL_SAMPLES).values()]
        said = "; ".join(f"{p['a']} is {p['verdict']} ({effect(p)})" for p in found)
        said = said if {p["verdict"] for p in found} - {UNDECIDED} else "nothing is decided"
        return f" A smaller batch sees fewer samples in equally many steps; at equal samples {said}."

    def _longer(self):
        """What the longest training does, if that is decided."""
        e = self.evidence
        own, levels = e.own_level(e.base, "n_steps"), e.moved(e.base, "n_steps")
        if not levels or max(levels) < own or levels[max(levels)][1]["p_holm"] >= LEVEL:
            return ""
        points, ce = levels[max(levels)]
        reached = percent(evidence.mean_interval(e.group(e.base, "n_steps", max(levels))["test_accuracy"]))
        return (
            f"Training longer {'lowers' if ce['effect'] < 0 else 'raises'} CE: {max(levels):,.0f} steps instead of "
            f"{own:,} change it by {effect(ce)}; accuracy by {effect(points)} ({points['verdict']}), to {reached}."
        )

    def _importance_finding(self):
        shares = self.importance
        if shares.empty:
            return None
        placebo = f"a placebo ({100 * shares.set_index('name').loc[PLACEBO, 'importance']:.0f} %)"
        above = shares[(shares["name"] != PLACEBO) & shares["beats_placebo"].astype(bool)]
        if above.empty:
            return f"**Importance**: no hyperparameter's share is told from that of {placebo}, which does nothing."
        shown = [(NAMES[name], percent(shares)) for name, *shares, _ in above.itertuples(index=False)]
        said = ", ".join(f"{name} ({share})" for name, share in shown)
        return f"**Importance**: only {said} beats {placebo}; the other shares are not told from noise."

    def _other_verdicts(self):
        """Verdicts that other records decide: the reproduction's tables and memory."""
        found, folder = {}, storage.REPORTS / "reproduce"
        if self.runs["route_accuracy"].isna().all():
            reason = (
                "this record holds the share of the last layer's router alone, which need not be the one that routes"
            )
            found[verdicts.HELPS_ROUTING] = (verdicts.NOT_TESTED, reason)
        if (folder / "trial_1_seeds.csv").exists():
            one, two = (scores_of_seeds(folder / f"trial_{n}_seeds.csv") for n in (1, 2))
            found |= verdicts.from_reproduction(one, two, published.TABLE.loc[2, "val_accuracy"])
        if self.memory and self.about["largest_batch"]:
            on_gpu = not pd.concat([self.complete["device"], self.runs["device"]]).str.startswith("CPU").any()
            found |= memory.claims(self.memory, self.task, self.about["largest_batch"], on_gpu)
        return found


def scores_of_seeds(path):
    """The test_accuracy and test_ce of the seeds that have both, from a CSV file of audit.original.seed_scores.

    Raises InputError for a file with fewer than two such seeds.
    """
    largest = {"test_accuracy": 1, "test_ce": 1000}
    scores = files.table(path, numbers=largest).dropna()
    if len(scores) < 2:
        raise InputError(f"{path}: expected at least two seeds with test_accuracy and test_ce, got {len(scores)}")
    return scores
