"""Worker processes of this machine: started, watched and ended by the process that a person has started.

The parent trains nothing. It tells what is finished, starts a worker again that was ended from outside, and answers
Ctrl-C. When the parent dies, however it dies, its workers end, and the trials that ran are tried again.
"""

import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import torch
from optuna.trial import FrozenTrial, TrialState

from ctbprn_lib import InputError, workers
from ctbprn_lib.device import resolve_device
from ctbprn_lib.workers import FINISHED, LOST, Study, Work

PROCESS_MIB = 500  # of a worker before it trains: Python, torch and Optuna
# A fork of a process with threads can hang. The fork server has none, and imports torch once for all workers.
METHOD = "forkserver"
# SIGTERM, a second apart, until a worker is killed: Python can lose one, as when it comes amid the end of an object.
MOST_REQUESTS = 20
MOST_DEATHS = 3  # of a worker in a row, without a trial finished in between
OnTrial = Callable[[Study, FrozenTrial, int], None]


def run(
    work: Work,
    study: Study,
    n_workers: int = 1,
    minutes: float = 0,
    on_trial: OnTrial | None = None,
    mib_each: float = 0,
) -> bool:
    """Work until the study has what work.n_trials says; returns whether it has, or False if time ended it.

    n_workers: 1 is this process alone; more are processes of their own; 0 is resolved by count.
    minutes: no trial is begun that is not expected to end within them; 0 is no limit.
    on_trial(study, trial, n_finished) is called for each trial that ends, in order, whichever worker ran it.
    mib_each: the memory that one worker needs to train, for count.
    Ctrl-C and SIGTERM raise workers.Stopped when the trials that ran have been handed on.
    """

    n_workers = n_workers or count(work.device, mib_each)
    ends_at = time.time() + 60 * minutes if minutes else float("inf")
    announce = _Announcer(study, on_trial)
    if n_workers == 1:
        for _ in workers.work(work, study, ends_at):
            announce()
    else:
        with workers.sigterm_as_ctrl_c():
            _Crew(work, n_workers, ends_at).watch(announce)
    announce()
    return is_done(study, work.n_trials)


def is_done(study: Study, n_trials: int | None) -> bool:
    """Whether a study has n_trials finished trials or, for None, none that waits or runs."""
    states = [trial.state for trial in study.get_trials(deepcopy=False)]
    if n_trials is None:
        return not {TrialState.WAITING, TrialState.RUNNING} & set(states)
    return sum(state in FINISHED for state in states) >= n_trials


def count(device: str, mib_each: float) -> int:
    """How many workers this machine takes: one a GPU, or one for each of torch's threads, as far as memory allows.

    mib_each: the memory that one worker needs to train, in MiB.
    """
    if resolve_device(device).type == "cuda":
        return 1 if ":" in device else torch.cuda.device_count()
    in_memory = int(0.9 * available_mib() / (PROCESS_MIB + mib_each))
    return max(1, min(torch.get_num_threads(), in_memory))


def available_mib() -> float:
    """Memory that processes can still get, in MiB: of the machine, and of the container that this runs in."""
    available = psutil.virtual_memory().available
    with suppress(OSError, ValueError):  # no such file, or "max"
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        available = min(available, limit - used)
    return available / 2**20


class _Announcer:
    """Calls on_trial once for each trial that has ended since the last call, in the order in which they ended."""

    def __init__(self, study: Study, on_trial: OnTrial | None) -> None:
        self.study, self.on_trial = study, on_trial
        ended = self._ended()
        self.known = {trial.number for trial in ended}
        self.n_finished = sum(trial.state in FINISHED for trial in ended)

    def __call__(self) -> int:
        """Returns how many trials were new."""
        new = [trial for trial in self._ended() if trial.number not in self.known]
        for trial in sorted(new, key=lambda trial: (trial.datetime_complete, trial.number)):
            self.known.add(trial.number)
            self.n_finished += trial.state in FINISHED
            if self.on_trial:
                self.on_trial(self.study, trial, self.n_finished)
        return len(new)

    def _ended(self) -> list[FrozenTrial]:
        trials = self.study.get_trials(deepcopy=False, states=(*FINISHED, TrialState.FAIL))
        return [trial for trial in trials if trial.user_attrs.get("failure") != LOST]


class _Crew:
    """Worker processes and the pipes through which they tell the parent why they ended."""

    def __init__(self, work: Work, n_workers: int, ends_at: float) -> None:
        self.work, self.ends_at = work, ends_at
        self.context: Any = multiprocessing.get_context(METHOD)
        multiprocessing.set_forkserver_preload(["ctbprn_lib.confirm"])
        self.devices = [work.device] * n_workers
        if resolve_device(work.device).type == "cuda":
            self.devices = [f"cuda:{i % torch.cuda.device_count()}" for i in range(n_workers)]
        self.processes: dict[BaseProcess, tuple[str, Connection]] = {}

    def watch(self, announce: Callable[[], int]) -> None:
        """Run the workers until all have ended. An error in one ends the others and is raised here."""
        n_deaths = 0
        try:
            for device in self.devices:
                self._start(device)
            while self.processes:
                wait([process.sentinel for process in self.processes], timeout=workers.POLL)
                if announce():
                    n_deaths = 0
                for process in [process for process in self.processes if not process.is_alive()]:
                    device, pipe = self.processes.pop(process)
                    with suppress(EOFError):  # it has sent no error
                        raise pipe.recv()
                    if process.exitcode:
                        n_deaths += 1
                        if n_deaths >= MOST_DEATHS * len(self.devices):
                            raise InputError(
                                f"workers were ended from outside {n_deaths} times in a row, as happens where memory "
                                "is short; what is finished is kept. Give a smaller n_workers, or fewer replicas"
                            )
                        self._start(device)
        except KeyboardInterrupt:
            self._end()
            raise workers.Stopped("Stopped; the same command goes on from here.") from None
        finally:
            self._end()

    def _start(self, device: str) -> None:
        receiver, sender = self.context.Pipe(duplex=False)
        process = self.context.Process(target=_work, args=(self.work, device, self.ends_at, sender), daemon=True)
        process.start()
        sender.close()
        self.processes[process] = device, receiver

    def _end(self) -> None:
        """Ask the workers to hand on what they run, and end those that do not answer."""
        for _ in range(MOST_REQUESTS):
            for process in self.processes:
                process.terminate()
            wait([process.sentinel for process in self.processes], timeout=1)
            self.processes = {process: end for process, end in self.processes.items() if process.is_alive()}
            if not self.processes:
                return
        for process in self.processes:
            process.kill()
        self.processes.clear()


def _work(work: Work, device: str, ends_at: float, errors: Connection) -> None:
    """What a worker process does from its start to its end."""
    torch.set_num_threads(1)
    follow_parent()
    work.device = device
    try:
        for _ in workers.work(work, work.open(), ends_at):
            pass
    except InputError as error:
        errors.send(error)
    except Exception:
        errors.send(RuntimeError(f"a worker ended in an error:\n{traceback.format_exc()}"))


def follow_parent() -> None:
    """Leave Ctrl-C to the parent of this process, which then ends it, and end with the parent however that one dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Wait until the parent has died, then end this process as a scheduler would."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    for _ in range(MOST_REQUESTS):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)
