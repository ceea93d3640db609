"""A confirmed report: every number of its prose is recomputed here from the CSV and JSON files beside it."""

import functools
import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import optuna
import pandas as pd
import pytest
import yaml
from scipy import stats
from scipy.special import expit, logit
from statsmodels.stats.proportion import proportion_confint
from statsmodels.stats.weightstats import ttost_ind, ttost_paired
from test_report import made, made_up

from ctbprn_lib import evidence, memory, report, search, storage, tasks
from ctbprn_lib.audit import simulate
from ctbprn_lib.evidence import AT_MOST, BETTER, NOT_TESTED, REFUTED, SAME, SUPPORTED, UNDECIDED, WORSE
from ctbprn_lib.report import text as form

EFFECTS = {("d", 32): -0.03, ("rank", 4): -0.02, ("n_steps", 1000): 0.02, ("seq_len", 32): -0.1}
WORLDS = {
    "invented": dict(effects=EFFECTS),
    # what is above is below here: the rule, the tuning scores, the longest training and a smaller batch
    "opposite": dict(
        effects={("d", 16): -0.03, ("rank", 2): -0.03, ("rank", 4): -0.02, ("rank", 8): -0.005, ("batch_size", 4): 0.03,
                 ("n_steps", 1000): -0.03}, spread=0.005, accuracy=0.72),
}  # fmt: skip


def confirmed(n_seeds=8, name="made", effects=EFFECTS, spread=0.07, accuracy=simulate.ACCURACY):
    """Invented confirmed scores beside an invented study, kept as confirm.ipynb keeps them."""
    study = search.load_study(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulate, "ACCURACY", accuracy)
        runs = simulate.runs(n_seeds, np.random.default_rng(3), effects, spread=spread)
    runs = runs[runs["without"] == ""]  # as a record of before has them
    kept = optuna.create_study(study_name=f"{name}/confirm", storage=study._storage)
    kept.set_user_attr("of", study.user_attrs["id"])
    plan, keys = [], {}
    for (role, base, factor, level), rows in runs.groupby(["role", "base", "factor", "level"], dropna=False):
        scores = {k: rows[k].tolist() for k in ("test_accuracy", "test_ce", "route_accuracy")}
        hp = {k: rows[k].iloc[0].item() for k in search.HYPERPARAMETERS}
        n_steps = int(rows["n_steps"].iloc[0])
        key = keys.setdefault(json.dumps(scores), f"{len(keys)}")
        run = dict(role=role, base=base, factor=factor, level=level, hyperparameters=hp, n_steps=n_steps, key=key)
        plan.append(run)
        mib = 40 + 3e-5 * hp["d"] * hp["batch_size"] * hp["seq_len"]
        scores["route_accuracy_1"] = scores["route_accuracy"]
        record = scores | {"key": key, "mean_test_ce": float(np.mean(scores["test_ce"])), "n_classes": 2}
        record |= {"diverged_at": [None] * n_seeds, "train_seconds": 2.5, "step_time_ms": 1.0, "peak_mem_mib": mib}
        record |= {"n_parameters": 1000 * hp["d"]} | dict.fromkeys(search.ORIGIN, "1") | {"device": "CPU, 1 thread"}
        if len(keys) > len(kept.get_trials(deepcopy=False)):
            kept.add_trial(optuna.create_trial(value=record["mean_test_ce"], user_attrs=record))
    kept.set_user_attr("plan", plan)
    about = dict(
        n_seeds=n_seeds, n_test=8192, n_top=3, seed=0, baselines={"linear rule": 0.958, "majority class": 0.501}
    )
    counted = memory.of_published_trial()
    about |= {"recommended": "published trial 2", "memory": counted, "memory_of_trial_2": counted}
    kept.set_user_attr("about", about)


def invented(root, **world):
    """(folder, pieces) of a report on a study where a few levels matter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "REPORTS", root)
        patch.delenv("CTBPRN_STORAGE", raising=False)
        patch.setattr(evidence, "importance", functools.partial(evidence.importance, n_resamples=30))
        made(None, failed=False)
        confirmed(**world)
        return written(report.load("made"), storage.study_folder("made"))


def written(facts, folder):
    """(folder, pieces) of a report whose tables are written to a folder."""
    report.write_tables(facts, folder)
    return folder, {name: report.render(facts, name) for name in PIECES}


@pytest.fixture(scope="module", params=[*WORLDS, "committed"])
def folder(request, tmp_path_factory):
    """Reports of invented studies, and of the committed one from its database."""
    if request.param in WORLDS:
        return invented(tmp_path_factory.mktemp("reports"), **WORLDS[request.param])
    place = tmp_path_factory.mktemp("reports") / "ctbprn"
    shutil.copytree(COMMITTED, place, ignore=shutil.ignore_patterns("*.csv", "report.*", "optuna_plots"))
    return written(report.load("ctbprn"), place)


COMMITTED = Path(__file__).parent.parent / "reports" / "ctbprn"
PIECES = ("raw_data", "summary", "verdict", "best_parameters", "settings", "ablation", "claims", "key_findings",
          "words", "recommendations", "undecided", "measured", "reproduce", "all_trials", "effects", "parts",
          "importance", "confirmed_finding", "trials_finding", "routing_finding", "ablation_finding")  # fmt: skip


def said(interval, scale=100, digits=1):
    mean, low, high = (f"{scale * x:.{digits}f}" for x in interval)
    return f"{mean} % [{low}, {high}]" if scale == 100 else f"{mean} [{low}, {high}]"


def interval(scores, name="test_accuracy"):
    """A second implementation of the interval over seeds."""
    mean = np.mean(scores)
    half = stats.t.ppf(0.975, len(scores) - 1) * np.std(scores, ddof=1) / len(scores) ** 0.5
    if name == "test_ce":
        return mean, mean / np.exp(half / mean), mean * np.exp(half / mean)
    half /= mean * (1 - mean)
    return mean, expit(logit(mean) - half), expit(logit(mean) + half)


@pytest.fixture(scope="module")
def tables(folder):
    return read(folder[0]) | {"pieces": folder[1]}


def read(place):
    csv = {name: pd.read_csv(place / f"{name}.csv", keep_default_na=name != "claims")
           for name in ("confirmed", "comparisons", "claims", "importance")}  # fmt: skip
    csv["trials"] = pd.read_csv(place / "optuna_results_detailed.csv")
    return csv | {"about": json.loads((place / "about.json").read_text())}


def base_of(tables):
    """The role whose hyperparameters were moved."""
    runs = tables["confirmed"]
    return runs.loc[runs["factor"] == "lr", "base"].iloc[0]


def of_role(tables, role, name):
    runs = tables["confirmed"]
    return runs.loc[runs["role"] == role, name].to_numpy()


def of_level(tables, base, factor, level, name):
    runs = tables["confirmed"]
    runs = runs[(runs["base"] == base) & (runs["factor"] == factor) & (runs["level"] == level)]
    return runs.sort_values("seed")[name]


WEIGHTS = {8: 0.4, 16: 0.2, 32: 0.2, 64: 0.1, 128: 0.1}


def p_values(a, b, margin, paired):
    """{seeds: p-values against no difference, one of -margin or less, and one of margin or more} at each look."""
    found = {}
    for n in (n for n in WEIGHTS if n <= min(len(a), len(b))):
        x, y = a[:n], b[:n]
        zero = (stats.ttest_rel(x, y) if paired else stats.ttest_ind(x, y, equal_var=False)).pvalue
        one_sided = (
            ttost_paired(x, y, -margin, margin) if paired else ttost_ind(x, y, -margin, margin, usevar="unequal")
        )
        found[n] = np.array([zero, one_sided[1][1], one_sided[2][1]])
    return found


def verdict(question, scores, n_questions):
    """A second implementation of the verdict on a question, from the rows of its contrasts."""
    k, effects, best, worst, below, above = len(question), [], 1.0, 1.0, [], []
    for row in question.itertuples():
        a, b = scores[row.a], scores[row.b]
        looks = p_values(a, b, row.margin, row.paired)
        adjusted = {n: p / WEIGHTS[n] for n, p in looks.items()}
        for n, (zero, _, _) in adjusted.items():
            if a[:n].mean() > b[:n].mean():
                best = min(best, zero)
            else:
                worst = min(worst, zero)
        below.append(min(p[1] for p in adjusted.values()))
        above.append(min(p[2] for p in adjusted.values()))
        n = max(looks)
        effects.append(a[:n].mean() - b[:n].mean())
    level, is_claim, margin = 0.05 / n_questions, question["is_claim"].iloc[0], question["margin"].iloc[0]
    looks_good = max(effects) > 0 and min(effects) > -margin
    if 2 * k / (k + 1) * max(below + above) <= level:
        return SAME
    if k * best <= level and max(below) <= level:
        return SUPPORTED if is_claim else BETTER
    if k * worst <= level and not looks_good:
        return REFUTED if is_claim else WORSE
    bound = -question["low"].min() if is_claim else max(-question["low"].min(), question["high"].max())
    return AT_MOST if bound <= 3 * margin else UNDECIDED


def check(tables):
    """Recompute every comparison and every verdict from the runs. Returns the verdicts."""
    runs, table = tables["confirmed"].drop_duplicates(["name", "seed"]), tables["comparisons"]
    verdicts, m = {}, table["question"].nunique()
    for name, question in table.groupby("question", sort=False):
        if question["seeds"].isna().any():
            assert (question["verdict"] == "not tested yet").all()
            continue
        of_score = runs.sort_values("seed").groupby("name")[question["score"].iloc[0]]
        scores = {side: of_score.get_group(side).to_numpy() for side in {*question["a"], *question["b"]}}
        for t in question.itertuples():
            n = int(t.seeds)
            a, b = scores[t.a][:n], scores[t.b][:n]
            assert n == max(look for look in WEIGHTS if look <= min(len(scores[t.a]), len(scores[t.b])))
            shapes = runs.drop_duplicates("name").set_index("name")[["d", "rank", "n_layers"]]
            same_seeds = runs.loc[runs["name"].isin([t.a, t.b]), "role"].isna().nunique() == 1
            assert t.paired == (same_seeds and (shapes.loc[t.a] == shapes.loc[t.b]).all())
            test = stats.ttest_rel(a, b) if t.paired else stats.ttest_ind(a, b, equal_var=False)
            ends = test.confidence_interval(1 - 0.05 * WEIGHTS[n] / len(question))
            expected = (np.mean(a) - np.mean(b), ends.low, ends.high, *p_values(a, b, t.margin, t.paired)[n])
            measured = (t.effect, t.low, t.high, t.p_zero, t.p_below, t.p_above)
            assert measured == pytest.approx(expected, rel=1e-6, abs=1e-12)
        verdicts[name] = question["verdict"].iloc[0]
        assert verdicts[name] == verdict(question, scores, m), name
    return verdicts


def test_every_comparison_and_every_verdict_is_recomputed_from_the_runs(tables):
    verdicts = check(tables)
    assert len(verdicts) > 40 and {WORSE, SAME} < set(verdicts.values())
    assert f"this report asks {tables['comparisons']['question'].nunique()} questions" in tables["pieces"]["measured"]


def test_seeds_that_came_in_blocks_and_parts_of_the_network_are_recomputed_too(tmp_path):
    place, _ = written(made_up("routing")[2], tmp_path)
    verdicts = check(read(place))
    assert verdicts["without message"] == verdicts["d 32"] == WORSE and verdicts["without noise"] == SAME
    assert verdicts["n_steps 1000"] == BETTER


def test_the_best_are_the_best_of_the_confirmed_table(folder, tables):
    _, pieces = folder
    runs = tables["confirmed"]
    means = runs[runs["role"].notna()].groupby("role")[["test_accuracy", "test_ce"]].mean()
    for name, best in (("accuracy", means["test_accuracy"].idxmax()), ("CE", means["test_ce"].idxmin())):
        marked = [line for line in pieces["best_parameters"].splitlines() if f"best {name}" in line]
        marked += [line for line in pieces["best_parameters"].splitlines() if f"and {name} of" in line]
        assert len(marked) == 1 and best in marked[0]
    use = tables["about"]["recommended"]
    chosen = next(line for line in pieces["best_parameters"].splitlines() if "(recommended" in line)
    assert chosen.startswith(f"| **{form.configuration(use)}** (")
    for role in means.index:
        rows = pieces["best_parameters"].splitlines()
        row = next(line for line in rows if re.match(rf"\| (\*\*)?{role}(\*\*)? (\(|\|)", line))
        cells = [cell.strip() for cell in row.split("|")[1:-1]]
        assert int(cells[3]) == len(of_role(tables, role, "seed"))
        assert cells[1] == said(interval(of_role(tables, role, "test_accuracy"))).replace(" %", "")
        assert cells[2] == said(interval(of_role(tables, role, "test_ce"), "test_ce"), 1, 3)
        routed = 100 * of_role(tables, role, "route_accuracy")
        shown = f"{routed.mean():.1f} ({routed.min():.1f} to {routed.max():.1f})"
        assert cells[-1] == ("–" if np.isnan(routed).all() else shown)


@pytest.mark.parametrize("piece", ["verdict", "key_findings", "recommendations", "claims"])
def test_every_effect_in_the_prose_is_one_of_the_comparisons(folder, tables, piece):
    known = tables["comparisons"][["effect", "low", "high"]].to_numpy()
    seeds_of = tables["comparisons"]["seeds"].to_numpy()
    others = r"What it gains.*points|tuning scores lay.*accuracy points|trial 1 has.*points beside"
    text = re.sub(others, "", folder[1][piece])
    numbers = re.findall(r"([+-][\d.]+) \[([+-][\d.]+), ([+-][\d.]+)\] points(?:, (\d+) seeds, p \(× (\d+)\))?", text)
    assert numbers or piece in ("verdict", "recommendations")
    for *effect, seeds, n_questions in numbers:
        is_it = (np.abs(known - np.array([float(x) / 100 for x in effect])) < 0.00051).all(1)
        assert (is_it & (seeds_of == int(seeds)) if seeds else is_it).any(), effect
        assert not seeds or int(n_questions) == tables["comparisons"]["question"].nunique()


def test_the_row_of_a_hyperparameter_says_what_each_level_is(folder, tables):
    lines = folder[1]["settings"].splitlines()
    for factor in ("lr", "d", "rank", "batch_size", "seq_len", "n_steps"):
        own, rows = moved(tables, factor)
        row = next(line for line in lines if line.startswith(f"| {form.FACTORS[factor]} |"))
        _, _, recommended, better, worse, other, cheapest, seeds, _ = (cell.strip() for cell in row.split("|"))
        use = tables["confirmed"].query("name == @tables['about']['recommended']")[factor].iloc[0]
        assert recommended == form.setting(use, factor)
        for verdict, cell in ((BETTER, better), (WORSE, worse)):
            of = rows[rows["verdict"] == verdict]
            shown = [f"{form.setting(level, factor)} ({form.signed_points(e)})" for level, e in of["effect"].items()]
            assert cell == (", ".join(shown) or "–")
        assert all(form.setting(level, factor) in other for level in rows.index[~rows["verdict"].isin([BETTER, WORSE])])
        less = rows.index[(rows.index < own) & rows["verdict"].isin([SAME, BETTER])]
        assert cheapest == (form.setting(less[0], factor) if len(less) and factor != "lr" else "–")
        assert int(seeds.split(" to ")[-1]) >= rows["seeds"].max()


def test_the_tables_of_the_ablations_are_recomputed(folder, tables):
    base, runs = base_of(tables), tables["confirmed"]
    parts = re.split(r"^\*\*(.+)\*\*, against", folder[1]["ablation"], flags=re.M)
    assert len(parts) > 10
    for title, part in zip(parts[1::2], parts[2::2], strict=True):
        factor = next(name for name, label in form.FACTORS.items() if label == title)
        own, rows = moved(tables, factor)
        lines = [line.split(" | ") for line in part.splitlines() if re.match(r"\| [\d.]", line)]
        assert len(lines) == len(rows)
        for (level, row), cells in zip(rows.iterrows(), lines, strict=True):
            assert cells[0] == f"| {form.setting(level, factor)}" and cells[-1].startswith(row["verdict"])
            numbers = [float(x) / 100 for x in re.findall(r"[+-][\d.]+", cells[1])]
            assert numbers == pytest.approx(row[["effect", "low", "high"]].tolist(), abs=0.00051)
            a, b = (of_level(tables, base, factor, x, "test_ce").to_numpy() for x in (level, own))
            a, b = a[: len(b)], b[: len(a)]  # the seeds that both have
            test = stats.ttest_rel(a, b) if row["paired"] else stats.ttest_ind(a, b, equal_var=False)
            ce = [np.mean(a) - np.mean(b), *test.confidence_interval()]
            assert [float(x) for x in re.findall(r"[+-][\d.]+", cells[2])] == pytest.approx(ce, abs=0.00051)
            assert int(cells[3]) == row["seeds"] == len(a)
    assert runs["name"].nunique() >= len(lines)


def test_whether_tuning_paid_is_said(folder, tables):
    t, text = tables["comparisons"].set_index("question"), folder[1]["key_findings"]
    score = tables["trials"].query("state == 'complete'").set_index("trial")["val_ce"]
    best, found = f"trial {score.idxmin()}", re.findall(r"\*\*(.*[Tt]uning .*pa(?:id|y))\*\*: .*", text)
    asked = [name for name in t.index if name.startswith(f"{best} against")]
    assert len(found) == bool(asked)
    if asked:
        words = {BETTER: "Tuning paid", SAME: "Tuning did not pay", WORSE: "Tuning did not pay"}
        assert found[0] == words.get(t.loc[asked[0], "verdict"], "It is not shown that tuning paid")


def test_the_winners_curse_the_goal_and_the_rule_are_recomputed(folder, tables):
    text = folder[1]["key_findings"]
    runs, trials = tables["confirmed"], tables["trials"].set_index("trial")["val_accuracy"]
    means = runs[runs["role"].notna()].groupby("role")[["test_accuracy", "test_ce"]].mean()
    ours = [role for role in means.index if role.startswith("trial")]
    gaps = 100 * np.array([trials[int(role.split()[1])] - means.loc[role, "test_accuracy"] for role in ours])
    half = stats.t.ppf(0.975, len(gaps) - 1) * np.std(gaps, ddof=1) / len(gaps) ** 0.5
    ends = f"[{gaps.mean() - half:+.1f}, {gaps.mean() + half:+.1f}]"
    shown = "" if gaps.mean() > half else " is not shown"
    assert f"**The winner's curse{shown}**: tuning" in text
    assert f"lay {gaps.mean():+.1f} {ends} accuracy points" in text
    assert f"over {len(gaps)} trials, and {gaps.max():+.1f} at most" in text
    if folder[0].name == "ctbprn":  # the goal is this project's, and stands in no report of a user
        use = runs[runs["name"] == tables["about"]["recommended"]]
        accuracy, ce = use["test_accuracy"].mean(), use["test_ce"].mean()
        missed = {f"accuracy by {100 * (0.995 - accuracy):.1f} points": accuracy < 0.995}
        missed[f"CE by {ce - 0.02:.3f} nats"] = ce > 0.02
        assert all((what in text) == so for what, so in missed.items())
        assert f" nats is {'missed' if any(missed.values()) else 'reached'}**: " in text
    else:
        assert "goal" not in text
    rule, n_test = tables["about"]["baselines"]["linear rule"], tables["about"]["n_test"]
    name = tables["about"].get("recommended", means["test_accuracy"].idxmax())
    accuracy, *ends = interval(runs[runs["name"] == name]["test_accuracy"].to_numpy())
    ends += proportion_confint(round(n_test * accuracy), n_test, method="wilson")
    word = "above" if rule < min(ends) else "below" if rule > max(ends) else "not distinguishable from"
    subject = "What is recommended" if "recommended" in tables["about"] else "The best accuracy"
    beside = f"**{subject} is {word} the linear rule**, the best simple rule, which scores {100 * rule:.1f} %"
    assert beside in text and "always naming the largest class 50." in text


def moved(tables, factor):
    """(own level, one row a level against it, by level) of the ablation of a factor."""
    base, runs, t = base_of(tables), tables["confirmed"], tables["comparisons"]
    mine = runs[(runs["base"] == base) & (runs["factor"] == factor)].drop_duplicates("level").set_index("name")["level"]
    t = t[~t["is_claim"] & (t["b"] == f"{base} again") & t["a"].isin(mine.index)]
    own = of_role(tables, base, factor.removesuffix(", equal samples"))[0]
    return own, t.assign(level=t["a"].map(mine)).set_index("level").sort_index()


def test_levels_that_are_better_or_cost_less_are_recommended(folder, tables):
    better, cheaper, expected = [], [], {}
    for factor in ("lr", "d", "rank", "temperature", "batch_size", "seq_len", "n_steps"):
        own, rows = moved(tables, factor)
        label = form.FACTORS[factor]
        good = rows[rows["verdict"] == BETTER]
        if len(good):
            level = good["effect"].idxmax()
            start = f"- {label}: {form.setting(level, factor)} instead of {form.setting(own, factor)} is better: "
            better.append(start + f"{100 * good.loc[level, 'effect']:+.1f}")
            reached = interval(of_level(tables, base_of(tables), factor, level, "test_accuracy"))
            expected[better[-1]] = f", to {said(reached)}."
        less = rows[(rows.index < own) & rows["verdict"].isin([SAME, BETTER])]
        if len(less) and factor not in ("lr", "temperature"):
            what = f"- {label} {form.setting(less.index[0], factor)} instead of {form.setting(own, factor)}"
            cheaper.append(f"{what} costs less and is {less['verdict'].iloc[0]}: {100 * less['effect'].iloc[0]:+.1f}")
    lines = [line.split(" [")[0].replace("-0.0", "+0.0") for line in folder[1]["recommendations"].splitlines()]
    assert [line for line in lines if " is better: " in line and "costs less" not in line] == better
    assert [line for line in lines if "costs less" in line] == [line.replace("-0.0", "+0.0") for line in cheaper]
    whole = folder[1]["recommendations"].splitlines()
    assert all(any(line.startswith(start) and line.endswith(end) for line in whole) for start, end in expected.items())


@pytest.mark.parametrize("folder", ["invented"], indirect=True)
def test_findings_name_what_matters_and_nothing_else(folder):
    text = folder[1]["key_findings"]
    space = yaml.safe_load((folder[0] / "next_space.yaml").read_text())
    assert 32 not in space["d"] and 4 not in space["rank"] and 32 not in space["seq_len"]
    for factor in ("Width d", "Router rank", "Length of training", "Sequence length"):
        assert f"**{factor} matters.**" in text
    nothing = next(line for line in text.splitlines() if "No level is shown" in line)
    for factor in ("Learning rate", "Temperature", "Batch size"):
        assert factor in nothing and f"**{factor} matters" not in text
    assert "**Length of training matters.** Against 500, 1000 is better (+" in text


def test_claims_carry_their_verdicts_and_count_up(folder, tables):
    text, claims, t = folder[1]["claims"], tables["claims"], tables["comparisons"]
    first = text.strip().splitlines()[0]
    assert f"Of {len(claims)} claims" in first
    kinds = claims["verdict"].str.replace(r"^at most .*", "at most so many points worse", regex=True)
    kinds = kinds.str.replace(r"^undecided .*", UNDECIDED, regex=True).str.replace("5 points", "one point")
    assert all(f"{n} {word}" in first for word, n in kinds.value_counts().items())
    assert not set(kinds) - {SUPPORTED, REFUTED, SAME, UNDECIDED, "at most so many points worse", "not tested yet"}
    of_runs = t[t["is_claim"]].drop_duplicates("question").set_index("question")
    for row in claims.itertuples():
        assert f"“{row.claim}”" in text and row.detail in text
        if row.claim in of_runs.index and of_runs.loc[row.claim, "verdict"] != "not tested yet":
            assert row.verdict != UNDECIDED and row.verdict.startswith(of_runs.loc[row.claim, "verdict"][:15])
            if bound := re.search(r"at most ([\d.]+) points worse", row.verdict):
                low = -t.loc[t["question"] == row.claim, "low"].min()
                assert 0 <= float(bound[1]) - 100 * max(low, 0) < 0.1001


def test_nothing_undecided_is_recommended(folder, tables):
    place, pieces = folder
    space = yaml.safe_load((place / "next_space.yaml").read_text())
    task = tasks.RoutingTask()
    assert search.load_space(place / "next_space.yaml", task) == space  # tune.ipynb takes it
    default, tests = search.default_space(task), tables["comparisons"]
    decided = tests.loc[tests["verdict"].isin([BETTER, WORSE]) & ~tests["is_claim"], "question"]
    for name in space:
        changed = space[name] != default[name]
        assert changed <= decided.str.startswith(f"{name} ").any(), name
        said_so = f"{form.NAMES[name]}: search {in_words(space[name])} instead of {in_words(default[name])}."
        assert changed == (said_so in pieces["recommendations"])


def in_words(entry):
    ends = [f"{x:.10g}" for x in (entry if isinstance(entry, list) else (entry["low"], entry["high"]))]
    return ", ".join(ends) if isinstance(entry, list) else " to ".join(ends) + " (log)" * bool(entry.get("log"))


def test_what_batches_do_at_equal_samples_is_said_beside_what_they_do_at_equal_steps(folder, tables):
    tests, runs, base = tables["comparisons"], tables["confirmed"], base_of(tables)
    mine = runs[(runs["base"] == base) & (runs["factor"] == "batch_size, equal samples")]
    steps = mine.groupby("level")["n_steps"].first()
    said = ", ".join(f"{n:,} at {size:g}" for size, n in steps.items())
    assert f"equally many samples: {said})" in folder[1]["ablation"]
    _, rows = moved(tables, "batch_size, equal samples")
    for line in folder[1]["key_findings"].splitlines():
        if "**Batch size matters.**" in line:
            assert "sees fewer samples in equally many steps" in line
            same = rows.index[rows["verdict"] == SAME]
            assert all(f" {level:g} is {SAME}" in line.split("At equal samples")[1] for level in same)
    assert len(tests) and len(rows) == len(steps) - 1


def test_supported_claims_that_are_one_question_are_counted(folder, tables):
    claims = tables["claims"]
    details = claims.loc[claims["verdict"] == SUPPORTED, "detail"]
    same = sum((details == one).sum() > 1 for one in details if "seeds" in one)
    said = re.search(r"(\d+) of those supported are the same question", folder[1]["claims"])
    assert int(said[1] if said else 0) == same


def test_what_is_not_decided_is_listed_once(folder, tables):
    t, text = tables["comparisons"].drop_duplicates("question"), folder[1]["undecided"]
    undecided = t.loc[t["verdict"].isin([AT_MOST, UNDECIDED]), ["question", "is_claim"]]
    lines = "\n".join(line for line in text.splitlines() if line.startswith("- Undecided"))
    listed = [re.sub(r" \(about [\d,]+\)", "", one) for one in re.split(r": |; |\.$|\. ", lines, flags=re.M)]
    for question in undecided.itertuples():
        name = f"“{question.question}”" if question.is_claim else form.question(question.question)
        assert listed.count(name) == 1, name
    rows = t[~t["is_claim"] & (t["seeds"] == t["seeds"].max())]
    for paired, sd in rows.groupby("paired")["sd"].median().items():
        df, weight = (7 if paired else 14), 0.4 * 0.05 / len(t)
        words = "pairs" if paired else "seeds without pairs"
        size = float(
            re.search(rf"([\d.]+) points with 8 seeds(?: and [\d.]+ points with \d+ seeds)? where {words} are", text)[1]
        )
        less, more = (
            stats.nct.sf(stats.t.isf(weight / 2, df), df, (size + rounding) / 100 / sd * 8**0.5)
            for rounding in (-0.051, 0.051)
        )
        assert less < 0.8 < more


def test_what_is_recommended_is_what_is_recorded_or_the_best_by_ce(folder, tables):
    runs, text = tables["confirmed"], folder[1]["recommendations"]
    best = runs[runs["role"].notna()].groupby("role")["test_ce"].mean().idxmin()
    use = tables["about"].get("recommended", best)
    row = runs[runs["name"] == use].iloc[0]
    assert f"Use {form.configuration(use)}: " in text and f"n_steps {row['n_steps']:,}" in text
    for name in search.default_space(tasks.RoutingTask()):
        assert f"{name} {form.setting(row[name], name)}" in text
    saved = json.loads((folder[0] / "best_ce.json").read_text()) if (folder[0] / "best_ce.json").exists() else None
    assert saved is None or (saved["role"] == best and saved["test_ce"]["mean"] == pytest.approx(
        runs.loc[runs["role"] == best, "test_ce"].mean()))  # fmt: skip
    done = tables["trials"].query("state == 'complete'")["peak_mem_mib"]
    assert f"from {done.min():.0f} to {done.max():.0f} MiB" in text


def test_how_much_was_done_is_counted(folder, tables):
    _, pieces = folder
    trials, runs, about = tables["trials"], tables["confirmed"], tables["about"]
    states = trials["state"].value_counts()
    assert f"{len(trials)} trials (" in pieces["summary"] and f"{states['complete']} complete" in pieces["summary"]
    n_replicas = len([name for name in trials if name.startswith("val_ce_") and name[-1].isdigit()])
    done = trials.loc[trials["state"] == "complete", "n_steps"].iloc[0]
    assert f"each {n_replicas} trainings (replicas) of {done} steps" in pieces["summary"]
    roles = runs["role"].dropna().nunique()
    once = runs.drop_duplicates(["name", "seed"])
    counts = once["name"].value_counts()
    n_seeds = f"{counts.min()} to {counts.max()}" if counts.min() < counts.max() else f"{counts.min()}"
    trained = f"{once['name'].nunique()} configurations were trained again with {n_seeds} fresh seeds each"
    assert trained in pieces["summary"] and roles < once["name"].nunique()
    assert f"{about['n_test']:,} test samples" in pieces["summary"]
    assert f"took {trials['train_seconds'].sum() / 60:.1f} minutes" in pieces["reproduce"]
    blocks = once.assign(block=once["seed"] // about["n_seeds"]).drop_duplicates(["name", "block"])
    minutes = blocks["train_seconds"].sum() / 60
    minutes = f"{once['name'].nunique()} configurations, {len(once):,} trainings of one seed, {minutes:.1f} minutes"
    assert minutes in pieces["reproduce"]
    asked = optuna.load_study(
        study_name=folder[0].name, storage=f"sqlite:///{folder[0]}/optuna_studies/ctbprn_study.db"
    )
    budget = asked.user_attrs["fingerprint"]["budget"]
    assert f"for {budget['n_steps']} steps" in pieces["measured"] and budget["n_steps"] == done
    assert f"on {budget['n_validation']:,} validation samples" in pieces["measured"]
    assert f"gradient norm at most {budget['clip']:g} a replica" in pieces["measured"]
    for _, row in trials.iterrows():
        if row["state"] == "complete":
            line = next(x for x in pieces["all_trials"].splitlines() if x.startswith(f"| {row['trial']} |"))
            ends = [100 * row[f"val_accuracy{end}"] for end in ("", "_low", "_high")]
            assert "{:.1f} [{:.1f}, {:.1f}]".format(*ends) in line
            assert "{:.3f} [{:.3f}, {:.3f}]".format(*(row[f"val_ce{end}"] for end in ("", "_low", "_high"))) in line


def test_memory_is_said_as_it_was_counted(folder, tables):
    _, pieces = folder
    claims = tables["claims"].set_index("claim")["verdict"]
    verdicts = [claims[claim] for claim in claims.index if "GPU memory" in claim]
    if "memory" not in tables["about"]:  # a record of before
        assert verdicts == [NOT_TESTED] * 2 and "derived, not run" not in pieces["recommendations"]
        return
    assert verdicts == [REFUTED, SUPPORTED]
    counted = tables["about"]["memory_of_trial_2"]
    names = [form.configuration(tables["about"]["recommended"]), "published trial 2"]
    row = next(x for x in pieces["recommendations"].splitlines() if any(x.startswith(f"| {name} |") for name in names))
    assert f"| {counted['mib']:.0f} | {counted['sample_mib']:.1f} |" in row
    assert all(f" {card['largest_batch']:,} ({100 * card['share']:.2f} %) " in row for card in counted["cards"])
    assert f"{100 * counted['share_less']:.0f} % of the {counted['n_shapes']} shapes" in pieces["claims"]


def test_importance_is_said_as_the_table_has_it(folder, tables):
    table, text = tables["importance"], folder[1]["importance"]
    for _, row in table[table["beats_placebo"] & (table["name"] != "placebo")].iterrows():
        assert said(row[["importance", "low", "high"]]) in text
    assert "placebo" in set(table["name"])


def test_every_piece_is_there_and_readable(folder):
    for name, text in folder[1].items():
        assert text and "nan" not in text and not re.search(r"\d\.\d{6}", text), name


@pytest.mark.parametrize("folder", ["committed"], indirect=True)
def test_the_published_report_says_what_its_record_says(folder):
    if "question" not in pd.read_csv(COMMITTED / "comparisons.csv"):
        pytest.skip("the published report is of a version before")
    page = (COMMITTED / "report.md").read_text()
    for name in ("summary", "verdict", "settings", "key_findings", "ablation", "claims", "undecided"):
        assert folder[1][name] in page, name


class References(html.parser.HTMLParser):
    """Counts what a page would load from elsewhere, and pictures without alternative text."""

    def __init__(self):
        super().__init__()
        self.external, self.pictures, self.scripts = [], [], 0

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.scripts += tag == "script"
        loads = attrs.get("src") or (attrs.get("href") if tag == "link" else None) or ""
        if loads and not loads.startswith("data:"):
            self.external.append(loads)
        if tag == "img" or (tag == "svg" and attrs.get("role") == "img"):
            self.pictures.append(attrs.get("alt", attrs.get("aria-label", "")))


@pytest.fixture(scope="module")
def published(project):
    """A report published from a made study, by the real notebook in a real kernel."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "REPORTS", project / "reports")
        patch.delenv("CTBPRN_STORAGE", raising=False)
        made(project / "reports", failed=False)
        confirmed()
    done = project.python("-c", "from ctbprn_lib.report.publish import publish; publish('made')")
    assert done.returncode == 0, done.stderr
    return project / "reports" / "made"


def test_the_published_page_is_whole_and_loads_nothing(published):
    page, text = ((published / f"report.{kind}").read_text() for kind in ("html", "md"))
    seen = References()
    seen.feed(page)
    assert seen.external == [] and seen.scripts == 1
    assert all(len(alt) > 20 for alt in seen.pictures)
    pictures = re.findall(r"!\[.+?\]\((.+?)\)", text)
    assert len(pictures) == len(seen.pictures) == 14
    assert all((published / picture).stat().st_size > 5_000 for picture in pictures)
    for name in ("ce_loss_vs_accuracy.png", "ce_loss_vs_lr.png", "ablation.png", "accuracy_vs_memory.png"):
        assert f"optuna_plots/{name}" in pictures
    for name in ("optuna_results_detailed.csv", "optuna_studies/ctbprn_study.pkl"):
        assert (published / name).is_file()
    headings = [
        "Verdict",
        "Best Parameters Found",
        "Key Findings",
        "Recommendations",
        "What the original report's claims come to",
        "What each part of the network is worth",
        "What this could not see",
        "How this was measured",
        "Complete Trial Results",
        "Generated Plots",
        "Raw Data",
        "Reproduce this report",
    ]
    assert re.findall(r"^## (.+)$", text, re.M) == headings
    assert not re.search(r"/(home|root|work|tmp|Users)/|(?:it|step)/s|Traceback|Warning|import ", text)


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium (Debian package), which .ci/run installs")
def test_a_browser_shows_the_page_and_asks_the_network_for_nothing(published, tmp_path):
    log = tmp_path / "net.json"
    subprocess.run(
        ("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         f"--user-data-dir={tmp_path / 'profile'}", f"--log-net-log={log}", f"--screenshot={tmp_path / 'page.png'}",
         "--window-size=1100,2000", f"file://{published / 'report.html'}"),
        capture_output=True, check=True, timeout=120,
    )  # fmt: skip
    assert (tmp_path / "page.png").stat().st_size > 50_000
    text = log.read_text()
    page_asked = [url for url in re.findall(r'"url":"(https?:[^"]+)"', text) if "google" not in url]
    assert page_asked == []
    assert json.loads(text if text.rstrip().endswith("}") else text.rstrip().rstrip(",") + "]}")


@pytest.mark.filterwarnings("ignore:Precision loss")  # of scipy, where two seeds score nearly the same
def test_confirm_runs_and_ends_in_a_report(project, run_here):
    (project / "small.yaml").write_text("d: [4, 8]\nrank: [2]\nbatch_size: [4]\nseq_len: [8, 16]\n")
    study = {"study_name": "s", "task": "uea:BasicMotions"}
    run_here(project, "tune", **study, n_steps=3, n_replicas=2, space="small.yaml", n_trials=2)
    shown = run_here(project, "confirm", **study, looks="2,4", n_top=1, n_levels=2, n_seed_runs=40)
    assert any("fresh seeds and" in piece.data for piece in shown if piece)
    best = json.loads((project / "reports" / "s" / "best_ce.json").read_text())
    assert best["task"]["task"] == "uea:BasicMotions" and len(best["class_names"]) == 4
    runs = pd.read_csv(project / "reports" / ".s.new" / "confirmed.csv")
    assert runs["test_accuracy"].between(0, 1).all() and {0, 1} <= set(runs["seed"]) <= {0, 1, 2, 3}
