"""Checkpoints: a stopped training goes on as if it had not been, and nothing damaged or foreign is used."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from crew import FORKS

from ctbprn_lib import checkpoint, files, search, train
from ctbprn_lib.train import Budget, Hyperparameters, fit

HP = Hyperparameters(lr=5e-3, d=8, rank=2, temperature=1.0, batch_size=8, seq_len=8)
BUDGET = Budget(10, 2, n_evals=5, n_validation=16)


@pytest.fixture(autouse=True)
def often(monkeypatch):
    monkeypatch.setattr(train, "CHECKPOINT_SECONDS", 0)


class Stop(Exception):
    pass


def stopped(task, path, n_scorings, hp=HP):
    """Leave what a training leaves that is stopped after so many scorings."""

    def stop(result):
        if len(result.steps) == n_scorings + 1:  # before this one is kept
            raise Stop

    with pytest.raises(Stop):
        fit(hp, task, BUDGET, 3, on_eval=stop, checkpoint=path)


def assert_equal(a, b):
    for name, curve in a.curves.items():
        np.testing.assert_allclose(b.curves[name], curve, rtol=0, atol=1e-6)
    for ours, theirs in zip(a.model.state_dict().values(), b.model.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert (a.steps, a.samples_seen, a.diverged_at) == (b.steps, b.samples_seen, b.diverged_at)


@pytest.fixture
def steps(monkeypatch):
    """Counts training steps."""
    taken, step = [], train.Training._step
    monkeypatch.setattr(train.Training, "_step", lambda self: (taken.append(1), step(self)))
    return taken


@pytest.mark.parametrize("n_scorings", [1, 3, 4])
def test_a_stopped_training_goes_on_to_the_same_result(small_task, tmp_path, steps, n_scorings):
    whole = fit(HP, small_task, BUDGET, 3)
    stopped(small_task, tmp_path / "c.safetensors", n_scorings)
    steps.clear()
    assert_equal(whole, fit(HP, small_task, BUDGET, 3, checkpoint=tmp_path / "c.safetensors"))
    assert len(steps) == 10 - (2 * n_scorings + 1)  # the step of the next scoring was not kept
    checkpoint.remove(tmp_path / "c.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_where_no_checkpoint_can_be_written_the_training_goes_on(small_task, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "c.safetensors"  # in a folder that cannot be
    assert_equal(fit(HP, small_task, BUDGET, 3), fit(HP, small_task, BUDGET, 3, checkpoint=path))
    assert f"{path}: no checkpoint was kept" in caplog.text and list(tmp_path.iterdir()) == [tmp_path / "file"]


LONG = Budget(150, 2, n_evals=15, n_validation=16)


def fit_and_tell(task, path, told):
    train.CHECKPOINT_SECONDS = 0
    fit(HP, task, LONG, 3, checkpoint=path, on_eval=lambda result: told.put(len(result.steps)))


@pytest.mark.slow
def test_a_killed_process_leaves_a_checkpoint_that_another_goes_on_from(small_task, tmp_path, steps):
    path, told = tmp_path / "c.safetensors", FORKS.SimpleQueue()
    process = FORKS.Process(target=fit_and_tell, args=(small_task, path, told))
    process.start()
    while told.get() < 4:
        pass
    process.kill()
    process.join()
    whole = fit(HP, small_task, LONG, 3)
    steps.clear()
    assert_equal(whole, fit(HP, small_task, LONG, 3, checkpoint=path))
    assert len(steps) <= 150 - 3 * 10


def hostile(change):
    """A file with a valid SHA-256, whose content somebody has changed."""

    def rewrite(path):
        tensors, text = files.tensors(path)
        kept = json.loads(text)
        change(kept["about"], tensors)
        files.write_tensors(path, tensors, json.dumps(kept))

    return rewrite


DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-50]),
    "another shape": hostile(lambda about, tensors: tensors.update(head_c=torch.zeros(1))),
    "a missing tensor": hostile(lambda about, tensors: tensors.pop("taken")),
    "a generator that is none": hostile(lambda about, tensors: tensors["draws"].fill_(255)),
    "curves of another length": hostile(lambda about, tensors: about["curves"].update(val_ce=[[1.0, 1.0]])),
    "curves of words": hostile(lambda about, tensors: about["curves"].update(val_ce=[["a", "b"]])),
    "curves in a row": hostile(lambda about, tensors: about.update(curves=[[1.0, 1.0]])),
    "no curves": hostile(lambda about, tensors: about.pop("curves")),
    "steps beyond": hostile(lambda about, tensors: about.update(steps=[4, 8, 99])),
    "another step": hostile(lambda about, tensors: tensors["taken"].add_(1)),
    "no time": hostile(lambda about, tensors: about.update(step_time_ms="soon")),
}


@pytest.fixture(scope="module")
def left(small_task, tmp_path_factory):
    """A training that was not stopped, and the folder of one that was."""
    folder = tmp_path_factory.mktemp("left")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "CHECKPOINT_SECONDS", 0)
        stopped(small_task, folder / "c.safetensors", 3)
    return fit(HP, small_task, BUDGET, 3), folder


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("both", [False, True])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_is_used(
    small_task, left, tmp_path, steps, caplog, damage, both
):
    whole, folder = left
    path = tmp_path / "c.safetensors"
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    for place in (path, checkpoint.previous(path))[: 1 + both]:
        DAMAGES[damage](place)
    assert_equal(whole, fit(HP, small_task, BUDGET, 3, checkpoint=path))
    assert len(steps) == (10 if both else 4)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * (1 + both)
    assert "c.safetensors: not used as a checkpoint" in caplog.text


@pytest.mark.parametrize(
    "other",
    [dict(hp=dataclasses.replace(HP, lr=6e-3)), dict(seed=4), dict(budget=dataclasses.replace(BUDGET, clip=2.0))],
)
def test_a_checkpoint_of_another_training_is_not_used(small_task, tmp_path, caplog, other):
    asked = dict(hp=HP, budget=BUDGET, seed=3) | other
    stopped(small_task, tmp_path / "c.safetensors", 3)
    words = asked["hp"], small_task, asked["budget"], asked["seed"]
    assert_equal(fit(*words), fit(*words, checkpoint=tmp_path / "c.safetensors"))
    assert "of another training" in caplog.text


def test_short_trainings_write_no_checkpoint(small_task, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "CHECKPOINT_SECONDS", 30)
    stopped(small_task, tmp_path / "c.safetensors", 3)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_trial_that_was_lost_goes_on_from_its_checkpoint(small_task, reports, monkeypatch, steps):
    """Its second try ends with the score of an undisturbed one, and its pruner sees every scoring."""
    space = search.default_space(small_task) | {"d": [8], "rank": [2], "batch_size": [8]}
    asked = dict(task=small_task, space=space, budget=BUDGET)
    calm = search.open_study("calm", f"sqlite:///{reports}/calm.db", **asked)
    search.run_trials(calm, 2, **asked)
    study = search.open_study("s", **asked)
    search.run_trials(study, 1, **asked)
    real = search.scores

    def interrupted(result, at=-1):
        if len(result.steps) == 3:
            raise KeyboardInterrupt
        return real(result, at)

    monkeypatch.setattr(search, "scores", interrupted)
    with pytest.raises(KeyboardInterrupt):
        search.run_trials(study, 2, **asked)
    monkeypatch.setattr(search, "scores", real)
    folder = reports.parent / "runs" / "checkpoints"
    assert sorted(path.suffix for path in folder.iterdir()) == [".before", ".safetensors"]
    steps.clear()
    search.run_trials(study, 2, **asked)
    assert len(steps) == 10 - 5
    lost, retried = study.trials[1:]
    assert lost.state.name == "FAIL" and retried.user_attrs["retry_of"] == 1
    undisturbed = calm.trials[1]
    assert retried.values == pytest.approx(undisturbed.values, abs=1e-6)
    assert retried.intermediate_values == pytest.approx(undisturbed.intermediate_values, abs=1e-6)
    assert retried.user_attrs["curves"] == undisturbed.user_attrs["curves"]
    assert list(folder.iterdir()) == []
