"""Many workers on one PostgreSQL: exact totals, a server that is restarted, workers that freeze or lose it."""

import os
import signal
import time

import optuna
import pytest
from crew import check_exact, trials_at, until, work_for
from optuna.trial import TrialState

from ctbprn_lib import storage, workers


@pytest.mark.parametrize("n_workers", [1, 3, 8])
def test_workers_that_start_together_on_an_empty_database_all_run_and_the_total_is_exact(server, crew, n_workers):
    url, n_trials = server.database(f"empty_{n_workers}"), 4 + n_workers
    pids = [crew.hire(url, n_trials, n_steps=10) for _ in range(n_workers)]
    assert crew.wait(*pids) == [0] * n_workers, crew.new_output()
    trials = trials_at(url)
    check_exact(trials, n_trials)
    assert len(trials) == n_trials  # none was lost or given up either
    assert {trial.user_attrs["worker"]["pid"] for trial in trials} == set(pids)


def test_workers_that_start_together_on_an_empty_sqlite_file_do_too(crew, tmp_path):
    url = f"sqlite:///{tmp_path}/reports/s/study.db"
    pids = [crew.hire(url, 10, n_steps=10) for _ in range(4)]
    assert crew.wait(*pids) == [0] * 4, crew.new_output()
    check_exact(trials_at(url), 10)


def test_a_server_that_is_restarted_at_once_loses_no_finished_trial_and_workers_wait_for_it(server, crew):
    url = server.database("restarted")
    pids = [crew.hire(url, 12, n_steps=40) for _ in range(3)]
    until(lambda: sum(t.state == TrialState.COMPLETE for t in trials_at(url)) >= 3)
    before = {t.number: t for t in trials_at(url) if t.state == TrialState.COMPLETE}
    for _ in range(2):
        server.stop()
        time.sleep(1)
        server.start()
        time.sleep(1)
    assert crew.wait(*pids) == [0] * 3, crew.new_output()
    trials = trials_at(url)
    check_exact(trials, 12)
    assert all(trials[number] == trial for number, trial in before.items())
    print(f"two restarts: {len(before)} trials finished before, 12 after, {len(trials) - 12} tried again")


def test_a_worker_that_was_frozen_for_too_long_wakes_and_goes_on_with_another_trial(server, crew):
    url = server.database("frozen")
    how = dict(n_trials=12, n_steps=160, HEARTBEAT=0.5, GRACE=2, POLL=0.2)
    frozen = crew.hire(url, **how)
    until(lambda: [t for t in trials_at(url) if t.state == TrialState.RUNNING and t.intermediate_values])
    os.kill(frozen, signal.SIGSTOP)
    other = crew.hire(url, **how)
    until(lambda: any(t.user_attrs.get("failure") == workers.LOST for t in trials_at(url)))
    os.kill(frozen, signal.SIGCONT)
    assert crew.wait(frozen, other) == [0, 0], crew.new_output()
    trials = trials_at(url)
    check_exact(trials, 12)
    lost = [t.number for t in trials if t.state == TrialState.FAIL]
    by_frozen = [t for t in trials if t.user_attrs["worker"]["pid"] == frozen and t.number > lost[0]]
    assert len(lost) == 1 and by_frozen and all(t.state in workers.FINISHED for t in by_frozen)


def test_a_worker_that_stands_still_with_the_lock_loses_it_and_learns_so(server, monkeypatch):
    url = server.database("still")
    monkeypatch.setattr(storage, "FROZEN", 1)
    with storage.locked(url) as still_locked:
        assert still_locked()
        time.sleep(1.5)
        with storage.locked(url):
            assert not still_locked()


def test_a_trial_begun_without_the_lock_is_given_back(server, monkeypatch):
    url = server.database("alone")
    kept = storage.connect(url)
    optuna.create_study(study_name="s", storage=kept)
    study = workers.Study("s", kept)
    study.marks, study.outside = {"sampler": "tpe"}, lambda values: ""
    answers = iter([False, True])
    monkeypatch.setattr(storage, "_answers", lambda connection: next(answers))
    trial = workers.begin(study, work_for(1))
    assert workers.first_try(trial) == 0 and trial.number == 1
    assert [t.state for t in study.trials] == [TrialState.FAIL, TrialState.RUNNING]
    assert ["worker" in t.user_attrs for t in study.trials] == [False, True]
    storage.disconnect(kept)
