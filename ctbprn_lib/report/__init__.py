"""From a study's record to the pieces of its report: Markdown whose every number is the record's, formatted once."""

import functools
import math
import pickle
import re

import numpy as np
import optuna
import pandas as pd
import yaml

from ctbprn_lib import InputError, evidence, files, memory
from ctbprn_lib.search import HYPERPARAMETERS, edge, load_study, records
from ctbprn_lib.storage import study_folder

NAMES = {
    "lr": "Learning rate",
    "d": "Width d",
    "rank": "Router rank",
    "temperature": "Temperature",
    "batch_size": "Batch size",
    "seq_len": "Sequence length",
    "n_layers": "Layers",
}


def accuracy(row):
    """Accuracy with its interval, in per cent."""
    return _with_interval(row, "val_accuracy", 100, ".1f", " %")


def balanced(row):
    """Balanced accuracy with its interval, in per cent."""
    return _with_interval(row, "val_balanced_accuracy", 100, ".1f", " %")


def ce(row):
    """Cross-entropy with its interval, in nats."""
    return _with_interval(row, "val_ce", 1, ".3f", "")


def percent(interval):
    """(mean, low, high) as shares, in per cent."""
    return "{:.1f} % [{:.1f}, {:.1f}]".format(*(100 * x for x in interval))


def nats(interval):
    """(mean, low, high) of a cross-entropy."""
    return "{:.3f} [{:.3f}, {:.3f}]".format(*interval)


def number(x, digits):
    """x with that many digits after the point, halves away from zero, as the original printed 0.78125 as 0.7813."""
    return f"{x + math.copysign(1e-9, x):.{digits}f}"


def value(name, x):
    """A hyperparameter as people read it."""
    if x is None or (isinstance(x, float) and math.isnan(x)):
        return "–"
    if name == "lr":
        return f"{x:.2g}" if x < 1e-3 else f"{x:.5f}".rstrip("0")
    return f"{x:.2f}" if name == "temperature" else f"{x:g}"


def table(header, rows):
    """A Markdown table; rows hold cells that are Markdown already."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


RULES = {"majority class": "always naming the largest class", "linear rule": "the linear rule"}
SHOW_BALANCED = 0.6  # share of the largest class above which accuracy says little by itself


def rules(baselines):
    """Baselines under today's names: studies of before called the majority class chance."""
    return {{"chance": "majority class"}.get(rule, rule): level for rule, level in baselines.items()}


def best_rule(baselines):
    """(name, accuracy, the others as text) of the simple rule that a result must beat: the best one."""
    level = {rule: baselines[rule] for rule in RULES if rule in baselines}
    best = max(level, key=level.get)
    others = ", ".join(f"{RULES[rule]} {100 * x:.1f} %" for rule, x in level.items() if rule != best)
    return RULES[best], level[best], f" ({others})" if others else ""


def names_of(classes, most=3):
    """Class names from outside, the first few of them."""
    shown = ", ".join(f"“{escape(name)}”" for name in classes[:most])
    return shown + (f" and {len(classes) - most} more" if len(classes) > most else "")


def sections(production, further, memory):
    """The three lists of recommendations under the original's headings."""
    titles = ("For Production Use", "For Further Optimization", "Memory Considerations")
    lists = ("\n".join(f"- {line}" for line in lines) for lines in (production, further, memory))
    return "\n\n".join(f"### {title}\n{lines}" for title, lines in zip(titles, lists, strict=True))


def escape(text):
    """Text from outside as Markdown and HTML both show it literally, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&$])", lambda m: f"&#{ord(m[0])};", files.printable(text))


class Report:
    """A study's record, read once, and the report's sections made from it; findings.py has the confirmed one."""

    confirmed = False
    stale = False  # a confirmation of a deleted study of the same name is left out

    def __init__(self, study_name, storage=""):
        self.study = load_study(study_name, storage)
        self.name, self.folder = study_name, study_folder(study_name)
        self.asked = self.study.user_attrs["fingerprint"]
        self.budget, self.space, self.task = self.asked["budget"], self.asked["space"], self.asked["task"]
        self.score = "val_accuracy" if self.asked["objective"] == "val_accuracy" else "val_ce"
        self.facts = self.study.user_attrs.get("facts", {})
        self.baselines = rules(self.study.user_attrs.get("baselines", {}))
        self.show_balanced = self.facts.get("largest_share", 0) > SHOW_BALANCED
        self.names = [name for name in HYPERPARAMETERS if name in self.space]
        self.trials = records(self.study)
        self.complete = self.trials[self.trials["state"] == "complete"].reset_index(drop=True)
        if self.complete.empty:
            reasons = set(self.trials["failure"]) - {""}
            raise InputError(
                f"study {study_name!r} has no complete trial" + (f": {'; '.join(reasons)}" if reasons else "")
            )
        self.n_validation = min(self.task.get("n_samples", {}).get("validation", math.inf), self.budget["n_validation"])
        self.by_accuracy = self.complete.sort_values(["val_accuracy", "val_ce"], ascending=[False, True]).iloc[0]
        self.by_ce = self.complete.loc[self.complete["val_ce"].idxmin()]
        replicas = [f"val_ce_{r}" for r in range(self.budget["n_replicas"])]
        known = self.complete[replicas].to_numpy()
        best = int(self.by_ce.name)
        self.level = [best] if known.shape[1] < 2 else evidence.like_the_best(known, best)
        # pruned trials count too, or the trends would be those of the survivors; the longer one was let run the better
        ended = self.trials[self.trials["state"].isin(["complete", "pruned"])]
        ended = ended.sort_values(["n_steps", "val_ce"], ascending=[False, True])
        self.ended = ended.assign(standing=range(len(ended)))
        self.trends = evidence.trends(self.ended, self.names, "standing").set_index("hyperparameter")

    def summary(self):
        counts = self.trials["state"].value_counts()
        states = ", ".join(f"{counts[s]} {s}" for s in ("complete", "pruned", "fail", "running") if s in counts)
        return (
            f"> Which hyperparameters of CTBPRN are best on **{escape(self.task['task'])}**? {len(self.trials)} trials "
            f"({states}), each {self.budget['n_replicas']} trainings (replicas) of {self.budget['n_steps']} "
            "steps; scores are means over replicas on held-out data, with 95 % intervals."
            + ("" if self.confirmed else " They are tuning scores: the best of many is partly luck, and none has been "
               "trained again on fresh seeds.")
            + (" The database also holds a confirmation of an earlier study of this name, which was deleted; it is "
               "left out." if self.stale else "")
        )  # fmt: skip

    def best_parameters(self):
        parts = []
        for title, row in (("Best Validation Accuracy", self.by_accuracy), ("Best CE Loss", self.by_ce)):
            lines = [f"### For {title} (trial {row['trial']})", f"- **Validation accuracy**: {accuracy(row)}",
                     f"- **Validation CE**: {ce(row)} nats"]  # fmt: skip
            if self.show_balanced:
                lines.insert(2, f"- **Balanced validation accuracy**: {balanced(row)}")
            lines += [f"- **{NAMES[name]}**: {value(name, row[name])}" for name in self.names]
            parts.append("\n".join(lines))
        return "\n\n".join(parts)

    def all_trials(self):
        header = ["Trial", "Val accuracy (%)", "Val CE (nats)", *(NAMES[n] for n in self.names), "Time (s)", "State"]
        ordered = self.trials.sort_values(["state", "val_ce"])
        if self.show_balanced:
            header.insert(2, "Balanced (%)")
        rows = [
            [row["trial"], accuracy(row).replace(" %", ""), ce(row), *(value(n, row[n]) for n in self.names),
             f"{row['train_seconds']:.0f}" if row["train_seconds"] >= 0 else "–", row["state"]]
            for _, row in ordered.iterrows()
        ]  # fmt: skip
        if self.show_balanced:
            for cells, (_, row) in zip(rows, ordered.iterrows(), strict=True):
                cells.insert(2, balanced(row).replace(" %", ""))
        notes = "Complete trials by CE; a pruned trial shows its score when it was stopped."
        failures = [
            f"Trial {r['trial']} failed: {escape(r['failure'])}." for _, r in self.trials.iterrows() if r["failure"]
        ]
        diverged = self.trials[self.trials["n_diverged"] > 0]
        if len(diverged):
            failures.append(
                f"Replicas diverged in trials {', '.join(map(str, diverged['trial']))}; each counts as chance there."
            )
        foreign = []
        for trial in self.study.foreign():
            reason = trial.user_attrs.get("failure")
            foreign.append(f"{trial.number} ({trial.state.name.lower()}{f': {escape(reason)}' if reason else ''})")
        if foreign:
            failures.append(f"Left out, because other programs put them into the study: trials {', '.join(foreign)}.")
        return "\n\n".join([table(header, rows), " ".join([notes, *failures])])

    def confirmed_results(self):
        return "No configuration has been trained again yet; `notebooks/confirm.ipynb` does that."

    ablation = claims = confirmed_results

    def key_findings(self):
        """Numbered findings, each with its test; where the trials do not decide, it says so."""
        best, rest = self.by_ce, [self.complete.loc[i] for i in self.level[1:]]
        findings = [
            f"**The best trial is number {best['trial']} by CE** ({ce(best)} nats, accuracy {accuracy(best)})"
            + (" and by accuracy." if best["trial"] == self.by_accuracy["trial"] else
               f"; by accuracy it is number {self.by_accuracy['trial']} ({accuracy(self.by_accuracy)}).")
        ]  # fmt: skip
        if self.budget["n_replicas"] < 2:
            findings.append(
                "**With one replica a trial nothing can be told apart**: how far scores vary between seeds is not "
                "known, so no test is made."
            )
        elif len(self.complete) > 1:
            findings.append(
                f"**{len(rest)} of the {len(self.complete) - 1} other complete trials cannot be told from it** by CE "
                f"(Welch's test on {self.budget['n_replicas']} replicas a trial, Holm-adjusted, 5 %)"
                + (f": {', '.join(str(r['trial']) for r in rest)}." if rest else ".")
            )
        if self.baselines:
            findings.append(self._against_rule())
        for name, row in self.trends.iterrows():
            if self._decided(row):
                word = "larger" if row["rho"] < 0 else "smaller"
                findings.append(
                    f"**{NAMES[name]}: {word} values go with better trials** (Spearman ρ = {row['rho']:+.2f} with the "
                    f"trial's rank, {row['n']:.0f} trials, Holm-adjusted p {_p(row['p_holm'])})."
                )
        undecided = [NAMES[name] for name, row in self.trends.iterrows() if not self._decided(row)]
        if undecided:
            findings.append(f"**No trend is shown by these trials for**: {', '.join(undecided)}.")
        return "\n".join(f"{i}. {finding}" for i, finding in enumerate(findings, 1))

    def _against_rule(self):
        """The best accuracy beside the best simple rule."""
        row, n = self.by_accuracy, self.n_validation
        rule, level, others = best_rule(self.baselines)
        low, high = evidence.sample_interval(row["val_accuracy"], n)
        over = f" over replicas, balanced over classes {balanced(row)}" if self.show_balanced else " over replicas"
        if self.budget["n_replicas"] < 2:
            title, over = (
                f"The best accuracy, of one replica, stands beside {rule}",
                over.removeprefix(" over replicas"),
            )
        else:
            ends = np.array([[low, high], [row["val_accuracy_low"], row["val_accuracy_high"]]])
            apart = "above" if (level < ends).all() else "below" if (level > ends).all() else ""
            title = f"The best accuracy is {apart or 'not distinguishable from'} {rule}"
        return (
            f"**{title}**, the best simple rule, which "
            f"scores {100 * level:.1f} % on test samples{others}: the trial scores {accuracy(row)}{over}, and "
            f"{n:,} validation samples leave it [{100 * low:.1f}, {100 * high:.1f}]. Being the best of "
            f"{len(self.complete)} complete trials, it needs confirming."
        )

    def recommendations(self):
        best = self.by_ce
        settings = ", ".join(f"{name} {value(name, best[name])}" for name in self.names)
        production = [
            f"Start from trial {best['trial']}: {settings}. Train it again on fresh seeds before relying on its score."
        ]
        # parameters × tokens a step: unlike seconds, it does not depend on what else the machine was doing
        cost = self.complete["n_parameters"] * self.complete["batch_size"] * self.complete["seq_len"]
        cheapest = cost[self.level].idxmin()
        if cost[cheapest] < 0.9 * cost[best.name]:
            production.append(
                f"Trial {self.complete.loc[cheapest, 'trial']} cannot be told from it by CE and costs "
                f"{100 * cost[cheapest] / cost[best.name]:.0f} % as much arithmetic a step (parameters × tokens)."
            )
        further = [
            f"{NAMES[name]}: the best value, {value(name, best[name])}, lies at the {end} end of its range; extend it."
            for name in self.names
            if self._decided(self.trends.loc[name])
            and (end := self._edge(name, best)) == ("upper" if self.trends.loc[name, "rho"] < 0 else "lower")
        ]
        undecided = [NAMES[n] for n, row in self.trends.iterrows() if not self._decided(row)]
        further = further or ["No decided trend runs into the end of a range, so none is extended on this evidence."]
        if undecided:
            further.append(f"Not decided here, so nothing is recommended: {', '.join(undecided)}.")
        largest = self.complete.loc[self.complete["peak_mem_mib"].idxmax()]
        shape = ", ".join(f"{n} {value(n, largest[n])}" for n in ("d", "batch_size", "seq_len"))
        cost = [
            memory.peak(self.complete, self.budget["n_replicas"]),
            f"Trial {largest['trial']} ({shape}) took the most, trial {best['trial']} {best['peak_mem_mib']:.0f} MiB.",
        ]
        return sections(production, further, cost)

    def measured(self):
        b = self.budget
        device, precision = (", ".join(sorted(set(self.complete[name]))) for name in ("device", "precision"))
        sampled = "`" + "`, `".join(f"{name}: {span(self.space[name])}" for name in self.names) + "`"
        return (
            f"- **Task**: {escape(self.task['task'])}, {self.task['n_areas']} areas × {self.task['n_tokens']} tokens × "
            f"{self.task['n_features']} features. It is the same for all trials: `seq_len` is how many of the first "
            "tokens the network sees, while the label comes from all of them.\n"
            f"- **Space**: {sampled}.\n"
            f"- **A trial** is {b['n_replicas']} replicas with their own initial values, batches and noise, trained "
            f"together for {b['n_steps']} steps (AdamW, {b['schedule'].replace('_', '-')} rate, gradient norm at "
            f"most {b['clip']:g} a replica, precision {precision}) on {escape(device)}.\n"
            f"- **A score** is the mean over replicas on {self.n_validation:,} validation samples"
            f"{self._unseen('validation', ' that no training batch holds')}, without gate noise, after the last step. "
            "The interval is Student's t over replicas: the seed "
            "is the unit of replication, not the sample. CE is in nats.\n"
            f"{self._samples()}"
            f"- **The search** ({' and then '.join(self._searches())}) asks for the best "
            f"`{self.asked['objective']}` on the validation set. A trial's rank: complete trials by CE, then pruned "
            "ones by how long they were let run and by CE. The trials are what the sampler tried, not an experiment on "
            "one hyperparameter at a time."
        )

    def _unseen(self, split, where_true):
        """What can be said of the samples of a split: where_true, or how many of them are copies, or nothing."""
        if self.task["task"] == "routing":  # drawn afresh
            return where_true
        n = self.facts.get("copies", {}).get(split)  # an older study has not counted them
        if n:
            return f" ({n} of them exact {'copies' if n > 1 else 'copy'} of samples in other splits)"
        return "" if n is None else where_true

    def _samples(self):
        """What a reader of a score should know about the samples, where they come from recordings."""
        facts, n_classes = self.facts, self.task.get("n_classes", 2)
        if "copies" not in facts:
            return ""
        said = f"{n_classes} classes, of which {facts['tested']} have test samples."
        for split, absent in facts["untested"].items():
            if absent:
                said += f" Without a {split} sample, and so no part of {split} scores: {names_of(absent)}."
        if self.show_balanced:
            said += (
                f" The largest class has {100 * facts['largest_share']:.0f} % of the samples, so balanced accuracy "
                "(the mean over classes of the share that is right; naming one class alone gives "
                f"{100 / max(facts['tested'], 1):.0f} %) stands beside accuracy."
            )
        if facts["grouped"]:
            said += " Samples of one group (subject, session or recording) are on one side of the split."
        n_copies = {split: n for split, n in facts["copies"].items() if n}
        if n_copies:
            counted = ", ".join(f"{n} {split}" for split, n in n_copies.items())
            said += f" Exact copies of samples in another split: {counted} samples."
        if facts["constant"]:
            said += f" {facts['constant']} of {facts['n_features']} features are constant in training and count as 0."
        return f"- **Samples**: {said}\n"

    def _searches(self):
        """Every sampler and pruner that trials were made with, in the order of their first use."""
        used = self.trials.drop_duplicates(["sampler", "pruner"])
        return [f"sampler {row['sampler']}, pruner {row['pruner']}" for _, row in used.iterrows()]

    def undecided(self):
        lines = [
            f"{NAMES[name]}: Spearman ρ with the rank {row['rho']:+.2f}, Holm-adjusted p {_p(row['p_holm'])}."
            for name, row in self.trends.iterrows()
            if not self._decided(row) and np.isfinite(row["rho"])
        ]
        lines.append(
            "Whether the best trial stays best on fresh seeds and on test samples: no trial has been trained again."
        )
        if self.budget["n_replicas"] < 2:
            lines.append("Which trial is best: with one replica a trial nothing can be told apart.")
        if self.level[1:]:
            lines.append(
                f"Which of {len(self.level)} trials is best: their intervals over replicas do not separate them."
            )
        return "\n".join(f"- {line}" for line in lines)

    def reproduce(self):
        t = self.complete
        b, q, task = self.budget, self.asked, self._given()
        commands, ended = [], self.trials[self.trials["state"].isin(["complete", "pruned"])]
        changed = (ended[["sampler", "pruner"]] != ended[["sampler", "pruner"]].shift()).any(axis=1).cumsum()
        for _, part in ended.groupby(changed):
            n_trials = int((ended["trial"] <= part["trial"].max()).sum())
            commands.append(
                f"papermill notebooks/tune.ipynb runs/tune.ipynb -p study_name again -p task {task} "
                f"-p n_trials {n_trials} -p n_steps {b['n_steps']} "
                f"-p n_replicas {b['n_replicas']} -p objective {q['objective']} -p sampler {part['sampler'].iloc[0]} "
                f"-p pruner {part['pruner'].iloc[0]} -p seed {q['seed']} "
                f"-p precision {b['precision']} -p space reports/{self.name}/space.yaml"
            )
        command = "\n".join(commands)
        names = {"commit": "commit", "torch": "torch", "Optuna": "optuna", "Python": "python", "device": "device"}
        used = "; ".join(f"{name} {', '.join(sorted(set(map(str, t[key]))))}" for name, key in names.items())
        minutes = self.trials["train_seconds"].sum() / 60
        return f"- {escape(used)}.\n- Training and scoring took {minutes:.1f} minutes.\n\n```\n{command}\n```"

    def _given(self):
        """The task as a word of a command: the path it was loaded from."""
        return files.word(self.facts.get("given", self.task["task"]))

    def curves(self, name):
        """(steps, {label: (evaluations, R)}) of the two best and the two worst complete trials by CE."""
        ordered = self.complete.sort_values("val_ce")["trial"].tolist()
        chosen = dict.fromkeys(ordered[:2] + ordered[-2:])
        kept = {t.number: t.user_attrs for t in self.study.get_trials(deepcopy=False)}
        kept = {number: kept[number] for number in chosen}
        steps = next(iter(kept.values()))["steps"]
        return steps, {f"trial {number}": np.array(k["curves"][name], dtype=float) for number, k in kept.items()}

    def running_best(self):
        """(trials,) the best score of the complete trials so far, NaN before the first."""
        score = self.trials[self.score].where(self.trials["state"] == "complete")
        return (score.cummax() if self.score == "val_accuracy" else score.cummin()).ffill().to_numpy()

    @functools.cached_property
    def importance(self):
        """evidence.importance over the finished trials, ranked as their standing; empty for fewer than ten."""
        if len(self.ended) < 10:
            return pd.DataFrame(columns=["name", "importance", "low", "high", "beats_placebo"])
        trials = {t.number: t for t in self.study.get_trials(deepcopy=False)}
        return evidence.importance([trials[number] for number in self.ended["trial"]], self.ended["standing"])

    def raw_data(self):
        """Write the CSV and the pickled study into self.folder, and list them and the database."""
        studies = self.folder / "optuna_studies"
        studies.mkdir(parents=True, exist_ok=True)
        self.trials.to_csv(self.folder / "optuna_results_detailed.csv", index=False)
        (self.folder / "space.yaml").write_text(yaml.safe_dump(self.space, sort_keys=False), encoding="utf-8")
        copy = optuna.storages.InMemoryStorage()  # the pickle holds the trials, not the way to a database
        optuna.copy_study(from_study_name=self.name, from_storage=self.study._storage, to_storage=copy)
        with open(studies / "ctbprn_study.pkl", "wb") as file:
            pickle.dump(optuna.load_study(study_name=self.name, storage=copy), file)
        lines = [
            "- Complete trial data: [`optuna_results_detailed.csv`](optuna_results_detailed.csv)",
            "- Optuna study: [`optuna_studies/ctbprn_study.pkl`](optuna_studies/ctbprn_study.pkl) (a pickle runs code "
            "when it is loaded: open only one you trust; this project never reads it)",
            "- [`space.yaml`](space.yaml): the space that was searched",
        ]
        if (study_folder(self.name) / "optuna_studies" / "ctbprn_study.db").exists():
            lines.append("- Database: [`optuna_studies/ctbprn_study.db`](optuna_studies/ctbprn_study.db) (SQLite)")
        return "\n".join(lines)

    def _decided(self, row):
        return bool(row["p_holm"] < 0.05)

    def _edge(self, name, best):
        there_are_no_more_tokens = name == "seq_len" and best[name] >= self.task["n_tokens"]
        return "" if there_are_no_more_tokens else edge(self.space[name], best[name])


def _with_interval(row, name, scale, form, unit):
    if math.isnan(row[name]):
        return "–"
    if math.isnan(row[f"{name}_low"]):
        return f"{scale * row[name]:{form}}{unit}"
    low, high = scale * row[f"{name}_low"], scale * row[f"{name}_high"]
    return f"{scale * row[name]:{form}}{unit} [{low:{form}}, {high:{form}}]"


def _p(p):
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"


def span(entry):
    """A hyperparameter's levels or range, as people read them."""
    if isinstance(entry, list):
        return ", ".join(f"{x:g}" for x in entry)
    return f"{entry['low']:g} to {entry['high']:g}" + (" (log)" if entry.get("log") else "")
