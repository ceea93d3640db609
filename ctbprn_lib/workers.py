"""Who runs the trials of a study: any number of processes on any number of machines, each of which may die or freeze.

A trial in the database has one of five states.

- WAITING: somebody has queued it. It is a lost trial, a training that confirmation needs, or one enqueued by hand.
- RUNNING: a worker has taken it under the lock and signed it. While it runs the worker gives a sign of life every
  HEARTBEAT seconds.
- COMPLETE or PRUNED: it is finished.
- FAIL: it gave no score, and its attribute "failure" says why. If the reason is LOST, its worker was stopped before the
  end: then a new trial with the same hyperparameters and the same seeds waits, whose attribute "retry_of" is the number
  of the first try.

So what is finished is kept, what had begun is tried again here or elsewhere, and the number of finished trials is
exact.
"""

import hashlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import parent_process
from pathlib import Path
from typing import Any, Protocol

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from ctbprn_lib.storage import StorageError, locked, url_of

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
HEARTBEAT = 10  # seconds between a worker's signs of life
POLL: float = 1  # seconds, and up to five times as long, between looks at the trials of others
MOST_TRIES = 10  # of a trial whose workers die
LOST = "its worker was stopped before the end"
QUEUED = ("key", "run", "block", "first_key")  # attributes of a queued trial that its next try has too


class Study(optuna.Study):
    """A study as its workers and its report see it: without the trials that others put into the database by hand.

    marks: what every trial begun here carries from its first moment ({"sampler": ..., "pruner": ...}).
    outside(values): why hyperparameters that somebody enqueued cannot be run, or "".
    Samplers, pruners, counts and best_trials all read trials through _get_trials.
    """

    def __init__(self, study_name: str, storage: BaseStorage, **options: Any) -> None:
        super().__init__(study_name, storage, **options)
        self.marks: dict[str, str] = {}
        self.outside: Callable[[dict[str, Any]], str] = lambda values: ""

    def _get_trials(self, deepcopy: bool = True, states: Any = None, use_cache: bool = False) -> list[FrozenTrial]:
        return [trial for trial in super()._get_trials(deepcopy, states, use_cache) if is_ours(trial)]

    def foreign(self) -> list[FrozenTrial]:
        """The trials of others that will never be run here: all but those that wait."""
        trials = super()._get_trials(deepcopy=False)
        return [trial for trial in trials if not is_ours(trial) and trial.state != TrialState.WAITING]


def is_ours(trial: FrozenTrial) -> bool:
    """Whether a worker of this project began the trial and, if it is finished, recorded it."""
    if trial.state in FINISHED:
        return not {"curves", "key"}.isdisjoint(trial.user_attrs)
    return not {"sampler", "worker", "retry_of", "key"}.isdisjoint(trial.user_attrs)


class Stopped(KeyboardInterrupt):
    """Ctrl-C, when the trials that ran have been handed on: Jupyter shows the message and no traceback."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


class TrialFailed(Exception):
    """A trial that gives no score; the reason is kept with the trial."""


class Work(Protocol):
    """What is to be done with the trials of a study. It holds plain values, because other processes get a copy."""

    n_trials: int | None  # finished trials that the study shall have; None: until no trial waits or runs
    device: str

    def open(self) -> Study:
        """The study, opened by the process that works."""

    def run(self, study: Study, trial: optuna.Trial) -> float | tuple[float, ...]:
        """The values of a trial. Raises TrialPruned, or TrialFailed with the reason."""

    def clear(self, study: Study, trial: FrozenTrial) -> None:
        """Remove what a trial has left on this machine, now that its result is in the database."""

    def seconds(self, study: Study, trial: FrozenTrial | None) -> float:
        """How long a trial that waits, or a new one (None), is expected to take; 0 where nothing is known yet."""


def work(work: Work, study: Study, ends_at: float = float("inf")) -> Iterator[FrozenTrial]:
    """Work in this process until the study has what work.n_trials says, whoever ran it; yields each trial run here.

    ends_at: no trial is begun that is expected to end after this time (of time.time).
    Ctrl-C and SIGTERM end the call; the trial that runs is tried again by whoever comes next.
    """
    with sigterm_as_ctrl_c():
        while trial := begin(study, work, ends_at):
            state, values, failure = TrialState.COMPLETE, None, ""
            try:
                with alive(study, trial):
                    values = work.run(study, trial)
            except optuna.TrialPruned:
                state = TrialState.PRUNED
            except TrialFailed as error:
                state, failure = TrialState.FAIL, str(error)
            except UpdateFinishedTrialError:
                continue  # this process stood still for so long that the trial was given up: another one, then
            except KeyboardInterrupt:
                fail(study, trial)
                raise Stopped(f"Stopped in trial {trial.number}; the same command goes on from here.") from None
            except Exception as error:
                if not isinstance(error, StorageError):  # which keeps nothing
                    fail(study, trial, f"{type(error).__name__}: {error}")
                raise
            if recorded := finish(study, trial, state, values, failure):
                work.clear(study, recorded)
                yield recorded


def begin(study: Study, work: Work, ends_at: float = float("inf")) -> optuna.Trial | None:
    """The next trial to run; None when the study has what work.n_trials says, or when the time is too short.

    Trials that run count too, so the total is exact: where they suffice, this waits until they are finished or one of
    them turns out to be lost.
    """
    pause = POLL
    while True:
        with locked(url_of(study)) as still_locked:
            trials = _care_for_the_lost(study, work.n_trials)
            states = [trial.state for trial in trials]
            n_running = states.count(TrialState.RUNNING)
            if work.n_trials is None:
                is_done, is_wanted = n_running == 0, TrialState.WAITING in states
            else:
                n_finished = sum(state in FINISHED for state in states)
                is_done, is_wanted = n_finished >= work.n_trials, n_finished + n_running < work.n_trials
            if is_wanted:
                too_long = _too_long(study, work, trials, ends_at - time.time())
                if too_long is None:
                    return None
                if trial := _take(study, still_locked, too_long):
                    return trial
                continue
            if is_done:
                return None
        if time.time() > ends_at:
            return None
        if pause == POLL and parent_process() is None:  # a worker process leaves it to its parent to say something
            print(f"waiting for trials that other workers run: {n_running}", flush=True)
        time.sleep(pause * random.uniform(0.5, 1))
        pause = min(1.5 * pause, 5 * POLL)


def _too_long(study: Study, work: Work, trials: list[FrozenTrial], seconds_left: float) -> set[int] | None:
    """Ids of the trials that wait and are not expected to end in time; None if no trial is."""
    if seconds_left == float("inf"):
        return set()
    waiting = [trial for trial in trials if trial.state == TrialState.WAITING]
    if not waiting:
        return None if work.seconds(study, None) > seconds_left else set()
    too_long = {trial._trial_id for trial in waiting if work.seconds(study, trial) > seconds_left}
    return None if len(too_long) == len(waiting) else too_long


def _take(study: Study, still_locked: Callable[[], bool], too_long: set[int]) -> optuna.Trial | None:
    """A trial to run, signed by this process; None if the lock was lost meanwhile. Only under the lock."""
    trial = ask(study, too_long)
    if not still_locked():  # others may have begun enough; it is not signed, so the next look gives it up
        return None
    try:
        study._storage.record_heartbeat(trial._trial_id)  # type: ignore[attr-defined]
        trial.set_user_attr("worker", _this_worker())
    except UpdateFinishedTrialError:  # by another, because the lock was lost just now
        return None
    return trial


def ask(study: Study, too_long: Collection[int] = ()) -> optuna.Trial:
    """A trial that waits (a lost one, or one that was queued), else a new one.  Only under the lock.

    too_long: ids of trials that are left to wait.
    It is marked before it runs, so that a trial that runs without marks is another program's. study.ask is not used:
    where the database did not acknowledge that a trial runs, it would leave that trial as it is and begin another one.
    """
    storage = study._storage
    for trial in storage.get_all_trials(study._study_id, deepcopy=False, states=(TrialState.WAITING,)):
        if trial._trial_id in too_long:
            continue
        if reason := study.outside(trial.params | trial.system_attrs.get("fixed_params", {})):
            fail(study, trial, reason)
            continue
        for name, value in study.marks.items():
            storage.set_trial_user_attr(trial._trial_id, name, trial.user_attrs.get(name, value))
        number = trial._trial_id
        break
    else:
        new = optuna.create_trial(state=TrialState.WAITING, user_attrs=study.marks)
        number = storage.create_new_trial(study._study_id, template_trial=new)
    storage.set_trial_state_values(number, TrialState.RUNNING)
    return optuna.Trial(study, number)


def _care_for_the_lost(study: Study, n_trials: int | None) -> list[FrozenTrial]:
    """Fail trials whose worker is gone, and queue as many lost ones again as n_trials needs; returns all trials.

    Only under the lock: no worker is then between asking for a trial and signing it. A trial is failed first and queued
    after, so that nothing is lost or done twice by whoever dies in between.
    """
    silent = study._storage._get_stale_trial_ids(study._study_id)  # type: ignore[attr-defined]
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        worker = trial.user_attrs.get("worker")
        if worker is None or trial._trial_id in silent or _is_gone(worker):
            fail(study, trial)
    trials = study.get_trials(deepcopy=False)
    active = (*FINISHED, TrialState.RUNNING, TrialState.WAITING)
    wanted = float("inf") if n_trials is None else n_trials - sum(trial.state in active for trial in trials)
    tries: dict[int, list[FrozenTrial]] = {}
    for trial in trials:
        tries.setdefault(first_try(trial), []).append(trial)
    for first, several in tries.items():
        last = several[-1]
        if wanted > 0 and last.user_attrs.get("failure") == LOST and len(several) < MOST_TRIES:
            same = {name: last.user_attrs[name] for name in (*study.marks, *QUEUED) if name in last.user_attrs}
            attributes = study.marks | same | {"retry_of": first}
            study.add_trial(
                optuna.create_trial(
                    state=TrialState.WAITING,
                    params=last.params,
                    distributions=last.distributions,
                    user_attrs=attributes,
                )
            )
            wanted -= 1
    return study.get_trials(deepcopy=False)


def is_retried(trial: FrozenTrial, trials: list[FrozenTrial]) -> bool:
    """Whether a trial was lost, and is tried again as soon as a worker looks. trials: all of the study."""
    tries = [other.number for other in trials if first_try(other) == first_try(trial)]
    return trial.user_attrs.get("failure") == LOST and trial.number == tries[-1] and len(tries) < MOST_TRIES


def first_try(trial: optuna.Trial | FrozenTrial) -> int:
    """The number of the trial that this one tries again, or its own: a try has the seeds of the first."""
    return trial.user_attrs.get("retry_of", trial.number)


def fail(study: optuna.Study, trial: optuna.Trial | FrozenTrial, reason: str = LOST) -> None:
    """Fail a trial and record the reason; one that was LOST is tried again with the same hyperparameters."""
    with suppress(UpdateFinishedTrialError):  # by another, just now
        study._storage.set_trial_user_attr(trial._trial_id, "failure", reason)
        study._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)


def finish(
    study: optuna.Study,
    trial: optuna.Trial,
    state: TrialState,
    values: float | Sequence[float] | None = None,
    failure: str = "",
) -> FrozenTrial | None:
    """Put the outcome of a trial into the database.  Returns the trial there, or None if it had been given up."""
    with suppress(UpdateFinishedTrialError):  # by another; or by the first attempt, whose acknowledgement was lost
        if failure:
            trial.set_user_attr("failure", failure)
        study.tell(trial, values, state, skip_if_finished=True)
    recorded = study._storage.get_trial(trial._trial_id)
    return recorded if recorded.state == state else None


@contextmanager
def alive(study: optuna.Study, trial: optuna.Trial) -> Iterator[None]:
    """Tell the database every HEARTBEAT seconds that this process works on the trial."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(HEARTBEAT):
            try:
                study._storage.record_heartbeat(trial._trial_id)  # type: ignore[attr-defined]
            except StorageError:
                return  # the trial's next message to the database says so where it is heard

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _this_worker() -> dict[str, Any]:
    """This process, told from all others on this and other machines: {"machine", "pid", "started"}; {} beyond Linux."""
    try:
        machine = Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return {}
    machine = hashlib.sha256(machine.encode()).hexdigest()[:12]  # a host's name would be published with the database
    return {"machine": machine, "pid": os.getpid(), "started": _started(os.getpid())}


def _started(pid: int) -> int | None:
    """When a process of this machine was started, in clock ticks since boot; None if there is none, or a dead one.

    psutil gives seconds since 1970, which change for all processes when the clock is set.
    """
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else int(fields[18])


def _is_gone(worker: dict[str, Any]) -> bool:
    """Whether a worker of this machine has ended, or is this process, which has no trial when it asks for one."""
    this = _this_worker()
    if not this or worker.get("machine") != this["machine"]:
        return False
    return worker == this or _started(worker["pid"]) != worker["started"]


@contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """A scheduler's request to end is KeyboardInterrupt, so that what runs is handed on; then it ends the process."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread hears signals
        return
    received: list[int] = []

    def interrupt(number: int, frame: object) -> None:
        received.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        if received:
            signal.raise_signal(signal.SIGTERM)
