"""The space, the study that goes on, and its record."""

import json
import math

import numpy as np
import optuna
import pandas as pd
import pytest
from crew import SPACE

from ctbprn_lib import InputError, confirm, report, search, storage, tasks, train
from ctbprn_lib.report import figures
from ctbprn_lib.train import Budget

BUDGET = Budget(4, 2, n_evals=2, n_validation=32)


def run(task, n_trials, space=SPACE, budget=BUDGET, seed=0, **how):
    question = {"task": task, "space": space, "budget": budget, "seed": seed}
    study = search.open_study("s", **question, **{"pruner": "none", **how})
    search.run_trials(study, n_trials, **question)
    return study


def test_the_default_space_is_the_published_one():
    space = search.default_space(tasks.RoutingTask())
    assert space["seq_len"] == [32, 64, 128] and space["d"] == [32, 64, 96] and space["batch_size"] == [8, 16, 32]
    assert (space["lr"]["low"], space["lr"]["high"], space["temperature"]["high"]) == (1e-4, 1e-2, 2.0)


def test_n_trials_is_a_total_and_no_trial_is_repeated(reports, small_task):
    assert len(run(small_task, 3).trials) == 3
    study = run(small_task, 5)
    assert [t.number for t in study.trials] == list(range(5))
    assert len({json.dumps(t.params, sort_keys=True) for t in study.trials}) == 5
    assert len(run(small_task, 4).trials) == 5
    assert (reports / "s" / "optuna_studies" / "ctbprn_study.db").is_file()


def test_another_question_is_refused_and_the_difference_named(reports, small_task):
    run(small_task, 1)
    other = tasks.RoutingTask(3, 8, 8)
    for change, said in (
        ({"budget": Budget(5, 2, n_evals=2, n_validation=32)}, "budget.n_steps: there 4, here 5"),
        ({"space": SPACE | {"d": [4, 16]}}, r"space.d: there \[4, 8\], here \[4, 16\]"),
        ({"space": SPACE | {"lr": {"low": 1e-3, "high": 1e-1, "log": True}}}, "space.lr.high: there 0.01, here 0.1"),
        ({"task": other}, "task.n_areas: there 2, here 3"),
        ({"objective": "val_accuracy"}, "objective: there val_ce, here val_accuracy"),
        ({"seed": 1}, "seed: there 0, here 1"),
    ):
        with pytest.raises(InputError, match=said):
            run(**{"task": small_task, "n_trials": 2, **change})
    assert len(run(small_task, 1).trials) == 1


def test_the_record_has_every_replica_the_cost_and_where_it_came_from(reports, small_task):
    study = run(small_task, 3)
    frame = search.records(study)
    for trial in study.trials:
        curves = trial.user_attrs["curves"].values()
        assert trial.user_attrs["steps"] == [2, 4] and all(np.shape(curve) == (2, 2) for curve in curves)
    for _, row in frame.iterrows():
        ce = np.array([row["val_ce_0"], row["val_ce_1"]])
        assert row["val_ce"] == pytest.approx(ce.mean(), abs=1e-6)
        assert row["val_ce_low"] <= row["val_ce"] <= row["val_ce_high"]
        assert 0 <= row["val_accuracy_low"] <= row["val_accuracy"] <= row["val_accuracy_high"] <= 1
        assert row["n_diverged"] == 0 and row["train_seconds"] > 0 and row["n_parameters"] > 0
        assert row["torch"] and row["commit"] and row["device"].startswith("CPU")
    assert set(SPACE) <= set(frame.columns)


def test_a_replica_that_diverged_counts_as_chance_in_the_mean_and_in_its_interval(reports, small_task):
    study = run(small_task, 1)
    curves = study.trials[0].user_attrs["curves"] | {"val_ce": [[0.5, None]], "val_accuracy": [[0.75, None]]}
    ours = study.trials[0].user_attrs | {"curves": curves, "val_ce": (0.5 + math.log(2)) / 2, "val_accuracy": 0.625}
    study.add_trial(optuna.create_trial(value=ours["val_ce"], user_attrs=ours))
    row = search.records(study).iloc[-1]
    assert (row["val_accuracy_1"], row["val_ce_1"]) == (0.5, math.log(2))
    assert row["val_accuracy_low"] < row["val_accuracy"] < row["val_accuracy_high"] < 1
    assert 0 < row["val_ce_low"] < row["val_ce"] < row["val_ce_high"]


@pytest.mark.parametrize("sampler", search.SAMPLERS)
def test_every_sampler_runs_with_every_pruner(reports, small_task, sampler):
    pruners = [name for name in search.PRUNERS if name != "equal_cost"]  # which goes with another objective
    for n_trials, pruner in enumerate(pruners, 1):
        study = run(small_task, n_trials, sampler=sampler, pruner=pruner)
    assert len(study.trials) == len(pruners) and all(t.state in search.FINISHED for t in study.trials)


@pytest.mark.parametrize(("objective", "n"), [("val_ce", 1), ("val_accuracy", 1), ("both", 2)])
def test_objectives(reports, small_task, objective, n):
    study = run(small_task, 2, objective=objective)
    for trial in study.trials:
        kept = [trial.user_attrs[name] for name in (("val_ce", "val_accuracy") if n == 2 else (objective,))]
        assert trial.values == pytest.approx(kept)


def test_both_cannot_be_pruned(reports, small_task):
    with pytest.raises(InputError, match="pruner none"):
        run(small_task, 1, objective="both", pruner="median")


def test_hopeless_trials_are_pruned(reports, small_task, monkeypatch):
    monkeypatch.setattr(optuna.pruners.MedianPruner, "prune", lambda self, study, trial: trial.number == 1)
    study = run(small_task, 3, pruner="median")
    assert [t.state.name for t in study.trials] == ["COMPLETE", "PRUNED", "COMPLETE"]
    assert search.records(study).loc[1, "n_steps"] == 2


def test_a_trial_whose_replicas_all_diverge_fails_with_a_reason_and_a_study_of_such_stops(reports, small_task):
    class Poisoned:
        def __getattr__(self, name):
            return getattr(small_task, name)

        def draw(self, *args):
            batch = small_task.draw(*args)
            return batch._replace(x=batch.x * float("nan"))

    with pytest.raises(InputError, match=r"3 trials gave no score.*all 2 replicas diverged, the first at step 1"):
        run(Poisoned(), 2)
    states = search.records(search.load_study("s"))
    assert (states["state"] == "fail").all() and states["failure"].str.contains("diverged").all()


def test_out_of_memory_is_recorded_with_its_shape_and_the_study_goes_on(reports, small_task, monkeypatch):
    real, calls = search.fit, []

    def sometimes(*args):
        calls.append(args)
        if len(calls) == 1:
            raise MemoryError
        return real(*args)

    monkeypatch.setattr(search, "fit", sometimes)
    frame = search.records(run(small_task, 2))
    assert frame["state"].tolist() == ["fail", "complete", "complete"]
    assert "out of memory" in frame.loc[0, "failure"] and "batch_size=4" in frame.loc[0, "failure"]
    assert math.isnan(frame.loc[0, "val_ce"])


def test_a_space_from_yaml_replaces_what_it_names(tmp_path, small_task):
    path = tmp_path / "space.yaml"
    path.write_text("d: [4, 16]\nrank: 8\nlr: {low: 0.001, high: 0.1, log: true}\nn_layers: [1, 2, 3]\n")
    space = search.load_space(path, small_task)
    assert space["d"] == [4, 16] and space["rank"] == [8] and space["n_layers"] == [1, 2, 3]
    assert space["seq_len"] == [2, 4, 8]  # the default for 8 tokens


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dim: [3]", "dim: not a hyperparameter"),
        ("d: [32, '64']", "d must be a whole number above 0, got '64'"),
        ("d: [32, -1]", "d must be"),
        ("d: []", "at least one level"),
        ("d: [8, 8]", "each once"),
        ("lr: {low: 1, high: 0.1}", "low must be below high"),
        ("lr: {low: 0.1}", "a range has low, high"),
        ("lr: {low: 0.1, high: 1, log: 'yes'}", "log must be true or false"),
        ("[1, 2]", "expected hyperparameters"),
    ],
)
def test_a_bad_space_is_refused_with_file_field_and_expectation(tmp_path, small_task, text, message):
    path = tmp_path / "space.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as error:
        search.load_space(path, small_task)
    assert "space.yaml" in str(error.value)


def test_storage_comes_from_the_parameter_else_the_environment_else_the_folder(reports, monkeypatch):
    assert storage.storage_url("s").endswith("s/optuna_studies/ctbprn_study.db")
    monkeypatch.setenv("CTBPRN_STORAGE", "sqlite:///elsewhere.db")
    monkeypatch.chdir("/")
    assert storage.storage_url("s") == f"sqlite:///{reports.parent}/elsewhere.db"  # not in the folder of the notebook
    assert storage.storage_url("s", "sqlite:///mine.db") == f"sqlite:///{reports.parent}/mine.db"
    assert storage.storage_url("s", "sqlite:////tmp/mine.db?timeout=5") == "sqlite:////tmp/mine.db?timeout=5"
    monkeypatch.setenv("CTBPRN_STORAGE", " postgresql://me@server/studies\n")  # as a Secret made from a file has it
    assert storage.storage_url("s") == "postgresql://me@server/studies"
    monkeypatch.setenv("CTBPRN_STORAGE", "\n")
    assert storage.storage_url("s").endswith("s/optuna_studies/ctbprn_study.db")


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a b", "<b>", "x" * 65, "a\n"])
def test_study_names_are_confined(name):
    with pytest.raises(InputError, match="study_name"):
        storage.study_folder(name)


def test_a_study_that_is_not_there_is_named(reports):
    with pytest.raises(InputError, match="no study 'nothing'"):
        search.load_study("nothing")
    assert not list(reports.iterdir())


def test_a_study_without_trials_or_of_another_kind_is_named(reports, small_task):
    study = run(small_task, 0)
    with pytest.raises(InputError, match="study 's' has no trial yet"):
        search.records(study)
    optuna.create_study(study_name="theirs", storage=study._storage)
    with pytest.raises(InputError, match="study 'theirs' does not say what it asks"):
        search.load_study("theirs", storage.storage_url("s"))


def test_a_hyperparameter_that_was_added_is_searched_trained_ablated_and_reported(reports, tmp_path, small_task):
    """weight_decay, of which 0 is a value: from a line of YAML to the sections of the report."""
    (tmp_path / "space.yaml").write_text(
        "weight_decay: {low: 0, high: 0.3}\nd: [4, 8]\nrank: [2]\nbatch_size: [4]\nseq_len: [8]\n"
    )
    space = search.load_space(tmp_path / "space.yaml", small_task)
    question = dict(task=small_task, space=space, budget=Budget(3, 2, n_evals=1, n_validation=32))
    search.run_trials(search.open_study("decay", **question), 3, **question, device="cpu")
    r = report.load("decay")
    decays = r.trials["weight_decay"]
    assert decays.between(0, 0.3).all() and decays.nunique() == 3
    assert f"- **Weight decay**: {decays[r.by_ce['trial']]:g}\n" in report.render(r, "best_parameters") + "\n"
    base = confirm.Run("trial 0", search.hyperparameters(r.trials.iloc[0]), 3)
    levels = {run.level for run in confirm.ablations(base, space, small_task) if run.factor == "weight_decay"}
    assert levels >= {0.0, 0.01, 0.1, 0.3, base.hyperparameters.weight_decay}
    assert figures.LABELS["weight_decay"] == "weight decay"
    for text, said in (("{low: 0, high: 1, log: true}", "must begin above 0"), ("[-0.1]", "a number of at least 0")):
        (tmp_path / "space.yaml").write_text(f"weight_decay: {text}\n")
        with pytest.raises(InputError, match=f"weight_decay.*{said}"):
            search.load_space(tmp_path / "space.yaml", small_task)


def test_a_search_over_cost_keeps_to_its_limit_and_refuses_what_does_not_fit(reports, small_task):
    space = search.cost_space(small_task) | {"d": [8], "batch_size": [4, 8], "n_layers": [1]}
    space["n_steps"] = {"low": 2, "high": 40, "log": True}
    budget = Budget(40, 2, n_validation=64)
    limit = 2 * train.training_cost(train.Hyperparameters(d=8, batch_size=4, seq_len=4, n_layers=1), small_task, 10)
    how = dict(task=small_task, space=space, budget=budget)
    study = search.open_study("cost", objective="ce_cost", pruner="equal_cost", most_cost=limit, **how)
    search.run_trials(study, 8, **how)
    trials = search.records(study)
    shortest = trials["n_steps"] == 2
    assert (trials["cost"][~shortest] <= limit).all() and trials["n_steps"].nunique() > 1
    whole = trials[trials["state"] == "complete"]
    for row in whole.to_dict("records"):
        hp = search.hyperparameters(pd.Series(row))
        assert row["cost"] == train.training_cost(hp, small_task, row["n_steps"])
    with pytest.raises(InputError, match="n_steps"):
        search.open_study("other", objective="ce_cost", pruner="none", **how | {"space": {"d": [8]}})
    with pytest.raises(InputError, match="cannot compare trainings of unequal lengths"):
        search.open_study("other", objective="ce_cost", pruner="median", **how)
