"""The report: its numbers are the record's, its page is whole, and what comes from outside stays text."""

import functools
import json
import pickle
import re
from dataclasses import asdict, replace
from pathlib import Path

import jinja2
import matplotlib.pyplot as plt
import numpy as np
import optuna
import pandas as pd
import pytest
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

from ctbprn_lib import InputError, evidence, report, scoring, search, storage, tasks
from ctbprn_lib.audit import simulate
from ctbprn_lib.confirm import choose_best
from ctbprn_lib.model import CTBPRN
from ctbprn_lib.report import comparisons, facts, figures
from ctbprn_lib.report import text as form
from ctbprn_lib.train import Budget

ROOT = Path(__file__).parent.parent
SCORES_OF = {"val_accuracy": ["val_accuracy"], "both": ["val_ce", "val_accuracy"]}  # an objective's


def made(reports, n_trials=14, n_replicas=3, name="made", failed=True, slope=-0.08, **asked):
    """A study with invented scores: CE falls with lr (or rises, with slope), and accuracy grows with the rank too."""
    task = tasks.RoutingTask()
    budget = Budget(100, n_replicas)
    study = search.open_study(
        name, task=task, space=search.default_space(task), budget=budget, sampler="random", **asked
    )
    rng, drawn = np.random.default_rng(0), optuna.create_study(sampler=study.sampler)
    for number in range(n_trials):
        trial = drawn.ask()
        hp = search.suggest(trial, search.default_space(task))
        trial.suggest_float(search.PLACEBO, 0, 1)
        ce = 0.5 + slope * np.log10(hp.lr / 1e-4) + rng.normal(0, 0.01, (2, n_replicas)) + [[0.2], [0]]
        accuracy = 1 - ce / 2 + hp.rank / 1000  # so that the best by it is not the best by CE
        kept = {"val_ce": ce[-1].mean(), "val_accuracy": accuracy[-1].mean(), "steps": [50, 100],
                "curves": {"val_ce": ce.tolist(), "val_accuracy": accuracy.tolist(), "train_ce": ce.tolist()},
                "n_diverged": 0, "train_seconds": float(rng.uniform(5, 50)), "step_time_ms": 3.0, "samples_seen": 100,
                "peak_mem_mib": float(rng.uniform(50, 500)), "n_parameters": 1000 * hp.d, "device": "CPU, 1 threads",
                "torch": "2", "optuna": "5", "python": "3", "commit": "abc"}  # fmt: skip
        values = [kept[name] for name in SCORES_OF.get(asked.get("objective"), ["val_ce"])]
        state = optuna.trial.TrialState.COMPLETE
        if failed and number == 3:
            kept["failure"], values, state = "all replicas <b>diverged</b>", None, optuna.trial.TrialState.FAIL
        record = dict(params=trial.params, distributions=trial.distributions, user_attrs=study.marks | kept)
        study.add_trial(optuna.create_trial(state=state, values=values, **record))
    return study


def made_up(outside="x", **changes):
    """Facts of a confirmed study that no database holds; outside stands wherever a name from outside can stand."""
    rows = []
    for number, state in enumerate(["complete", "complete", "complete", "pruned", "fail"]):
        row = {"trial": number, "state": state, "failure": outside if state == "fail" else ""}
        row |= dict(lr=1e-3, d=32, rank=4, temperature=1.0, batch_size=8, seq_len=64, n_steps=10, train_seconds=1.0)
        row |= dict(peak_mem_mib=50 + number, n_parameters=1000, n_diverged=int(number == 1))
        row |= dict(sampler="tpe", pruner="none", precision="fp32")
        row |= dict.fromkeys(("device", "torch", "optuna", "python", "commit"), outside)
        for name in search.SCORES:
            row |= {name: 0.8 - number / 100, f"{name}_low": 0.7, f"{name}_high": 0.9}
        rows.append(row | {"val_ce_0": 0.8, "val_ce_1": 0.75 + number / 50})
    task = {"task": outside, "n_areas": 2, "n_tokens": 128, "n_features": 4, "n_classes": 3}
    question = {"task": task, "space": search.default_space(tasks.RoutingTask()), "objective": "val_ce", "seed": 0}
    question["budget"] = asdict(Budget(100, 2))
    samples = {"copies": {"train": 1}, "grouped": True, "untested": {"test": [outside] * 5}, "tested": 1, "constant": 1,
               "n_features": 4, "largest_share": 0.9, "given": outside}  # fmt: skip
    baselines = {"majority class": 0.5, "linear rule": 0.9}
    made = facts.Facts("made-up", question, task, samples, baselines, pd.DataFrame(rows), ((5, "fail", outside),), {})
    effects = {("d", 32): -0.05, ("without", "message"): -0.2, ("n_steps", 1000): 0.02}
    runs = simulate.runs(16, np.random.default_rng(0), effects, spread=0.1).assign(
        **dict.fromkeys(("device", "torch", "commit"), outside), train_seconds=1.0
    )
    runs = runs.assign(test_balanced_accuracy=0.5, peak_mem_mib=runs["d"], n_parameters=1000)
    names = {"^trial 7": "trial 1", "^trial 3": "trial 0"}
    runs = runs.replace(dict.fromkeys(("role", "base", "name"), names), regex=True)
    runs.loc[runs["role"] == "defaults", "lr"] = 1e-3
    runs.loc[runs["seed"] > 12, "route_accuracy"] = 0.6
    about = dict(n_test=8192, n_top=3, seed=0, best=choose_best(runs))
    about["largest_batch"] = {"batch_size": 64, "free_mib": 100, "tried_twice": True}
    made = replace(made, **changes)
    older = runs[(runs["without"] == "") & (runs["seed"] < 4)].drop(columns=["name", "without"])
    older = older.assign(route_accuracy=np.nan)
    base = comparisons.ablated(runs)
    plan = comparisons.plan(runs, base, "trial 0", with_claims=comparisons.has_claims(made.task))
    short = runs[(runs["without"] == "noise") & (runs["seed"] < 8)].assign(n_steps=1000)
    newer = pd.concat([runs, short.assign(name=short["name"] + ", 1000 steps")], ignore_index=True)
    newer = newer[(newer["seed"] < 8) | newer["name"].str.contains("again|message|n_steps")]
    known = {"base": base, "best_trial": "trial 0", "plan": json.loads(json.dumps(asdict(plan))), "out_of_time": True}
    return made, *(
        replace(made, confirmed=facts.confirmed(made, *record))
        for record in ((older, about | {"n_seeds": 4}), (newer, about | known))
    )


def test_the_whole_template_is_filled_by_facts_that_no_database_holds():
    for made in made_up("routing"):
        for section in report.sections():
            text = report.render(made, section)
            assert text and not re.search(r"nan\b|None|[{}]{2}|\d\.\d{6}|  ", text), (section, text)


def test_what_a_record_of_today_has_more_than_those_of_before():
    _, older, newer = made_up("routing")
    before, now = ({name: report.render(one, name) for name in report.sections()} for one in (older, newer))
    assert "no network without one of its parts" in before["parts"] and "does not hold" in before["routing"]
    assert "time that was given ended" in now["summary"] and "ended before" not in before["summary"]
    assert "trained again with 8 to 16 fresh seeds each" in now["summary"]
    assert "with 4 fresh seeds each" in before["summary"]
    message = next(line for line in now["parts"].splitlines() if line.startswith("| the message"))
    assert (
        message.endswith("| 16 | < 0.001 | worse |") and "noise on the gates in training, 1,000 steps" in now["parts"]
    )
    assert "**Without the message between areas** the network is worse (-2" in now["key_findings"]
    assert "Length of training: 1000 instead of 500 is better: +" in now["recommendations"]
    seeds = newer.confirmed.comparisons.runs
    learnt = seeds["route_accuracy"] >= 0.9
    start = f"**{learnt.sum()} of {len(seeds)} seeds have learnt to route**"
    means = [f"{100 * seeds.loc[group, 'test_accuracy'].mean():.1f} %" for group in (learnt, ~learnt)]
    for section in ("routing", "key_findings"):
        assert start in now[section] and f"is {means[0]}; that of the others is {means[1]}." in now[section]
    own = newer.confirmed.comparisons.run(f"{newer.confirmed.base} again")
    cell = f"16: {(own['route_accuracy'] >= 0.9).sum()} of {len(own)}"
    assert cell in next(line for line in now["routing"].splitlines() if line.startswith("| Router rank |"))
    finding = newer.confirmed.comparisons.tuning["defaults"]
    verdict = f"best tuning score (trial 0) is {form.verdict(finding)} as the untuned defaults"
    assert finding.verdict == evidence.SAME and verdict in now["key_findings"]


def test_a_search_that_time_ended_says_so_and_what_is_recommended_is_what_is_shown():
    given = {"minutes": 1.5, "n_trials": 40}
    assert "1.5 minutes that were given ended the search before it had 40 trials" in report.render(
        made_up("routing", out_of_time=given)[0], "summary"
    )
    assert "ended the search" not in report.render(made_up("routing")[0], "summary")
    newer = made_up("routing")[2]
    longer = next(name for name in newer.confirmed.runs["name"] if name.endswith("n_steps 1000"))
    about = newer.confirmed.about | {"recommended": longer}
    newer = replace(newer, confirmed=replace(newer.confirmed, about=about))
    best, advice = (report.render(newer, section) for section in ("best_parameters", "recommendations"))
    accuracy = form.percent(newer.confirmed.interval(longer, "test_accuracy"))
    row = next(line for line in best.splitlines() if "(recommended" in line)
    assert f"| **{form.configuration(longer)}** (recommended)" in row and f"| {accuracy.replace(' %', '')} |" in row
    assert "trained for 1,000 steps" in row and "| 1,000 |" in row and "`recommended.safetensors`" in best
    assert f"- Use {form.configuration(longer)}:" in advice and "n_steps 1,000. Its weights are" in advice


@pytest.mark.parametrize("lost", ["ablation", "again"])
def test_a_record_that_time_ended_before_its_ablation_has_every_section(lost):
    made, older, _ = made_up("routing")
    runs, about = older.confirmed.runs, older.confirmed.about | {"best_trial": "trial 0"}
    runs = runs[~runs["name"].str.contains(": | again" if lost == "ablation" else " again")]
    ended = replace(made, confirmed=facts.confirmed(made, runs.drop(columns=["name", "without"]), about))
    texts = {section: report.render(ended, section) for section in report.sections()}
    assert ended.confirmed.ablations == [] and not re.search(r"nan\b|None", " ".join(texts.values()))
    assert set(ended.confirmed.comparisons.findings) >= {"trial 0 against defaults"}


def test_data_of_ones_own_has_levels_and_parts_but_no_claims():
    _, older, newer = made_up("my data.npz")
    for one in (older, newer):
        assert not any(finding.question.is_claim for finding in one.confirmed.comparisons.findings.values())
        assert (
            "tested in its report" in report.render(one, "claims") and "lr 0.0004" in one.confirmed.comparisons.findings
        )


def test_a_name_that_the_facts_do_not_have_is_an_error():
    with pytest.raises(jinja2.UndefinedError, match="'dict object' has no attribute 'task'"):
        report.render(replace(made_up()[0], task={}), "summary")
    with pytest.raises(AttributeError):
        report.render(made_up()[0], "no_such_section")


def numbers(text):
    return [float(x) for x in re.findall(r"-?\d+\.?\d*(?:e-?\d+)?", text)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(report, complete trials of its CSV) of a made study."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "REPORTS", tmp_path_factory.mktemp("reports"))
        patch.delenv("CTBPRN_STORAGE", raising=False)
        made(None)
        r, folder = report.load("made"), storage.study_folder("made")
        report.write_tables(r, folder)
    csv = pd.read_csv(folder / "optuna_results_detailed.csv")
    return r, csv[csv["state"] == "complete"]


def like_the_best(done):
    """The other complete trials that Welch's test, Holm-adjusted by hand, does not tell from the best by CE."""
    replicas = done.set_index("trial")[[f"val_ce_{i}" for i in range(3)]]
    best = done.loc[done["val_ce"].idxmin(), "trial"]
    others = replicas.drop(index=best)
    raw = others.apply(lambda row: stats.ttest_ind(row, replicas.loc[best], equal_var=False).pvalue, axis=1)
    told = raw.sort_values() * np.arange(len(raw), 0, -1) < 0.05
    return sorted(told.index[~told.cummin()])


def test_every_number_of_the_findings_is_recomputed_from_the_csv(whole):
    r, done = whole
    best, accurate = done.loc[done["val_ce"].idxmin()], done.loc[done["val_accuracy"].idxmax()]
    text = report.render(r, "key_findings")
    first = text.splitlines()[0]
    ce = [best[f"val_ce{end}"] for end in ("", "_low", "_high")]
    accuracy = [100 * best[f"val_accuracy{end}"] for end in ("", "_low", "_high")]
    expected = [1, best["trial"], *np.round(ce, 3), *np.round(accuracy, 1)]
    assert numbers(first)[: len(expected)] == pytest.approx(expected, abs=0.0501)
    assert f"by accuracy it is number {accurate['trial']} (" in first and accurate["trial"] != best["trial"]
    same = like_the_best(done)
    assert numbers(text.splitlines()[1])[1:3] == [len(same), len(done) - 1]
    assert text.splitlines()[1].endswith(f": {', '.join(map(str, same))}.")
    rho = stats.spearmanr(done["lr"], done["val_ce"]).statistic  # nothing was pruned, so the rank is that of CE
    trend = next(line for line in text.splitlines() if "Learning rate: larger values go with better trials" in line)
    assert f"{rho:+.2f}" in trend
    undecided = next(line for line in text.splitlines() if "No trend" in line)
    assert "Router rank" in undecided and "Learning rate" not in undecided


def test_the_best_parameters_under_a_title_are_those_of_the_trial_that_is_best_by_it(whole):
    r, done = whole
    _, by_accuracy, by_ce = report.render(r, "best_parameters").split("### For Best ")
    for text, title, trial in (
        (by_accuracy, "Validation Accuracy", done.loc[done["val_accuracy"].idxmax()]),
        (by_ce, "CE Loss", done.loc[done["val_ce"].idxmin()]),
    ):
        assert text.startswith(f"{title} (trial {trial['trial']})\n")
        assert f"**Validation accuracy**: {100 * trial['val_accuracy']:.1f} % [" in text
        assert f"**Validation CE**: {trial['val_ce']:.3f} [" in text
        for name in r.names:
            assert f"- **{form.NAMES[name]}**: {form.setting(trial[name], name)}" in text.splitlines()


RULES = [("linear rule", "majority class"), ("majority class", "linear rule")]


@pytest.mark.parametrize(("rule", "worse"), RULES)
def test_the_best_rule_is_above_or_below_the_best_accuracy_only_outside_both_intervals(whole, rule, worse):
    r, done = whole
    best = done.loc[done["val_accuracy"].idxmax()]
    samples = proportion_confint(round(2048 * best["val_accuracy"]), 2048, method="wilson")
    lows, highs = zip(samples, best[["val_accuracy_low", "val_accuracy_high"]], strict=True)
    between = "not distinguishable from"
    for level, word in ((min(lows) - 0.001, "above"), (np.mean(lows), between), (best["val_accuracy"], between),
                        (np.mean(highs), between), (max(highs) + 0.001, "below")):  # fmt: skip
        r = replace(r, baselines={worse: level - 0.1, rule: level})
        said = [line for line in report.render(r, "key_findings").splitlines() if ". **The best accuracy is " in line]
        expected = f"is {word} {form.RULES[rule]}**, the best simple rule, which scores {100 * level:.1f} % on test"
        assert len(said) == 1 and expected in said[0]
        assert f" samples ({form.RULES[worse]} {100 * (level - 0.1):.1f} %): " in said[0]
        assert "2,048 validation samples leave it [{:.1f}, {:.1f}]".format(*(100 * x for x in samples)) in said[0]


def test_the_cheapest_trial_that_cannot_be_told_from_the_best_is_named(whole):
    r, done = whole
    done = done.set_index("trial")
    cost = done["n_parameters"] * done["batch_size"] * done["seq_len"]
    best, cheapest = done["val_ce"].idxmin(), cost[like_the_best(done.reset_index())].idxmin()
    assert cost[cheapest] < 0.9 * cost[best]  # or there would be nothing to say
    said = f"Trial {cheapest} cannot be told from it by CE and costs {100 * cost[cheapest] / cost[best]:.0f} % as much"
    text = report.render(r, "recommendations")
    assert said in text and f"Start from trial {best}: " in text


def test_the_table_holds_every_trial_rounded_as_people_read(whole):
    text = report.render(whole[0], "all_trials")
    rows = [line for line in text.splitlines() if re.match(r"\| \d", line)]
    assert len(rows) == 14
    assert not re.search(r"\d\.\d{6}", text)
    assert r"\<b\>" in text and "<b>" not in text


def end_of(entry, x):
    """The end of its range that a value is the last level at, or within a twentieth of."""
    if isinstance(entry, list):
        return {min(entry): "lower", max(entry): "upper"}.get(x)
    low, high, at = (np.log(y) if entry.get("log") else y for y in (entry["low"], entry["high"], x))
    share = (at - low) / (high - low)
    return "lower" if share < 0.05 else "upper" if share > 0.95 else None


@pytest.mark.parametrize("slope", [-0.08, 0.08])  # the best has the largest lr, and the smallest
def test_a_recommendation_needs_a_decided_trend_and_goes_its_way(reports, slope):
    made(reports, 16, failed=False, slope=slope)
    r = report.load("made")
    best, expected = r.complete.loc[r.complete["val_ce"].idxmin()], []
    for name in (trend["hyperparameter"] for trend in r.trends if trend["p_holm"] < 0.05):
        falls = stats.spearmanr(r.complete[name], r.complete["val_ce"]).statistic < 0
        word, end = ("larger", "upper") if falls else ("smaller", "lower")
        assert f"**{form.NAMES[name]}: {word} values go with better trials**" in report.render(r, "key_findings")
        if end_of(r.space[name], best[name]) == end and not (name == "seq_len" and best[name] == 128):
            there = f"the best value, {form.setting(best[name], name)}, lies at the {end} end of its range"
            expected.append(f"- {form.NAMES[name]}: {there}; extend it.")
    further = report.render(r, "recommendations").split("### For Further Optimization")[1].split("###")[0]
    assert [line for line in further.splitlines() if "the best value" in line] == expected
    assert expected[0].startswith("- Learning rate: ")
    assert "Router rank" in next(line for line in further.splitlines() if "Not decided" in line)


@pytest.fixture
def few_resamples(monkeypatch):
    """Importance in a tenth of the time, for tests to which its intervals do not matter."""
    monkeypatch.setattr(evidence, "importance", functools.partial(evidence.importance, n_resamples=30))


@pytest.mark.parametrize("asked", [{"objective": "both", "pruner": "none"}, {"objective": "val_accuracy"}])
@pytest.mark.parametrize(("n_trials", "n_replicas"), [(1, 1), (2, 2), (14, 3)])
def test_small_and_other_studies_have_every_section_too(reports, few_resamples, asked, n_trials, n_replicas):
    made(reports, n_trials, n_replicas, failed=n_trials > 3, **asked)
    r = report.load("made")
    for section in report.sections():
        text = report.render(r, section)
        assert text and "nan" not in text, section
    assert "notebooks/confirm.ipynb" in report.render(r, "settings")
    assert set(r.importance["name"]) <= {*r.names, search.PLACEBO}
    score, better = ("val_accuracy", max) if asked["objective"] == "val_accuracy" else ("val_ce", min)
    complete = r.trials[score].where(r.trials["state"] == "complete").dropna()
    assert list(r.running_best) == [better(complete.loc[:number]) for number in range(n_trials)]


def test_a_study_without_a_complete_trial_says_why(reports):
    study = made(reports, 0)
    trial = study.ask()
    trial.set_user_attr("sampler", "random")
    trial.set_user_attr("failure", "all 3 replicas diverged")
    study.tell(trial, state=optuna.trial.TrialState.FAIL)
    with pytest.raises(InputError, match="no complete trial: all 3 replicas diverged"):
        report.load("made")


def test_the_pickle_is_the_study_and_holds_no_way_to_a_database(reports):
    made(reports, 2)
    report.write_study("made", "", reports / "made")
    content = (reports / "made" / "optuna_studies" / "ctbprn_study.pkl").read_bytes()
    assert b"sqlite" not in content
    assert len(pickle.loads(content).trials) == 2


def test_the_saved_networks_score_what_their_files_say():
    for name in ("recommended", "best_accuracy", "best_ce"):
        content = json.loads((ROOT / "reports" / "ctbprn" / f"{name}.json").read_text())
        model = CTBPRN.load(ROOT / "reports" / "ctbprn" / content["weights"]["file"])
        seq_len = content["hyperparameters"]["seq_len"]
        scores = scoring.score(model, tasks.RoutingTask(), "test", 1024, seq_len)
        sd = (content["weights"]["test_accuracy"] * (1 - content["weights"]["test_accuracy"]) / 1024) ** 0.5
        assert abs(scores["test_accuracy"][0] - content["weights"]["test_accuracy"]) < 4 * sd
        assert 0.9 < content["test_accuracy"]["low"] < content["test_accuracy"]["mean"] < 1


def test_text_from_outside_stays_text():
    assert form.outside("<b>|`*_[x]") == "\\<b\\>\\|\\`\\*\\_\\[x\\]"
    assert "\n" not in form.outside("a\nb") and "\x1b" not in form.outside("\x1b[31m")


@pytest.mark.parametrize("asked", [
    {}, {"objective": "both", "pruner": "none"}, {"objective": "val_accuracy", "pruner": "hyperband", "seed": 3},
])  # fmt: skip
def test_the_command_of_the_report_asks_what_the_study_asked(reports, asked):
    study = made(reports, 1, **asked)
    words = report.render(report.load("made"), "reproduce").split("papermill", 1)[1].split()
    given = dict(zip(words[3::3], words[4::3], strict=False))
    assert words[2:-1:3] == ["-p"] * len(given)
    how = study.marks | {"objective": asked.get("objective", "val_ce"), "seed": str(asked.get("seed", 0))}
    assert how["sampler"] == "random" and {name: given[name] for name in how} == how


def test_a_replica_that_diverged_leaves_the_curves_of_the_others():
    _, ax = plt.subplots()
    curves = {"trial 1": [[0.7, 0.5, 0.6], [0.6, 0.4, np.nan]]}
    figures.learning_curves(ax, [1, 2], curves, "val_ce")
    assert ax.lines[0].get_ydata().tolist() == [pytest.approx(0.6), pytest.approx(0.5)]


def test_all_levels_of_a_slice_are_in_the_picture_in_whatever_order_the_space_names_them():
    trials = pd.DataFrame({"trial": [0, 1, 2], "d": [32, 64, 128], "val_ce": [0.5, 0.4, 0.3]})
    for levels in ([32, 128, 64], [128, 64, 32]):
        _, ax = plt.subplots()
        low, high = figures.slice_of(ax, trials, "d", "val_ce", levels).get_xlim()
        assert low < 32 and high > 128
