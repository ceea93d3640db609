"""The notebooks: clean as committed, run as users run them, and unforgiving about their parameters."""

import ast
import contextlib
import functools
import json
import os
import re
import stat
import sys
import threading
from dataclasses import replace
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import psutil
import pytest

from ctbprn_lib import InputError, parameters, train
from ctbprn_lib.audit import pruning, speed
from ctbprn_lib.report import publish
from ctbprn_lib.train import Budget, Hyperparameters, fit

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
TINY = {"n_steps": 4, "n_replicas": 2}
SMALL = TINY | {"study_name": "s", "space": "small.yaml"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_clean_and_have_the_form_of_the_house(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert notebook.metadata == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    first = notebook.cells[0]
    assert first.cell_type == "markdown" and first.source.startswith("# ")
    assert all(cell.source.count("\n") < 20 for cell in code)
    tagged = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    for statement, line in zip(ast.parse(tagged[0].source).body, tagged[0].source.splitlines(), strict=True):
        assert isinstance(statement, ast.AnnAssign) and statement.annotation.id in ("int", "float", "str", "bool")
        assert isinstance(statement.value, ast.Constant) and "  # " in line
    assert "parameters.check(globals())" in code[code.index(tagged[0]) + 1].source
    text = path.read_text()
    assert not any(word in text for word in ("/home/", "/root/", "filterwarnings", "hostname"))


@pytest.fixture(scope="module")
def tuned(project):
    """A study of two trials made by papermill under a umask: what it printed, and the addresses it listened at."""
    (project / "small.yaml").write_text("d: [4, 8]\nbatch_size: [4]\nseq_len: [8, 16]\n")
    analyze = project / "notebooks" / "analyze.ipynb"
    whole_report = analyze.read_text()
    project.shorten_report()
    heard, done = set(), threading.Event()

    def watch():
        while not done.wait(0.3):
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    heard.update(c.laddr.ip for c in process.net_connections() if c.status == psutil.CONN_LISTEN)

    thread = threading.Thread(target=watch)
    thread.start()
    before = os.umask(0o027)
    try:
        ran = project.papermill("tune", *SMALL.items(), ("n_trials", 2))
    finally:
        os.umask(before)
        done.set()
        thread.join()
    analyze.write_text(whole_report)
    assert ran.returncode == 0, ran.stderr
    return ran.stderr, heard


def test_tune_ends_in_a_report(project, tuned):
    printed, _ = tuned
    assert "2 trials to go" in printed and "2 of 2" in printed
    folder = project / "reports" / "s"
    assert len(pd.read_csv(folder / "optuna_results_detailed.csv")) == 2
    assert "2 trials (2 complete)" in (folder / "report.md").read_text()


def test_tune_goes_on_and_another_question_changes_nothing(project, tuned, run_here, capsys):
    shown = run_here(project, "tune", **SMALL, n_trials=3)
    assert "2 finished trials are there, 1 to go" in capsys.readouterr().out
    assert any("3 trials (3 complete)" in text.data for text in shown if text)
    before = (project / "reports" / "s" / "report.html").read_bytes()
    with pytest.raises(InputError, match=r"budget\.n_steps: there 4, here 5"):
        run_here(project, "tune", **SMALL | {"n_steps": 5}, n_trials=4)
    assert (project / "reports" / "s" / "report.html").read_bytes() == before


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_run_keeps_to_the_umask_and_listens_to_nobody_else(project, tuned):
    """Jupyter's client and kernel talk through ports, of the loopback interface alone and signed with a key."""
    _, heard = tuned
    assert heard and heard <= {"127.0.0.1", "::1"}
    left = [*(project / "reports" / "s").rglob("*"), project / "runs" / "tune.ipynb"]
    assert len(left) > 10
    for path in left:
        assert stat.S_IMODE(path.stat().st_mode) == (0o750 if path.is_dir() else 0o640), path


@pytest.mark.parametrize("task", ["uea:BasicMotions", "uea:JapaneseVowels", "mine.npz"])
def test_tune_and_report_on_real_input(project, run_here, task):
    rng = np.random.default_rng(0)
    np.savez(project / "mine.npz", x=rng.normal(size=(40, 12, 5)), y=np.arange(40) % 2, areas=list("aabbb"))
    run_here(project, "tune", **TINY, task=task, n_trials=1)
    name = {"mine.npz": "mine"}.get(task, task.replace(":", "-"))
    assert len(list((project / "reports" / f".{name}.new" / "optuna_plots").glob("*.png"))) >= 8


def test_explore_runs_on_tasks_with_and_without_a_true_area_and_is_published(project, run_here, capsys):
    done = project.papermill("explore", *TINY.items(), ("d", 8), ("seq_len", 8))
    assert done.returncode == 0, done.stderr
    run_here(project, "explore", **TINY, d=8, task="uea:BasicMotions")
    for printed in (done.stderr, capsys.readouterr().out):
        assert "majority class" in printed and "linear rule" in printed
    assert len(list((project / "reports" / "explore" / "plots").glob("*.png"))) == 3
    publish.publish_notebook(project / "runs" / "explore.ipynb", "explore")  # as reproduce and benchmark are
    text = (project / "reports" / "explore" / "report.md").read_text()
    assert "majority class" in text and "Traceback" not in text


def test_reproduce_runs(project, run_here):
    sizes = dict(n_seeds=2, n_fresh_seeds=2, n_samples=64, n_spread_seeds=2, max_steps=5, n_curve_seeds=2)
    shown = run_here(project, "reproduce", **sizes)
    text = "\n".join(value.data for value in shown if value)
    assert "30 of 30 hyperparameters of trials 0 to 4" in text
    assert "papermill notebooks/reproduce.ipynb" in text and "-p n_spread_seeds 2" in text


def test_benchmark_runs(project, run_here, monkeypatch):
    def fit_shortly(hp, task, budget, *args):
        return fit(hp, task, replace(budget, n_steps=2, n_validation=32), *args)

    monkeypatch.setattr(train, "fit", fit_shortly)
    shapes = [(Hyperparameters(d=4, rank=1, batch_size=2, seq_len=4), 2, 2)] * 3
    monkeypatch.setattr(speed, "SHAPES", shapes)
    monkeypatch.setattr(speed, "SECONDS", speed.SECONDS)  # which the notebook sets
    sizes = {"n_replicas": (1, 2), "seq_len": (2, 4, 8), "d": (4, 8)}
    monkeypatch.setattr(speed, "sizes", lambda device: sizes)
    monkeypatch.setattr(speed, "measure_limits", lambda *_: {"flop_per_s": 1e9, "byte_per_s": 1e9})
    monkeypatch.setattr(speed, "protocol_seconds", lambda: 3.0)  # test_reproduce_runs runs the protocol
    smaller = {"against_the_original": dict(shapes=shapes), "scaling": dict(shape=shapes[2], n_runs=1)}
    smaller |= {"search_seconds": dict(n_trials=2), "trials_an_hour": dict(budget=Budget(2, 2, n_validation=1))}
    monkeypatch.setattr(speed, "thread_gain", lambda: 1.5)
    monkeypatch.setattr(pruning, "scoring_share", lambda *_: 0.1)
    curves = [(trial, scoring, 0.1 * trial, 0.1 * trial) for trial in range(6) for scoring in (1, 2)]
    curves = pd.DataFrame(curves, columns=["trial", "scoring", "few", "all"])
    monkeypatch.setattr(pruning, "score_twice", lambda *_, **__: curves)
    for name, args in smaller.items():
        monkeypatch.setattr(speed, name, functools.partial(getattr(speed, name), **args))
    shown = run_here(project, "benchmark", n_sets=50, n_reports=2, n_power=2, n_runs=1, run_seconds=0.01, n_pairs=2,
                     n_steps=2)  # fmt: skip
    text = "\n".join(value.data for value in shown if value)
    durations = r"workers make (\S+) \[.+? record take (\S+) ms .+? takes (\S+) ms .+? takes (\S+) s "
    found = re.search(durations, text, re.S)
    assert all(float(number.replace(",", "")) > 0 for number in found.groups())
    assert "kept or pruned as it is with all of them in 100.0 % of cases" in text and "10.0 %" in text
    assert "papermill notebooks/benchmark.ipynb" in text and "-p n_sets 50" in text


def namespace(**values):
    """globals() of a tune notebook with these values injected as papermill does it."""
    cell = next(c for c in nbformat.read(NOTEBOOKS[[p.stem for p in NOTEBOOKS].index("tune")], 4).cells
                if "parameters" in c.metadata.get("tags", []))  # fmt: skip
    scope = {}
    exec(cell.source, scope)
    injected = "# Parameters\n" + "".join(f"{name} = {value!r}\n" for name, value in values.items())
    exec(injected, scope)
    return scope | {"In": ["", cell.source, injected, "check"]}


def test_what_will_run_is_printed(capsys):
    parameters.check(namespace(n_trials=7, seed=3))
    said = capsys.readouterr().out
    for word in ("n_trials = 7", "seed = 3", "torch", "optuna", "commit", "CPU"):
        assert word in said


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("n_trials", -3, "n_trials must be a whole number of at least 1, got -3"),
        ("n_trials", 0, "at least 1"),
        ("n_trials", "false", "n_trials must be a whole number, got 'false'"),
        ("n_trials", True, "n_trials must be a whole number, got True"),
        ("n_steps", 10.0, "n_steps must be a whole number, got 10.0"),
        ("seed", -1, "seed must be"),
        ("task", 3, "task must be text"),
        (
            "objective",
            "val_accurac",
            r"must be one of val_ce, val_accuracy, both, ce_cost \(did you mean val_accuracy\?\)",
        ),
        ("sampler", "tpee", "did you mean tpe"),
        ("pruner", None, "pruner must be text"),
        ("precision", "fp16", "precision must be one of"),
        ("protocol", "publish", "protocol must be one of"),
        ("device", "gpu", 'device must be "auto", "cpu" or "cuda"'),
        ("study_name", "../up", "study_name must be"),
        ("storage", "postgresql://u:pw@h/db", "storage holds a password"),
        ("studyname", "x", "no parameter 'studyname'; did you mean study_name"),
        ("n_trails", 5, "no parameter 'n_trails'; did you mean n_trials"),
        ("zzz", 1, "no parameter 'zzz'"),
    ],
)
def test_a_wrong_parameter_is_named_with_what_it_may_be(name, value, said):
    with pytest.raises(InputError, match=said):
        parameters.check(namespace(**{name: value}))


def test_parameters_are_found_where_python_does_not_collect_annotations():
    scope = namespace(n_trials=7)
    scope.pop("__annotations__", None)  # as in Python 3.14
    scope["In"][:0] = ["%matplotlib inline", "import time"]
    parameters.check(scope)
    with pytest.raises(InputError, match="n_trials must be a whole number of at least 1, got 0"):
        parameters.check(scope | {"n_trials": 0})
    with pytest.raises(InputError, match="no parameter 'zzz'"):
        parameters.check(scope | {"In": [*scope["In"], "# Parameters\nzzz = 1\n"]})


def test_the_notebooks_share_the_names_and_kinds_they_need():
    kinds = {}
    for path in NOTEBOOKS:
        for cell in json.loads(path.read_text())["cells"]:
            if "parameters" in cell["metadata"].get("tags", []):
                for statement in ast.parse("".join(cell["source"])).body:
                    kinds.setdefault(statement.target.id, set()).add(statement.annotation.id)
    assert all(len(kind) == 1 for kind in kinds.values())
    tune = "task study_name n_trials n_steps n_replicas protocol objective space sampler pruner storage seed device"
    assert {*tune.split(), "precision"} <= set(kinds)
