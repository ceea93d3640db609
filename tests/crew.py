"""Workers of a small study as processes of their own, forked from one that has imported everything: many start at once,
and killing one costs no import.  Run as a script this file is that one; Crew talks to it.
"""

import collections
import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
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


class Crew:
    """hire a worker, kill it or wait for it; said is what workers have printed since it was last asked."""

    def __init__(self, folder):
        self.log, self.heard = Path(folder) / "log.txt", 0
        env = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}
        with self.log.open("w") as log:
            self.parent = subprocess.Popen((sys.executable, __file__), cwd=folder, env=env, text=True,
                                           stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)  # fmt: skip

    def hire(self, url, n_trials, n_steps=100, **constants):
        """The process id of a worker that runs the study "s" at url up to n_trials; constants of the library."""
        return self._ask("hire", url, n_trials, n_steps, constants)

    def wait(self, *pids):
        """Exit codes of workers when they have ended; -n for a signal."""
        return [self._ask("wait", pid) for pid in pids]

    def kill(self, pid, number=signal.SIGKILL):
        os.kill(pid, number)
        return self.wait(pid)[0]

    def said(self):
        text = self.log.read_text()
        self.heard, before = len(text), self.heard
        return text[before:]

    def end(self):
        self.parent.stdin.close()
        self.parent.wait(20)
        self.parent.stdout.close()

    def _ask(self, *words):
        self.parent.stdin.write(json.dumps(words) + "\n")
        self.parent.stdin.flush()
        return json.loads(self.parent.stdout.readline())


def until(true, seconds=60):
    """Wait until true() is; fails after so many seconds."""
    started = time.monotonic()
    while not (value := true()):
        assert time.monotonic() - started < seconds, "waited in vain"
        time.sleep(0.02)
    return value


def trials_at(url):
    """The trials of the study "s" at url; () if it is not there yet."""
    with contextlib.suppress(KeyError, InputError):
        kept = storage.connect(url, reading=True)
        try:
            return optuna.load_study(study_name="s", storage=kept).trials
        finally:
            kept.engine.dispose()
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


def question(n_steps=100, space=SPACE):
    """What the study of these workers asks."""
    return dict(task=tasks.RoutingTask(n_areas=2, n_features=8, n_tokens=8), space=space,
                budget=Budget(n_steps, 2, n_evals=2, n_validation=32, precision="fp32"))  # fmt: skip


def _work(url, n_trials, n_steps, constants):
    for name, value in constants.items():
        setattr(storage if hasattr(storage, name) else workers, name, value)
    os.environ["CTBPRN_STORAGE"] = url
    storage.REPORTS = Path(hashlib.sha256(url.encode()).hexdigest()[:8]) / "reports"  # checkpoints lie beside it
    asked = question(n_steps)
    try:
        search.run_trials(search.open_study("s", pruner="none", **asked), n_trials, **asked)
    except InputError as error:
        sys.exit(f"InputError: {error}")


def _main():
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which may be off where tests run in the background
    os.environ["TQDM_DISABLE"] = "1"
    for line in sys.stdin:
        what, *words = json.loads(line)
        if what == "wait":
            answer = os.waitstatus_to_exitcode(os.waitpid(words[0], 0)[1])
        elif (answer := os.fork()) == 0:
            code = 1
            try:
                _work(*words)
                code = 0
            except SystemExit as error:
                print(error, file=sys.stderr)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _main()
