"""Worker processes of one machine: tune and confirm share their work, whoever is killed."""

import os
import random
import shutil
import signal
import time
from dataclasses import replace

import numpy as np
import optuna
import psutil
import pytest
import torch
from crew import FORKS, prepare, question, until
from optuna.trial import TrialState
from torch.utils.flop_counter import FlopCounterMode

from ctbprn_lib import InputError, confirm, evidence, processes, search, storage, tasks, workers
from ctbprn_lib.train import Budget, Hyperparameters, fit, multiply_adds, untrained

N_KILLS = int(os.environ.get("CTBPRN_TEST_KILLS", "4"))  # more by hand: one takes seconds
RUNS = [
    confirm.Run(f"rate {n}", Hyperparameters(lr=n * 1e-3, d=4, rank=2, batch_size=4, seq_len=8), 40)
    for n in range(1, 17)
]
TUNED = ("s", 3, question(4))


def confirmation(study, **how):
    looks = evidence.Schedule((2, 4), (0.5, 0.5))
    return confirm.Confirmation(study, question()["task"], looks, n_test=32, **how)


def scores(made):
    """{key: scores} of the runs that are done."""
    records = confirm._by_key(made.study)
    return {key: (record["test_ce"], record["val_ce"]) for key, record in records.items()}


@pytest.fixture(scope="module")
def undisturbed(tuned, tmp_path_factory):
    """The scores of RUNS as one process gives them when nothing happens."""
    root = tmp_path_factory.mktemp("undisturbed")
    shutil.copy(tuned, root / "study.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "REPORTS", root / "reports")
        study = search.load_study("s", f"sqlite:///{root}/study.db")
        made = confirmation(study)
        assert made.train(RUNS)
        return scores(made)


def _confirm(reports, n_workers, constants, url=""):
    """What a process does that a person has started to confirm."""
    prepare(url, constants)
    storage.REPORTS = reports
    confirmation(search.load_study("s"), n_workers=n_workers).train(RUNS)


def start(reports, n_workers=2, url="", **constants):
    process = FORKS.Process(target=_confirm, args=(reports, n_workers, constants, url))
    process.start()
    return process


def running(study):
    """Process ids of the workers that have a trial now."""
    found = confirm.confirm_study(study)
    trials = found.get_trials(deepcopy=False, states=(TrialState.RUNNING,)) if found else ()
    pids = {trial.user_attrs["worker"]["pid"] for trial in trials if "worker" in trial.user_attrs}
    return {pid for pid in pids if psutil.pid_exists(pid)}  # some may have been killed


def n_done(study):
    found = confirm.confirm_study(study)
    return len(found.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))) if found else 0


def check_whole(study, undisturbed):
    """Each run is done once, nothing waits, and the scores are those of a confirmation that nothing has disturbed."""
    trials = confirm.confirm_study(study).trials
    done = [trial.user_attrs["key"] for trial in trials if trial.state == TrialState.COMPLETE]
    assert sorted(done) == sorted(undisturbed)
    assert {trial.state for trial in trials} <= {TrialState.COMPLETE, TrialState.FAIL}
    lost = [trial for trial in trials if trial.state == TrialState.FAIL]
    assert {trial.user_attrs["failure"] for trial in lost} <= {workers.LOST}
    assert scores(confirmation(study)) == undisturbed
    return len(lost)


def test_a_confirmation_whose_processes_are_killed_at_random_ends_with_the_same_numbers(study, reports, undisturbed):
    rng, killed = random.Random(0), {"parent": 0, "worker": 0}
    parent = start(reports)
    while sum(killed.values()) < N_KILLS and n_done(study) < len(RUNS) - 2:
        pids = until(lambda: running(study) or not parent.is_alive())  # noqa: B023
        time.sleep(rng.uniform(0, 0.15))
        if not parent.is_alive():
            break
        if killed["parent"] <= killed["worker"]:
            parent.kill()
            parent.join()
            killed["parent"] += 1
            until(lambda: not any(map(psutil.pid_exists, pids)))  # noqa: B023  its workers end by themselves
            parent = start(reports)
        elif psutil.pid_exists(pid := rng.choice(sorted(pids))):
            os.kill(pid, signal.SIGKILL)
            killed["worker"] += 1
    parent.join(60)
    assert parent.exitcode == 0
    n_lost = check_whole(study, undisturbed)
    print(f"killed: {killed}; {n_lost} trainings lost and tried again")
    assert killed["parent"] and killed["worker"] and n_lost


def test_machines_share_a_confirmation_and_train_each_run_once(study, reports, undisturbed):
    parents = [start(reports, n_workers=n) for n in (1, 1, 2)]
    for parent in parents:
        parent.join(60)
    assert [parent.exitcode for parent in parents] == [0, 0, 0]
    assert check_whole(study, undisturbed) == 0
    done = confirm.confirm_study(study).trials
    assert len({trial.user_attrs["worker"]["pid"] for trial in done}) >= 3


def test_a_frozen_worker_is_replaced_and_what_it_trained_is_not_counted_twice(study, reports, undisturbed):
    constants = dict(HEARTBEAT=0.5, GRACE=2, POLL=0.2)
    frozen = start(reports, 1, **constants)
    until(lambda: n_done(study) > 1 and running(study))
    os.kill(frozen.pid, signal.SIGSTOP)
    other = start(reports, 1, **constants)
    other.join(60)
    os.kill(frozen.pid, signal.SIGCONT)
    frozen.join(60)
    assert (other.exitcode, frozen.exitcode) == (0, 0)
    assert check_whole(study, undisturbed) <= 1


def test_a_database_that_is_restarted_loses_nothing(server, reports, undisturbed, monkeypatch):
    url = server.database("confirmed")
    monkeypatch.setenv("CTBPRN_STORAGE", url)
    asked = question(4)
    study = search.open_study("s", pruner="none", **asked)
    search.run_trials(study, 3, **asked)
    parents = [start(reports, n, url) for n in (1, 2)]
    until(lambda: n_done(study) > 2)
    server.stop()
    time.sleep(1)
    server.start()
    for parent in parents:
        parent.join(90)
    assert [parent.exitcode for parent in parents] == [0, 0]
    check_whole(study, undisturbed)
    storage.disconnect(study._storage)


def test_ctrl_c_hands_the_runs_on_and_the_same_command_goes_on(study, reports, undisturbed):
    parent = start(reports)
    pids = until(lambda: n_done(study) > 1 and running(study))
    os.kill(parent.pid, signal.SIGINT)
    parent.join(20)
    assert parent.exitcode == 1 and not any(map(psutil.pid_exists, pids))
    trials = confirm.confirm_study(study).trials
    assert TrialState.WAITING in {trial.state for trial in trials}
    begun = [trial for trial in trials if trial.state == TrialState.RUNNING]  # stopped before its training
    signed = [trial.user_attrs["worker"] for trial in begun if "worker" in trial.user_attrs]  # or not yet
    assert len(begun) <= 2 and all(map(workers._is_gone, signed))
    confirmation(study, n_workers=2).train(RUNS)
    check_whole(study, undisturbed)


def test_a_configuration_that_does_not_fit_into_memory_fails_alone(study, monkeypatch):
    fit = confirm.fit

    def fit_or_fail(hp, *args, **kwargs):
        if hp == RUNS[1].hyperparameters:
            raise MemoryError
        return fit(hp, *args, **kwargs)

    monkeypatch.setattr(confirm, "fit", fit_or_fail)
    made = confirmation(study)
    assert made.train(RUNS[:3])
    records = confirm._by_key(made.study, failed=True)
    assert ["failure" in records[made.key(run)] for run in RUNS[:3]] == [False, True, False]
    assert "out of memory at Hyperparameters(lr=0.002" in records[made.key(RUNS[1])]["failure"]
    monkeypatch.undo()
    monkeypatch.setattr(storage, "REPORTS", made.weights.parent.parent / "reports")
    made.train(RUNS[:3])
    assert len(scores(made)) == 3  # tried again, and now there was room


def test_what_is_finished_is_told_once_and_in_order_whichever_worker_ran_it(study):
    told, asked = [], question(4)
    study = search.open_study("s", pruner="none", **asked)
    search.run_trials(study, 9, **asked, n_workers=2, on_trial=lambda study, trial, n: told.append((trial, n)))
    assert [n for _, n in told] == [4, 5, 6, 7, 8, 9]
    ends = [trial.datetime_complete for trial, _ in told]
    assert ends == sorted(ends)
    assert sorted(trial.number for trial, _ in told) == [3, 4, 5, 6, 7, 8]


class Broken(search.Search):
    """Work that ends in an error of its own."""

    def run(self, study, trial):
        raise RuntimeError("broken")


class Deadly(search.Search):
    """Work that ends the process that does it."""

    def run(self, study, trial):
        os.kill(os.getpid(), signal.SIGKILL)


def work_of(kind, study):
    asked = question(4)
    return kind(
        "s", storage.url_of(study), asked["task"], asked["space"], asked["budget"], "val_ce", 0, "tpe", "none", "cpu", 9
    )


def test_an_error_in_a_worker_ends_all_workers_and_is_raised(study):
    with pytest.raises(RuntimeError, match=r"a worker ended in an error[\s\S]*RuntimeError: broken"):
        processes.run(work_of(Broken, study), study, 2)
    states = [trial.state for trial in search.load_study("s").trials]
    assert TrialState.RUNNING not in states


def test_workers_that_are_always_ended_from_outside_are_given_up(study):
    with pytest.raises(InputError, match="workers were ended from outside 6 times in a row"):
        processes.run(work_of(Deadly, study), study, 2)


def test_no_trial_is_begun_that_would_end_after_the_time(study, monkeypatch):
    asked = question(4)
    study = search.open_study("s", pruner="none", **asked)
    monkeypatch.setattr(search, "seconds_of", lambda trial: 2.0)
    search.run_trials(study, 5, **asked, minutes=0.03)  # 1.8 seconds
    assert len(study.trials) == 3
    assert study.user_attrs["out_of_time"] == {"minutes": 0.03, "n_trials": 5}
    search.run_trials(study, 5, **asked, minutes=1)
    assert len(study.trials) == 5 and study.user_attrs["out_of_time"] is None


def test_confirmation_stops_at_its_time_and_goes_on_with_more(study, monkeypatch):
    monkeypatch.setattr(search, "seconds_of", lambda trial: 2.0)
    made = confirmation(study, minutes=0.03)
    assert not made.train(RUNS[:3]) and scores(made) == {} and made.study.user_attrs["out_of_time"]
    with pytest.raises(InputError, match="no configuration could be trained: the time was too short"):
        made.base(RUNS[:3])
    with pytest.raises(InputError, match="the minutes were over before every candidate was trained"):
        made.train_all(RUNS[:3])
    again = confirmation(study)
    again.train_all(RUNS[:3])
    assert len(scores(again)) == 3


def test_what_does_not_fit_into_the_time_waits_and_shorter_runs_are_trained(study, monkeypatch):
    too_long = replace(RUNS[0], role="long", n_steps=1000, name="long")
    seconds = lambda self, study, trial: 1e6 if confirm._run_of(trial).name == "long" else 0.0  # noqa: E731
    monkeypatch.setattr(confirm.Confirming, "seconds", seconds)
    made = confirmation(study, minutes=1)
    assert not made.train([too_long, *RUNS[:2]])
    trained = made.scores([too_long, *RUNS[:2]])["test_ce"]
    assert list(trained) == [run.name for run in RUNS[:2]]
    for call in (lambda: made.best([too_long]), lambda: made.save("some", too_long)):
        with pytest.raises(InputError, match=r"the minutes were over before (any candidate|long) was trained"):
            call()


def test_the_expected_time_of_a_training_follows_what_was_measured():
    """Milliseconds of a replica-step on one thread of a CPU with AVX2, for (d, n_layers), 128 tokens and batch 32."""
    measured = {(16, 1): 22.4, (24, 1): 29.4, (32, 1): 41.9, (64, 2): 143.6}
    task = tasks.RoutingTask()
    sizes = {shape: Hyperparameters(d=shape[0], n_layers=shape[1], rank=8) for shape in measured}
    units = [search.relative_time(hp, task, 1, 1) for hp in sizes.values()]
    rates = np.array(list(measured.values())) / units
    assert rates.max() / rates.min() < 1.2


@pytest.mark.parametrize(("mib", "n_threads", "expected"), [(0, 8, 8), (1500, 8, 4), (1e6, 8, 1), (0, 1, 1)])
def test_there_are_as_many_workers_as_cores_and_memory_allow(monkeypatch, mib, n_threads, expected):
    monkeypatch.setattr(processes, "available_mib", lambda: 9000.0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: n_threads)
    assert processes.count("cpu", mib) == expected


def test_the_memory_of_a_worker_is_estimated_above_what_its_training_takes():
    space = search.default_space(question()["task"])
    hp = Hyperparameters(d=96, rank=16, batch_size=32, seq_len=8)
    asked = question()
    taken = fit(hp, asked["task"], Budget(2, 8, n_evals=1, n_validation=32, precision="fp32")).peak_mem_mib
    assert taken < search.memory_mib(space, asked["task"], 8) + processes.PROCESS_MIB


def test_the_work_of_a_training_is_what_counting_its_products_gives():
    task = question()["task"]
    for rank in (2, 8):
        hp = Hyperparameters(d=12, rank=rank, seq_len=8, n_layers=3)
        model, generator = untrained(hp, task, 1)
        batch = task.draw(1, 64, generator)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(batch.x)
        counted = counter.get_total_flops() / 2 / 64
        assert multiply_adds(hp, task) == pytest.approx(counted, rel=0.05)  # W U is multiplied once a batch


def test_sampling_knows_what_other_workers_try():
    sampler = search.SAMPLERS["tpe"](seed=0)
    assert isinstance(sampler, optuna.samplers.TPESampler) and sampler._constant_liar
