"""make report: the notebooks one after another, at a size that this machine can do in a few minutes.

    python -m ctbprn_lib.report.make --help

The sizes follow from the measured speed of the machine: a slower one gets shorter trainings and fewer seeds, not a
longer wait.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ctbprn_lib import InputError, processes, report, storage, tasks, workers
from ctbprn_lib.device import device_name, resolve_device
from ctbprn_lib.report import publish, text
from ctbprn_lib.train import Budget, Hyperparameters, fit

Parameters = dict[str, Any]
ROOT = Path(__file__).resolve().parents[2]
MINUTES = 4.6  # that the quick report is sized for
AT_MOST = 10.5  # on a machine too slow for that: confirm begins nothing that is expected to end later
NOTEBOOK_SECONDS = 20  # of all cores, to start a notebook, and to draw and write what it has found
STEPS = (200, 600)  # of a quick report's trainings: fewer would decide nothing, and more are not needed
MARGIN = 1.25  # of the expected time: cores share their memory, and what confirm trains depends on what tune finds
N_SEEDS = 6  # of each configuration of the quick report
# Trainings of one configuration of quick.yaml with N_SEEDS seeds and n_steps steps that the quick report takes, about:
# the search (fewer replicas, and pruned), and what confirm compares.
SEARCHED, CONFIRMED = 2, 14

QUICK: dict[str, Parameters] = {
    "tune": {"n_trials": 7, "n_replicas": 2, "space": "notebooks/quick.yaml"},
    "confirm": {
        "looks": str(N_SEEDS),
        "n_test": 4096,
        "n_top": 1,
        "n_levels": 2,
        "with_published": False,
        "base_from": "search",
    },
    "reproduce": {
        "n_seeds": 20,
        "n_fresh_seeds": 3,
        "n_samples": 1024,
        "n_spread_seeds": 4,
        "max_steps": 20,
        "n_curve_seeds": 2,
    },
    "explore": {"n_steps": 100, "d": 16, "n_replicas": 2},
}
FULL: dict[str, Parameters] = {
    "tune": {"n_trials": 100, "n_replicas": 8, "n_steps": 2000},
    "confirm": {},
    "reproduce": {"n_fresh_seeds": 200, "n_spread_seeds": 32, "max_steps": 2000, "n_curve_seeds": 8},
    "explore": {"n_steps": 2000},
}
FRONT: dict[str, Parameters] = {  # of the full report, after all else
    "tune": {"objective": "ce_cost", "pruner": "equal_cost", "most_cost": 1e14, "n_trials": 200, "n_replicas": 4},
    "frontier": {"looks": "8,16", "timed_minutes": 60.0},
}
QUESTIONS = {
    "frontier": "which settings are best for every budget of compute",
    "tune": "which hyperparameters are best",
    "confirm": "whether they stay best with fresh seeds, and what each one does",
    "explore": "what there is to learn, and whether the network learns it",
    "reproduce": "whether this is the published system, and what its numbers are worth",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the notebooks that the command line asks for, and say what came of them."""
    options = _options(arguments)
    started = time.monotonic()
    seconds = seconds_a_step()
    sizes = plan(options.size, options.minutes, seconds)
    for name in ("n_trials", "n_replicas", "n_steps"):
        if getattr(options, name):
            sizes["tune"][name] = getattr(options, name)
    study = options.study or {"quick": "quick", "full": "flagship"}[options.size]
    reproduced = "reproduce" if study == "ctbprn" else f"{study}-reproduce"
    sizes["tune"]["study_name"] = sizes["confirm"]["study_name"] = study
    # A quick study decides few of the original's claims, so its page has the verdicts of the published study.
    sizes["reproduce"] |= {"study_name": reproduced, "tested_by": "ctbprn" if options.size == "quick" else study}
    print(
        f"{device_name(resolve_device('auto'))}: a training step of the smallest network takes {1000 * seconds:.1f} ms."
    )
    for name, parameters in sizes.items():
        print(f"  {name:<10} {QUESTIONS[name]}: {', '.join(f'{k} {v}' for k, v in parameters.items())}")
    if options.size == "quick":
        print(f"All of it takes about {_duration(expected_seconds(sizes, seconds, options.minutes))}.")
    (ROOT / "runs").mkdir(exist_ok=True)
    chains = (["tune", "confirm"], ["explore", "reproduce"])
    if sizes["reproduce"]["tested_by"] == study:  # whose verdicts are there when confirm has ended
        chains = (["tune", "confirm", "reproduce"], ["explore"])
    with workers.sigterm_as_ctrl_c():
        _run([{name: sizes[name] for name in names} for names in chains])
        if options.size == "full":
            front = f"{study}-frontier"
            print(f"  {'frontier':<10} {QUESTIONS['frontier']}")
            _run([{name: parameters | {"study_name": front} for name, parameters in FRONT.items()}])
            publish.publish_notebook(ROOT / "runs" / "frontier.ipynb", front)
    publish.publish_notebook(ROOT / "runs" / "reproduce.ipynb", reproduced)
    print(f"\nDone in {_duration(time.monotonic() - started)}.")
    print(f"  the report:          reports/{study}/report.html")
    print(f"  about the original:  reports/{reproduced}/report.html\n")
    print(text.plain(report.render(report.load(study), "verdict")))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make report",
        description="Run the notebooks one after another and write the reports.",
        epilog="With make: make report SIZE=full MINUTES=30 STUDY=name TRIALS=40 REPLICAS=4 STEPS=500",
    )
    parser.add_argument("--size", choices=("quick", "full"), default="quick", help="full is for a GPU")
    parser.add_argument("--minutes", type=float, default=0, help="shared among the notebooks; 0: as the size needs")
    parser.add_argument("--study", default="", help="folder under reports/")
    parser.add_argument("--n-trials", type=int, default=0, help="of the search")
    parser.add_argument("--n-replicas", type=int, default=0, help="seeds a trial")
    parser.add_argument("--n-steps", type=int, default=0, help="training steps a trial")
    options = parser.parse_args(arguments)
    if not 0 <= options.minutes < float("inf"):
        parser.error(f"--minutes must be a number of at least 0, got {options.minutes}")
    if options.study:
        try:
            storage.study_folder(options.study)
        except InputError as error:
            parser.error(str(error))
    return options


def seconds_a_step(n_steps: int = 15) -> float:
    """Measure the seconds of one training step of one replica of a configuration of quick.yaml, on one thread."""
    task, hp, n_replicas = tasks.RoutingTask(), Hyperparameters(d=16, rank=16, n_layers=1), 2
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for n in (3, n_steps):  # first a warm-up
            milliseconds = fit(hp, task, Budget(n, n_replicas, n_evals=1, n_validation=32)).step_time_ms
    finally:
        torch.set_num_threads(n_threads)
    return milliseconds / n_replicas / 1000


def plan(size: str, minutes: float, seconds: float) -> dict[str, Parameters]:
    """{notebook: its parameters}.

    size: "quick" or "full". minutes: for all notebooks together; 0 for as many as the size needs. seconds: of one
    step, as seconds_a_step measures them.
    """
    sizes = {name: dict(parameters) for name, parameters in (QUICK if size == "quick" else FULL).items()}
    minutes_of_notebooks = NOTEBOOK_SECONDS * len(sizes) / 60
    if size == "quick":
        for_training = (minutes or MINUTES) - minutes_of_notebooks
        fewest, most = STEPS
        n_steps = for_training / _training_minutes(SEARCHED + CONFIRMED, 1, seconds)
        n_steps = sizes["tune"]["n_steps"] = 50 * round(min(max(n_steps, fewest), most) / 50)
        searching = _training_minutes(SEARCHED, n_steps, seconds)
        sizes["confirm"]["minutes"] = round(max(0.1, AT_MOST - minutes_of_notebooks - searching), 2)
    if minutes:
        left = max(0.1, minutes - minutes_of_notebooks)
        sizes["tune"]["minutes"], sizes["confirm"]["minutes"] = round(0.35 * left, 2), round(0.6 * left, 2)
    return sizes


def expected_seconds(sizes: dict[str, Parameters], seconds: float, minutes: float = 0) -> float:
    """The time that a quick report takes, about; not more than the minutes, if they are limited."""
    training = _training_minutes(SEARCHED + CONFIRMED, sizes["tune"]["n_steps"], seconds)
    return 60 * min(training + NOTEBOOK_SECONDS * len(sizes) / 60, minutes or AT_MOST)


def _training_minutes(n_trainings: int, n_steps: float, seconds: float) -> float:
    """The minutes that so many trainings of a quick report take on all cores, about.  seconds: of one step."""
    return MARGIN * n_trainings * N_SEEDS * n_steps * seconds / processes.count("auto", 0) / 60


def _run(chains: Sequence[dict[str, Parameters]]) -> None:
    """Run the notebooks of each chain one after another, the chains side by side, and say when each begins and ends.

    Notebooks of all chains but the first get one thread. Ends this program with a notebook's last words if it fails.
    """
    waiting = [list(chain.items()) for chain in chains]
    running: dict[int, tuple[str, subprocess.Popen, Path, float]] = {}
    try:
        while running or any(waiting):
            for number, chain in enumerate(waiting):
                if chain and number not in running:
                    running[number] = _started(*chain.pop(0), one_thread=number > 0)
            time.sleep(0.2)
            for number, (name, process, log, begun) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[number]
                if process.returncode:
                    last = log.read_text().strip().splitlines()[-1]
                    sys.exit(f"{name} has failed: {last}\n(all of it: runs/{log.name})")
                print(
                    f"{time.strftime('%H:%M:%S')} {name} ends after {_duration(time.monotonic() - begun)}", flush=True
                )
    except KeyboardInterrupt:
        sys.exit("Stopped; what is done is kept, and the same command goes on from there.")
    finally:
        for _, process, _, _ in running.values():
            process.terminate()
            process.wait()


def _started(name: str, parameters: Parameters, one_thread: bool) -> tuple[str, subprocess.Popen, Path, float]:
    """Start papermill on a notebook.  Returns its name, the process, its log and the time of the start."""
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", "--log-output"]
    command += [f"notebooks/{name}.ipynb", f"runs/{name}.ipynb"]
    for key, value in parameters.items():
        command += ["-r" if isinstance(value, str) else "-p", key, str(value)]  # a text such as 8 stays one with -r
    log = ROOT / "runs" / f"{name}.log"
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if one_thread else {})
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=environment)
    print(f"{time.strftime('%H:%M:%S')} {name} begins; what it prints is in runs/{log.name}", flush=True)
    return name, process, log, time.monotonic()


def _duration(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 60} min {whole % 60} s" if whole >= 60 else f"{whole} s"


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(str(error))
