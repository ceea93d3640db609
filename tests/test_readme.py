"""README: its numbers are those of the files they come from, and its lines run."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from ctbprn_lib import compare, evidence, frontier, published, search, tasks
from ctbprn_lib.evidence import BETTER, SAME, WORSE
from ctbprn_lib.model import Classifier
from ctbprn_lib.report import budgets, comparisons, versus
from ctbprn_lib.report import text as form
from ctbprn_lib.train import training_cost

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
STUDY = ROOT / "reports" / "ctbprn"


def rows():
    """{first cell: the other cells} of the table of results."""
    table = README.split("## What came out")[1].split("\n\n")[1]
    found = {}
    for line in table.splitlines()[2:]:
        name, *cells = (cell.strip().strip("*") for cell in line.strip("|").split("|"))
        found[name] = cells
    return found


def shown(accuracy, ce, n_seeds, hyperparameters, n_steps):
    task = tasks.RoutingTask()
    work = training_cost(hyperparameters, task, int(n_steps)) / frontier.usual_cost(task)
    return [form.percent(accuracy, ""), form.nats(ce), form.commas(n_seeds), f"{work:.2g}"]


def test_the_table_holds_the_numbers_of_the_records():
    found, trial_2 = rows(), published.TABLE.loc[2]
    hp = published.hyperparameters(2)
    fresh = pd.read_csv(ROOT / "reports" / "reproduce" / "trial_2_seeds.csv")
    of_fresh = (evidence.mean_interval(fresh["test_accuracy"]), evidence.mean_interval(fresh["test_ce"], nats=True))
    about = json.loads((STUDY / "about.json").read_text())
    runs = pd.read_csv(STUDY / "confirmed.csv").drop_duplicates(["name", "seed"])

    def of(name):
        mine = runs[runs["name"] == name]
        scores = [evidence.mean_interval(mine[s], nats=s == "test_ce") for s in ("test_accuracy", "test_ce")]
        return shown(*scores, len(mine), search.hyperparameters(mine.iloc[0]), mine["n_steps"].iloc[0])

    candidates = runs[runs["role"].notna()].groupby("role")["test_accuracy"].mean()
    assert candidates.idxmax() == "published trial 2" and about["recommended"] == "published trial 2: n_steps 2000"
    dash = ["–"] * 3
    front = json.loads((ROOT / "reports" / "frontier" / "front.json").read_text())
    of_front = {
        name: shown(
            form.interval(front[name], "test_accuracy"),
            form.interval(front[name], "test_ce"),
            front[name]["seeds"],
            search.hyperparameters(pd.Series(front[name])),
            front[name]["n_steps"],
        )
        for name in ("equal", "any")
    }
    assert found == {
        "The original's best trial, as published": shown(
            round(trial_2["val_accuracy"], 3), float(form.number(trial_2["ce_loss"], 3)), 1, hp, 5
        ),
        "The same trial, measured on fresh samples": shown(*of_fresh, len(fresh), hp, 5),
        "A linear rule": [form.percent(about["baselines"]["linear rule"], ""), *dash],
        "Untuned defaults, 500 steps": of("defaults"),
        "Best at 500 steps: published trial 2": of("published trial 2"),
        "The same for 2,000 steps": of("published trial 2: n_steps 2000"),
        "Best at the cost of the untuned defaults": of_front["equal"],
        "Best that was trained again at any cost": of_front["any"],
        "Ceiling": [form.percent(about["baselines"]["ceiling"], ""), *dash],
    }
    text = " ".join(README.split())
    assert budgets.settings(front["any"]) in text
    assert front["any"]["gate_noise"] == front["equal"]["gate_noise"] == 0 and "without noise on the gates" in text
    assert f"a linear rule gets {form.percent(about['baselines']['linear rule'])} without" in " ".join(README.split())


def test_whether_it_is_worth_it_is_what_was_decided():
    (path,) = (ROOT / "reports" / "compare").glob("records-*.csv")
    records = compare.read(path)
    records = records[records["resample"] < 10]  # those of the page
    found = versus.standing(records, compare.verdicts(records))
    assert len(found) == 10 and versus.WORTH not in found.values()
    ahead, best = versus.means(records), versus.rivals(records)
    assert all(ahead.loc[data, compare.CTBPRN] < ahead.loc[data, rival] for data, rival in best.items())
    text = " ".join(README.split())
    assert set(found.values()) == {versus.OPEN} and "was never shown to beat simpler methods" in text
    assert "On ten data sets it is undecided, with a lower mean accuracy than the best other" in " ".join(
        README.split()
    )


def test_what_matters_and_what_does_not_is_what_was_decided():
    text = " ".join(README.split())
    matters, rest = text.split("**What matters**")[1].split("**What does not matter**")
    does_not = rest.split("**What is not known**")[0]
    words = {"lr": "learning rate", "d": "width", "rank": "router's rank", "temperature": "temperature",
             "batch_size": "batch size", "seq_len": "how much of the sequence", "n_steps": "how long it is trained",
             "batch_size, equal samples": "batch size at equal samples"}  # fmt: skip
    table = pd.read_csv(STUDY / "comparisons.csv")
    base = json.loads((STUDY / "about.json").read_text())["base"]
    verdicts = table[~table["is_claim"] & (table["b"] == f"{base} again")].set_index("a")["verdict"]
    runs = pd.read_csv(STUDY / "confirmed.csv").drop_duplicates(["name", "factor"])
    for factor, word in words.items():
        names = runs.loc[(runs["factor"] == factor) & (runs["base"] == base), "name"]
        found = set(verdicts.reindex(names).dropna())
        assert word in (matters if found & {BETTER, WORSE} else does_not), factor
        assert found & {BETTER, WORSE} or found == {SAME}
    for part, word in {"routing": "the routing", "message": "the message"}.items():
        assert verdicts[f"{base}: without {part}"] == WORSE and word in matters
    assert comparisons.PARTS == ("routing", "message", "noise")


def test_the_quick_start_shows_a_run_as_it_was():
    block = README.split("<!-- quick start: docs/quick_start.txt -->\n```\n")[1].split("```")[0]
    assert block == (ROOT / "docs" / "quick_start.txt").read_text()
    sources = (ROOT / "ctbprn_lib" / "report" / "make.py").read_text()
    sources += (ROOT / "ctbprn_lib" / "report" / "report.md.j2").read_text()
    lines = block.splitlines()
    assert lines[0].startswith("Done in ") and len(lines) >= 6
    for words in (
        "Done in ",
        "the report: ",
        "about the original: ",
        "What it gains",
        "What it costs",
        "of the test samples",
    ):
        assert words in block and words in sources


def test_readme_is_short_and_its_pictures_are_there():
    assert len(README.splitlines()) <= 120
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_its_lines_make_a_task_and_load_the_network(tmp_path):
    first, second = re.findall(r"```python\n(.*?)```", README, re.S)
    done = subprocess.run((sys.executable, "-c", first), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    task = tasks.load_task(str(tmp_path / "mine.npz"))
    assert task.area_names == ("hand", "foot") and sum(task.n_samples.values()) == 200
    classifier = Classifier.load(STUDY / "recommended.safetensors")
    assert "Classifier.load(" in second and "classifier.predict_proba(x)" in second
    x = np.random.default_rng(0).normal(size=(5, 2, 128, 64))
    assert classifier.classes_.tolist() == [0, 1]
    assert classifier.predict(x).shape == (5,) and classifier.predict_proba(x).shape == (5, 2)
