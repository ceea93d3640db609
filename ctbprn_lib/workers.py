"""How workers share a study: any number of processes on any number of machines, each of which may die or freeze.

A worker takes a trial under a lock that keeps the others out, tells the database every few seconds that it still lives,
and puts the result there. What it has finished is kept; what it had begun is tried again, here or elsewhere.
"""

import hashlib
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState

from ctbprn_lib.storage import StorageError, locked

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
HEARTBEAT = 10  # seconds between a worker's signs of life
POLL: float = 1  # seconds, and up to five times as long, between looks at the trials of others
MOST_TRIES = 10  # of a trial whose workers die
LOST = "its worker was stopped before the end"


class Study(optuna.Study):
    """A study as its workers and its report see it: without the trials that others put into the database by hand.

    marks: what every trial begun here carries from its first moment ({"sampler": ..., "pruner": ...}).
    outside(values): why hyperparameters that somebody enqueued cannot be run, or "".
    Samplers, pruners, counts and best_trials all read trials through _get_trials.
    """

    marks: dict[str, str]
    outside: Callable[[dict], str]

    def _get_trials(self, deepcopy=True, states=None, use_cache=False):
        return [trial for trial in super()._get_trials(deepcopy, states, use_cache) if is_ours(trial)]

    def foreign(self) -> list[optuna.trial.FrozenTrial]:
        """The trials of others that will never be run here: all but those that wait."""
        trials = super()._get_trials(deepcopy=False)
        return [trial for trial in trials if not is_ours(trial) and trial.state != TrialState.WAITING]


def is_ours(trial: optuna.trial.FrozenTrial) -> bool:
    """Whether a worker of this project began the trial and, if it is finished, recorded it."""
    if trial.state in FINISHED:
        return "curves" in trial.user_attrs
    return not {"sampler", "worker", "retry_of"}.isdisjoint(trial.user_attrs)


class Stopped(KeyboardInterrupt):
    """Ctrl-C, when what ran has been handed on: Jupyter shows the message and no traceback."""

    def _render_traceback_(self):
        return [str(self)]


class TrialFailed(Exception):
    """A trial that gives no score; the reason is kept with the trial."""


def run(
    study: Study, n_trials: int, objective: Callable[[optuna.Trial], float | tuple[float, ...]]
) -> Iterator[optuna.trial.FrozenTrial]:
    """Run objective(trial) until n_trials are finished (complete or pruned), whoever ran them; yields each one it ran.

    objective returns the trial's values, or raises TrialPruned, or TrialFailed with the reason. Ctrl-C and SIGTERM end
    the call and leave the trial that runs to be tried again.
    """
    with _sigterm_as_ctrl_c():
        while trial := begin(study, n_trials):
            state, values, why = TrialState.COMPLETE, None, ""
            try:
                with alive(study, trial):
                    values = objective(trial)
            except optuna.TrialPruned:
                state = TrialState.PRUNED
            except TrialFailed as error:
                state, why = TrialState.FAIL, str(error)
            except UpdateFinishedTrialError:
                continue  # this process stood still for so long that the trial was given up: another one, then
            except KeyboardInterrupt:
                fail(study, trial)
                raise Stopped(f"Stopped in trial {trial.number}; the same command goes on from here.") from None
            except Exception as error:
                if not isinstance(error, StorageError):  # which keeps nothing
                    fail(study, trial, f"{type(error).__name__}: {error}")
                raise
            if kept := finish(study, trial, state, values, why):
                yield kept


def begin(study: Study, n_trials: int) -> optuna.Trial | None:
    """The next trial to run, or None when n_trials are finished (complete or pruned), whoever ran them.

    Trials that run count too, so the total is exact: where they suffice, this waits until they are finished or one of
    them turns out to be lost.
    """
    pause = POLL
    while True:
        with locked(study._storage._backend.url) as still_locked:
            states = _care_for_the_lost(study, n_trials)
            n_finished = sum(state in FINISHED for state in states)
            n_running = states.count(TrialState.RUNNING)
            if n_finished >= n_trials:
                return None
            if n_finished + n_running < n_trials:
                trial = _ask(study)
                if not still_locked():  # others may have begun enough; it is not signed, so the next look gives it up
                    continue
                try:
                    study._storage.record_heartbeat(trial._trial_id)
                    trial.set_user_attr("worker", _worker())
                except UpdateFinishedTrialError:  # by another, because the lock was lost just now
                    continue
                return trial
        if pause == POLL:
            print(f"waiting for {n_running} trials that others run", file=sys.stderr, flush=True)
        time.sleep(pause * random.uniform(0.5, 1))
        pause = min(1.5 * pause, 5 * POLL)


def _ask(study):
    """A trial that waits (a lost one, or one that somebody enqueued), else a new one.  Only under the lock.

    It is marked before it runs, so that a trial that runs without marks is another program's.
    """
    for trial in study._storage.get_all_trials(study._study_id, deepcopy=False, states=(TrialState.WAITING,)):
        if reason := study.outside(trial.params | trial.system_attrs.get("fixed_params", {})):
            fail(study, trial, reason)
            continue
        for name, value in study.marks.items():
            study._storage.set_trial_user_attr(trial._trial_id, name, trial.user_attrs.get(name, value))
        break
    else:
        study.add_trial(optuna.create_trial(state=TrialState.WAITING, user_attrs=study.marks))
    return study.ask()  # the first that waits


def _care_for_the_lost(study, n_trials):
    """Fail trials whose worker is gone, and queue as many lost ones again as n_trials needs; returns all states.

    Only under the lock: no worker is then between asking for a trial and signing it. A trial is failed first and queued
    after, so that nothing is lost or done twice by whoever dies in between.
    """
    storage, study_id = study._storage, study._study_id
    silent = storage._get_stale_trial_ids(study_id)
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        worker = trial.user_attrs.get("worker")
        if worker is None or trial._trial_id in silent or _is_gone(worker):
            fail(study, trial)
    trials = study.get_trials(deepcopy=False)
    wanted = n_trials - sum(t.state in (*FINISHED, TrialState.RUNNING, TrialState.WAITING) for t in trials)
    tries = {}
    for trial in trials:
        tries.setdefault(first_try(trial), []).append(trial)
    for first, several in tries.items():
        last = several[-1]
        if wanted > 0 and last.user_attrs.get("failure") == LOST and len(several) < MOST_TRIES:
            marks = {name: last.user_attrs.get(name, mark) for name, mark in study.marks.items()}
            same = dict(params=last.params, distributions=last.distributions, user_attrs=marks | {"retry_of": first})
            study.add_trial(optuna.create_trial(state=TrialState.WAITING, **same))
            wanted -= 1
    return [trial.state for trial in study.get_trials(deepcopy=False)]


def first_try(trial: optuna.Trial | optuna.trial.FrozenTrial) -> int:
    """The number of the trial that this one tries again, or its own: a try has the seeds of the first."""
    return trial.user_attrs.get("retry_of", trial.number)


def fail(study: Study, trial: optuna.Trial | optuna.trial.FrozenTrial, why: str = LOST) -> None:
    """Fail a trial and keep why; one that was LOST is tried again with the same hyperparameters."""
    with suppress(UpdateFinishedTrialError):  # by another, just now
        study._storage.set_trial_user_attr(trial._trial_id, "failure", why)
        study._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)


def finish(
    study: Study, trial: optuna.Trial, state: TrialState, values: float | Sequence[float] | None = None, why: str = ""
) -> optuna.trial.FrozenTrial | None:
    """Put the outcome of a trial into the database.  Returns the trial kept there, None if it had been given up."""
    with suppress(UpdateFinishedTrialError):  # by another; or by the first attempt, whose acknowledgement was lost
        if why:
            trial.set_user_attr("failure", why)
        study.tell(trial, values, state, skip_if_finished=True)
    kept = study._storage.get_trial(trial._trial_id)
    return kept if kept.state == state else None


@contextmanager
def alive(study: Study, trial: optuna.Trial) -> Iterator[None]:
    """Tell the database every HEARTBEAT seconds that this process works on the trial."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(HEARTBEAT):
            try:
                study._storage.record_heartbeat(trial._trial_id)
            except StorageError:
                return  # the trial's own next word to the database says so where it is heard

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _worker():
    """This process, told from all others on this and other machines: {"machine", "pid", "started"}; {} beyond Linux."""
    try:
        machine = Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return {}
    machine = hashlib.sha256(machine.encode()).hexdigest()[:12]  # a host's name would be published with the database
    return {"machine": machine, "pid": os.getpid(), "started": _started(os.getpid())}


def _started(pid):
    """When a process of this machine was started, in clock ticks since boot; None if it is none or a dead one."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else int(fields[18])


def _is_gone(worker):
    """Whether a worker of this machine has ended, or is this process, which has no trial when it asks for one."""
    here = _worker()
    if not here or worker.get("machine") != here["machine"]:
        return False
    return worker == here or _started(worker["pid"]) != worker["started"]


@contextmanager
def _sigterm_as_ctrl_c():
    """A scheduler's request to end is KeyboardInterrupt, so that what runs is handed on; then it ends the process."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread hears signals
        return
    heard = []

    def interrupt(number: int, frame: object) -> None:
        heard.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        if heard:
            signal.raise_signal(signal.SIGTERM)
