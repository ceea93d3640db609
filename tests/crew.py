"""Workers of a small study as processes of their own.

They are forked from a process that has imported everything, so many start at once, and killing one costs no import.
"""

import collections
import contextlib
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import time
import types
from pathlib import Path

import optuna
import torch
from optuna.trial import TrialState

from ctbprn_lib import InputError, search, storage, tasks, workers
from ctbprn_lib.train import Budget

SPACE = {
    "lr": {"low": 1e-3, "high": 1e-2, "log": True},
    "d": [4, 8],
    "rank": [2],
    "temperature": {"low": 0.5, "high": 2.0},
    "batch_size": [4],
    "seq_len": [4, 8],
}
FORKS = multiprocessing.get_context("forkserver")  # a fork of the tests' own process, which has threads, can hang
FORKS.set_forkserver_preload(["ctbprn_lib.confirm", "optuna.storages._rdb.storage", "alembic.command"])


class Crew:
    """Workers that run the study "s". Their error output is one log file."""

    def __init__(self, folder):
        self.log, self.n_read, self.workers = Path(folder) / "log.txt", 0, {}
        self.log.touch()

    def hire(self, url, n_trials, n_steps=100, **constants):
        """The process id of a new worker that runs the study at url up to n_trials; constants of the library."""
        worker = FORKS.Process(target=_work, args=(self.log, url, n_trials, n_steps, constants))
        worker.start()
        self.workers[worker.pid] = worker
        return worker.pid

    def wait(self, *pids):
        """Exit codes of workers when they have ended; -n for a signal."""
        for pid in pids:
            self.workers[pid].join()
        return [self.workers.pop(pid).exitcode for pid in pids]

    def kill(self, pid, number=signal.SIGKILL):
        os.kill(pid, number)
        return self.wait(pid)[0]

    def new_output(self):
        """What workers have printed since the last call."""
        text = self.log.read_text()
        self.n_read, before = len(text), self.n_read
        return text[before:]

    def end(self):
        for worker in self.workers.values():
            worker.kill()


def until(true, seconds=60):
    """Wait until true() is; fails after so many seconds."""
    started = time.monotonic()
    while not (value := true()):
        assert time.monotonic() - started < seconds, "waited in vain"
        time.sleep(0.05)
    return value


def trials_at(url, study="s"):
    """The trials of a study at url; () if it is not there yet."""
    with contextlib.suppress(KeyError, InputError):
        kept = storage.connect(url, reading=True)
        try:
            return optuna.load_study(study_name=study, storage=kept).trials
        finally:
            storage.disconnect(kept)
    return ()


def check_exact(trials, n_trials):
    """n_trials are finished, none is left, none is another's twin, and every lost one was tried again."""
    states = collections.Counter(trial.state for trial in trials)
    assert sum(states[state] for state in workers.FINISHED) == n_trials, states
    assert states[TrialState.RUNNING] == states[TrialState.WAITING] == 0, states
    assert [trial.number for trial in trials] == list(range(len(trials)))
    finished = [trial for trial in trials if trial.state in workers.FINISHED]
    assert len({json.dumps(trial.params, sort_keys=True) for trial in finished}) == n_trials
    assert len({workers.first_try(trial) for trial in finished}) == n_trials
    for trial in trials:
        again = [t for t in trials if t.number > trial.number and workers.first_try(t) == workers.first_try(trial)]
        lost = trial.state == TrialState.FAIL
        signed = "worker" in trial.user_attrs  # one that a worker did not know of, or let go, need not be tried again
        assert (lost or not again) and (not (lost and signed) or again), (trial, trials)
        assert not lost or trial.user_attrs["failure"] == workers.LOST
        assert all(trial.params.items() <= t.params.items() for t in again)


def work_for(n_trials):
    """What workers.begin asks of the work on a study that shall have n_trials finished trials."""
    return types.SimpleNamespace(n_trials=n_trials, seconds=lambda study, trial: 0.0)


def question(n_steps=100, space=SPACE):
    """What the study of these workers asks."""
    return dict(task=tasks.RoutingTask(n_areas=2, n_features=8, n_tokens=8), space=space,
                budget=Budget(n_steps, 2, n_evals=2, n_validation=32, precision="fp32"))  # fmt: skip


def prepare(url, constants):
    """Make this process what a user's process is: Ctrl-C ends it; the database and constants of the library are these.

    Ctrl-C may be off where tests run in the background.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    os.environ["CTBPRN_STORAGE"] = url
    for name, value in constants.items():
        setattr(storage if hasattr(storage, name) else workers, name, value)


def _work(log, url, n_trials, n_steps, constants):
    prepare(url, constants)
    with log.open("a") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    os.chdir(log.parent)
    storage.REPORTS = Path(hashlib.sha256(url.encode()).hexdigest()[:8]) / "reports"  # checkpoints lie beside it
    asked = question(n_steps)
    try:
        search.run_trials(search.open_study("s", pruner="none", **asked), n_trials, **asked)
    except InputError as error:
        sys.exit(f"InputError: {error}")
