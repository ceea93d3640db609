"""Confirmation and ablation: fresh seeds, a plan that covers the space, and nothing trained twice."""

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import optuna
import pytest
import torch

from ctbprn_lib import InputError, confirm, evidence, search, storage, tasks
from ctbprn_lib.model import CTBPRN
from ctbprn_lib.scoring import score
from ctbprn_lib.train import Budget, Hyperparameters, fit

SMALL = {"lr": {"low": 1e-3, "high": 1e-2, "log": True}, "d": [4, 8], "rank": [2], "temperature": [1.0],
         "batch_size": [4], "seq_len": [4, 8]}  # fmt: skip


@pytest.fixture(scope="module")
def database(small_task, tmp_path_factory):
    """The database of a tuning study of four real, tiny trials."""
    path = tmp_path_factory.mktemp("made") / "study.db"
    question = dict(task=small_task, space=SMALL, budget=Budget(4, 2, n_evals=2, n_validation=64, precision="fp32"))
    made = search.open_study("made", f"sqlite:///{path}", pruner="none", **question)
    search.run_trials(made, 4, **question)
    return path


@pytest.fixture
def study(database, reports):
    """A copy of that study in the usual place."""
    folder = reports / "made" / "optuna_studies"
    folder.mkdir(parents=True)
    shutil.copy(database, folder / "ctbprn_study.db")
    return search.load_study("made")


@pytest.fixture
def confirmation(study, small_task):
    return confirm.Confirmation(study, small_task, n_seeds=3, n_test=64)


def test_the_candidates_are_the_best_trials_the_published_two_and_the_defaults(study, small_task):
    trials = search.records(study)
    runs = confirm.candidates(trials, small_task, 4, n_top=1)
    best = {f"trial {trials.loc[trials['val_accuracy'].idxmax(), 'trial']}",
            f"trial {trials.loc[trials['val_ce'].idxmin(), 'trial']}"}  # fmt: skip
    assert {run.role for run in runs} == best | {"published trial 1", "published trial 2", "defaults"}
    assert all(run.hyperparameters.seq_len <= small_task.n_tokens and run.n_steps == 4 for run in runs)
    for run in runs:
        if run.role.startswith("trial"):
            params = study.trials[int(run.role.split()[1])].params
            assert all(getattr(run.hyperparameters, name) == params[name] for name in SMALL)


def test_an_ablation_moves_one_thing_at_a_time_through_four_levels_and_past_an_end_where_the_best_lies():
    task = tasks.RoutingTask()
    space = search.default_space(task)
    best = confirm.Run("trial 3", Hyperparameters(lr=9.9e-3, d=96, rank=4, temperature=0.51, seq_len=128), 500)
    runs = confirm.ablations(best, space, task)
    by_factor = {}
    for run in runs:
        by_factor.setdefault(run.factor, []).append(run)
        changed = {name for name in space if getattr(run.hyperparameters, name) != getattr(best.hyperparameters, name)}
        assert changed <= {run.factor.removesuffix(", equal samples")}
        assert run.base == "trial 3"
    for name in space:
        levels = [run.level for run in by_factor[name]]
        assert len(levels) >= 4 and sorted(set(levels)) == levels
        assert getattr(best.hyperparameters, name) in levels
    assert max(r.level for r in by_factor["lr"]) > 1e-2 and max(r.level for r in by_factor["d"]) > 96
    assert min(r.level for r in by_factor["temperature"]) < 0.5 and min(r.level for r in by_factor["rank"]) < 4
    assert max(r.level for r in by_factor["seq_len"]) == 128
    equal = {run.n_steps * run.level for run in by_factor["batch_size, equal samples"]}
    assert max(equal) - min(equal) <= 64
    assert [run.n_steps for run in by_factor["n_steps"]] == [250, 500, 1000, 2000]


def test_a_confirmed_score_is_that_of_a_training_with_seeds_that_tuning_never_had(confirmation, small_task):
    run = confirm.Run("defaults", Hyperparameters(d=4, rank=2, batch_size=4, seq_len=8), 4)
    record = confirmation.train([run])[confirmation.key(run)]
    assert len(record["test_accuracy"]) == 3
    seeds = np.random.SeedSequence(0, spawn_key=(confirm.CONFIRMING,))
    again = fit(run.hyperparameters, small_task, Budget(4, 3, n_evals=1, n_validation=64, precision="fp32"), seeds)
    expected = score(again.model, small_task, "test", 64, 8)
    assert record["test_ce"] == expected["test_ce"].tolist()
    used = [np.random.SeedSequence(0, spawn_key=(search.TUNING, n)).generate_state(2, np.uint64) for n in range(1000)]
    assert not set(seeds.generate_state(2, np.uint64).tolist()) & set(np.ravel(used).tolist())


def test_the_best_is_measured_afresh_when_it_is_ablated(confirmation):
    hp = Hyperparameters(d=4, rank=2, batch_size=4, seq_len=8)
    chosen, own = confirm.Run("trial 3", hp, 2), confirm.Run("", hp, 2, "trial 3", "d", 4)
    other = confirm.Run("", hp, 2, "trial 3", "rank", 2)
    records = confirmation.train([chosen, own, other])
    assert len(records) == 2  # its own level is one run, whatever is moved
    assert records[confirmation.key(chosen)]["test_ce"] != records[confirmation.key(own)]["test_ce"]


def test_records_of_another_precision_are_not_mixed_and_failures_are_tried_again(confirmation, monkeypatch):
    run = confirm.Run("defaults", Hyperparameters(d=4, rank=2, batch_size=4, seq_len=8), 2)
    key, others = confirmation.key(run), []
    for precision, device in (("bf16", "cpu"), ("fp32", "cuda")):
        with monkeypatch.context() as patch:
            patch.setattr(confirmation, "precision", precision)
            patch.setattr(confirmation, "device", torch.device(device))
            others.append(confirmation.key(run))
    assert len({key, *others}) == 3
    failed = dict(state=optuna.trial.TrialState.FAIL, user_attrs={"key": key, "failure": "oom"})
    for other in others:
        confirmation.study.add_trial(optuna.create_trial(value=-1.0, user_attrs={"key": other, "mean_test_ce": -1.0}))
    confirmation.study.add_trial(optuna.create_trial(**failed))
    done = []
    kept = confirmation.train([run], lambda *words: done.append(words))
    assert len(done) == 1
    confirmation.study.add_trial(optuna.create_trial(**failed))  # by a worker beside this one
    assert confirmation.train([run], lambda *words: pytest.fail("trained again")) == kept
    confirmation.write_plan([run], 3, {}, None)
    assert confirm.records("made")[0]["test_ce"].tolist() == kept[key]["test_ce"]


def test_what_is_done_is_kept_and_only_the_rest_is_trained(confirmation, monkeypatch):
    runs = [confirm.Run(str(n), Hyperparameters(lr=n * 1e-3, d=4, rank=2, batch_size=4, seq_len=8), 2) for n in (1, 2)]
    first = confirmation.train(runs[:1])
    done = []
    both = confirmation.train(runs, lambda record, n, total: done.append((n, total)))
    assert done == [(2, 2)] and both[confirmation.key(runs[0])] == first[confirmation.key(runs[0])]
    monkeypatch.setattr(confirm, "fit", lambda *_, **__: pytest.fail("trained again"))
    assert confirmation.train(runs) == both
    other = confirm.Confirmation(confirmation_study(confirmation), confirmation.task, n_seeds=4, n_test=64)
    assert other.key(runs[0]) != confirmation.key(runs[0])


def confirmation_study(confirmation):
    return search.load_study(confirmation.name)


def test_the_best_are_saved_with_weights_that_load_and_score_as_the_file_says(confirmation, small_task):
    runs = [confirm.Run(f"trial {d}", Hyperparameters(d=d, rank=2, batch_size=4, seq_len=8), 6) for d in (4, 8)]
    records = confirmation.train(runs)
    best = confirmation.save_best(runs, records)
    folder = storage.study_folder("made")
    for name, metric in (("best_accuracy", "test_accuracy"), ("best_ce", "test_ce")):
        content = json.loads((folder / f"{name}.json").read_text())
        assert content["role"] == best[name].role
        assert content[metric]["seeds"] == records[confirmation.key(best[name])][metric]
        mean, low, high = evidence.mean_interval(content[metric]["seeds"], nats=metric == "test_ce")
        assert (content[metric]["mean"], content[metric]["low"], content[metric]["high"]) == (mean, low, high)
        model = CTBPRN.load(folder / content["weights"]["file"])
        val_ce = records[confirmation.key(best[name])]["val_ce"]
        assert val_ce[content["weights"]["seed"]] == min(val_ce) and len(set(val_ce)) == 3
        scores = score(model, small_task, "test", 64, content["hyperparameters"]["seq_len"])
        assert scores[metric][0] == pytest.approx(content["weights"][metric], abs=1e-6)
    means = [np.mean(records[confirmation.key(run)]["test_ce"]) for run in runs]
    assert best["best_ce"] is runs[int(np.argmin(means))]


def test_records_have_a_row_for_each_role_and_seed_and_chance_where_a_seed_diverged(confirmation, small_task):
    good = confirm.Run("defaults", Hyperparameters(d=4, rank=2, batch_size=4, seq_len=8), 2)
    bad = confirm.Run("", Hyperparameters(lr=1e30, d=4, rank=2, batch_size=4, seq_len=8), 3, "defaults", "lr", 1e30)
    assert confirm.records("made") == (None, None)
    confirmation.train([good, bad])
    confirmation.write_plan([good, bad], 3, {"linear rule": 0.9}, None)
    rows, about = confirm.records("made")
    assert len(rows) == 6 and about["n_seeds"] == 3 and about["baselines"] == {"linear rule": 0.9}
    worst = rows[rows["factor"] == "lr"]
    assert (worst["test_accuracy"] == 0.5).all() and (worst["test_ce"] == math.log(2)).all()
    assert worst["diverged_at"].notna().all() and rows.loc[rows["role"] == "defaults", "diverged_at"].isna().all()


def test_another_task_is_refused(study):
    with pytest.raises(InputError, match="study 'made' is of the task"):
        confirm.Confirmation(study, tasks.RoutingTask(n_features=12, n_tokens=8))


def test_confirmations_from_before_a_hyperparameter_was_added_keep_their_keys():
    """The keys are those that the code had when there were seven hyperparameters."""
    made = confirm.Confirmation.__new__(confirm.Confirmation)
    made.task, made.n_test, made.seed, made.budget = tasks.RoutingTask(), 8192, 0, Budget(500, 8, n_evals=1)
    made.precision, made.device = "bf16", torch.device("cpu")
    hp = Hyperparameters(lr=0.00153, rank=16, temperature=1.71)
    assert made.key(confirm.Run("published trial 2", hp, 500)) == "c7e2956364ab520e"
    assert made.key(confirm.Run("", hp, 500, "published trial 2")) == "656a0a5605cb052e"
    assert made.key(confirm.Run("published trial 2", replace(hp, weight_decay=0.1), 500)) != "c7e2956364ab520e"
