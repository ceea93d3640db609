"""One machine and SQLite: killed, interrupted, out of disk or memory, damaged; what is finished stays."""

import contextlib
import fcntl
import os
import random
import resource
import runpy
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import nbformat
import numpy as np
import optuna
import psutil
import pytest
import sqlalchemy
from crew import FORKS, check_exact, question, trials_at, until, work_for
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from papermill.exceptions import PapermillExecutionError

from ctbprn_lib import InputError, report, search, storage, tasks, workers
from ctbprn_lib.report import publish

SMALL = {"n_steps": 4, "n_replicas": 2, "study_name": "s", "pruner": "none"}
N_KILLS = int(os.environ.get("CTBPRN_TEST_KILLS", "6"))  # more by hand: one takes seconds
DATABASE = "reports/s/optuna_studies/ctbprn_study.db"
# papermill as a terminal starts it: Ctrl-C may be off where tests run in the background
PAPERMILL = """
import signal
from papermill.cli import papermill

signal.signal(signal.SIGINT, signal.default_int_handler)
papermill()
"""


STAND_IN = """
import time
import matplotlib.pyplot as plt
from ctbprn_lib.report import publish
folder = publish.staging(study_name)
publish.show(plt.figure(), folder / "optuna_plots" / "empty.png", "an empty picture")
(folder / "optuna_results_detailed.csv").write_text("trial\\n0\\n")
time.sleep(1)
"""


@pytest.fixture(scope="module")
def project(project):
    """The project with an analyze.ipynb that reads no study: what is tested here is when there is a report."""
    path = project / "notebooks" / "analyze.ipynb"
    notebook = nbformat.read(path, as_version=4)
    cells = [nbformat.v4.new_code_cell(code) for code in ("study_name: str = ''\nstorage: str = ''", STAND_IN)]
    cells[0].metadata["tags"] = ["parameters"]
    notebook.cells = [nbformat.v4.new_markdown_cell("# A report"), *cells]
    nbformat.write(notebook, path)
    return project


@contextlib.contextmanager
def started(project, *words):
    """A Python process in the project, killed with its kernel when the block ends; what it says is in said.txt."""
    env = os.environ | {"PYTHONPATH": str(project), "OMP_NUM_THREADS": "1", "CTBPRN_STORAGE": ""}
    with (project / "said.txt").open("w") as said:
        process = subprocess.Popen((sys.executable, *map(str, words)), cwd=project, env=env, stdout=said,
                                   stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
    try:
        yield process
    finally:
        kill_tree(process)
        process.wait()


def kill_tree(process):
    """kill -9 of a process and of all that it has started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        tree = psutil.Process(process.pid)
        for one in [*tree.children(recursive=True), tree]:
            one.kill()


def tune(project, n_trials):
    """papermill on tune.ipynb as a started process."""
    (project / "small.yaml").write_text("d: [8]\nbatch_size: [4]\nseq_len: [8, 16]\n")
    given = [*SMALL.items(), ("n_trials", n_trials), ("space", "small.yaml")]
    pairs = [word for pair in given for word in ("-p", *pair)]
    return started(project, "-c", PAPERMILL, "--log-output", "--no-progress-bar", "notebooks/tune.ipynb",
                   "runs/tune.ipynb", *pairs)  # fmt: skip


def study_of(task=None):
    """A study in REPORTS and what it asks."""
    asked = question(n_steps=4)
    if task:
        asked["task"] = task
    return search.open_study("s", pruner="none", **asked), asked


def n_finished(url, study="s"):
    return sum(t.state in workers.FINISHED for t in trials_at(url, study))


def test_kills_at_random_moments_lose_no_finished_trial_and_the_total_is_exact(crew, tmp_path):
    url, n_trials, rng = f"sqlite:///{tmp_path / 'study.db'}", 12, random.Random(0)
    finished = {}
    for n in range(N_KILLS):
        pid = crew.hire(url, n_trials, n_steps=10, MOST_TRIES=30)
        if n % 3 == 2:  # on a slow machine too something shall have been finished
            until(lambda: n_finished(url) > min(len(finished), n_trials - 1))  # noqa: B023
        time.sleep(rng.uniform(0.02, 0.5))
        if n % 3 == 1:  # and something shall have been lost
            until(lambda: any(trial.state == TrialState.RUNNING for trial in trials_at(url)))
        crew.kill(pid)
        trials = trials_at(url)
        assert all(trials[number] == trial for number, trial in finished.items())
        finished = {t.number: t for t in trials if t.state in workers.FINISHED}
    assert crew.wait(crew.hire(url, n_trials, n_steps=10, MOST_TRIES=30)) == [0], crew.new_output()
    trials = trials_at(url)
    check_exact(trials, n_trials)
    assert all(trials[number] == trial for number, trial in finished.items())
    lost = [t for t in trials if t.state == TrialState.FAIL]
    print(f"{N_KILLS} kills: {len(finished)} trials finished by then, all there; {len(lost)} lost and tried again; "
          f"{n_trials} finished in the end")  # fmt: skip
    assert len(finished) >= 3 and lost


def test_papermill_killed_with_its_kernel_and_run_again_ends_in_a_report_of_all_trials(project, run_here):
    url = f"sqlite:///{project / DATABASE}"
    with tune(project, 300) as process:
        until(lambda: n_finished(url) > 1)
        kill_tree(process)
    finished = {t.number: t for t in trials_at(url) if t.state in workers.FINISHED}
    assert not (project / "reports" / "s" / "report.md").exists()
    n_trials = len(finished) + 2
    run_here(project, "tune", **SMALL, n_trials=n_trials, space="small.yaml")
    trials = trials_at(url)
    check_exact(trials, n_trials)
    assert all(trials[number] == trial for number, trial in finished.items())
    assert f"{n_trials} complete" in report.render(report.load("s"), "summary")


def test_confirm_whose_kernel_is_killed_loses_no_run_and_goes_on(project, run_here):
    rng, y = np.random.default_rng(0), np.repeat(["a", "b"], 30)
    np.savez(project / "small.npz", x=rng.normal(size=(60, 2, 4, 3)), y=y)
    (project / "tiny.yaml").write_text("d: [4]\nrank: [2]\nbatch_size: [4]\n")
    given = SMALL | {"study_name": "k", "task": "small.npz"}
    run_here(project, "tune", **given, n_trials=2, space="tiny.yaml", n_workers=1)
    url = f"sqlite:///{project / DATABASE.replace('/s/', '/k/')}"
    how = {
        "study_name": "k",
        "task": "small.npz",
        "looks": "2",
        "n_levels": 2,
        "with_published": "False",
        "n_workers": 2,
    }
    words = [word for name, value in how.items() for word in ("-r" if name == "looks" else "-p", name, value)]
    with started(project, "-c", PAPERMILL, "notebooks/confirm.ipynb", "runs/confirm.ipynb", *words) as process:
        until(lambda: n_finished(url, "k/confirm") > 0)
        children = psutil.Process(process.pid).children(recursive=True)
        kernel = next(child for child in children if "ipykernel_launcher" in " ".join(child.cmdline()))
        started_by_it = kernel.children(recursive=True)
        kernel.kill()
        assert process.wait(60) != 0
        assert not psutil.wait_procs(started_by_it, 60)[1], "its workers live on"
    before = {t.user_attrs["key"]: t for t in trials_at(url, "k/confirm") if t.state == TrialState.COMPLETE}
    how["with_published"] = False
    run_here(project, "confirm", **how)
    trials = trials_at(url, "k/confirm")
    done = [t.user_attrs["key"] for t in trials if t.state == TrialState.COMPLETE]
    assert len(done) == len(set(done)) > len(before)
    assert all(trials[trial.number] == trial for trial in before.values())
    assert not {TrialState.RUNNING, TrialState.WAITING} & {trial.state for trial in trials}


def published(project):
    """{path: content} of the published report."""
    folder = project / "reports" / "s"
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".db", ".lock"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_only_a_whole_report_replaces_the_published_one(project, monkeypatch):
    monkeypatch.setattr(storage, "REPORTS", project / "reports")
    shutil.rmtree(project / "reports", ignore_errors=True)
    (project / "reports" / "s").mkdir(parents=True)
    (project / "reports" / "s" / "report.md").write_text("an earlier report")
    before = published(project)
    staged = project / "reports" / ".s.new"
    process = FORKS.Process(target=project.publish, args=("s",))
    process.start()
    until(lambda: any(staged.rglob("*.png")))
    kill_tree(process)
    process.join()
    assert published(project) == before

    notebook = project / "notebooks" / "analyze.ipynb"
    whole = notebook.read_text()
    broken = nbformat.read(notebook, as_version=4)
    broken.cells[-1].source = "1 / 0"
    nbformat.write(broken, notebook)
    with pytest.raises(PapermillExecutionError, match="ZeroDivisionError"):
        project.publish("s")
    monkeypatch.setattr(sys, "argv", ["publish", str(project / "runs" / "analyze-s.ipynb"), "s"])
    with pytest.raises(SystemExit, match="has not been run to its end"):
        runpy.run_path(publish.__file__, run_name="__main__")
    assert published(project) == before

    notebook.write_text(whole)
    shutil.rmtree(staged)
    other = FORKS.Process(target=project.publish, args=("s",))  # workers that end together
    other.start()
    until(lambda: any(staged.rglob("*.png")))
    begun = time.time()
    project.publish("s")
    other.join()
    assert other.exitcode == 0
    after = published(project)
    assert after.keys() == {"report.md", "report.html", "optuna_results_detailed.csv", "optuna_plots/empty.png"}
    assert "# A report" in (project / "reports" / "s" / "report.md").read_text()
    assert all((project / "reports" / "s" / path).stat().st_mtime > begun for path in after)
    assert not staged.exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 1), (signal.SIGTERM, -signal.SIGTERM)])
def test_an_interrupted_worker_ends_at_once_and_hands_its_trial_on(crew, tmp_path, number, code):
    url = f"sqlite:///{tmp_path / 'study.db'}"
    pid = crew.hire(url, 3, n_steps=2000)
    until(lambda: [t for t in trials_at(url) if len(t.params) == 7])
    started = time.monotonic()
    assert crew.kill(pid, number) == code
    assert time.monotonic() - started < 5  # an evaluation would come seconds later
    (trial,) = trials_at(url)
    assert trial.state == TrialState.FAIL and trial.user_attrs["failure"] == workers.LOST
    crew.new_output()


def test_ctrl_c_on_papermill_ends_it_and_the_same_study_goes_on(project, run_here):
    shutil.rmtree(project / "reports", ignore_errors=True)
    with tune(project, 300) as process:
        until(lambda: "2 of 300" in (project / "said.txt").read_text())
        os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it: the kernel is in a group of its own
        assert process.wait(20) == 1
    assert "Aborted!" in (project / "said.txt").read_text()
    trials = trials_at(f"sqlite:///{project / DATABASE}")
    n_trials = sum(t.state in workers.FINISHED for t in trials) + 1
    assert n_trials > 2 and len(trials) <= n_trials
    run_here(project, "tune", **SMALL, n_trials=n_trials, space="small.yaml")
    check_exact(trials_at(f"sqlite:///{project / DATABASE}"), n_trials)


def test_a_reader_waits_until_the_tables_are_made_and_makes_none_of_them(tmp_path):
    url, read = f"sqlite:///{tmp_path / 'study.db'}", []
    with storage.locked(url):  # as a worker that makes them has it
        reader = threading.Thread(target=lambda: read.append(storage.connect(url, reading=True)))
        reader.start()
        time.sleep(0.5)
        assert reader.is_alive() and not (tmp_path / "study.db").exists()
    reader.join(20)
    assert read[0].get_all_studies() == []


def test_a_trial_that_was_lost_before_it_was_signed_is_tried_again_too(reports):
    study, asked = study_of()
    search.suggest(workers.ask(study), asked["space"])  # and the worker dies
    search.run_trials(study, 1, **asked)
    check_exact(study.trials, 1)
    assert [trial.user_attrs.get("retry_of") for trial in study.trials] == [None, 0]


def test_a_beginning_that_the_database_did_not_acknowledge_begins_one_trial(reports, monkeypatch):
    study, asked = study_of()
    real, heard = RDBStorage.set_trial_state_values, []

    def lose_the_first_answer(self, trial_id, state, values=None):
        answer = real(self, trial_id, state, values)
        heard.append(state)
        if len(heard) == 1:
            raise sqlalchemy.exc.OperationalError("commit", {}, sqlite3.OperationalError("database is locked"))
        return answer

    monkeypatch.setattr(RDBStorage, "set_trial_state_values", lose_the_first_answer)
    search.run_trials(study, 1, **asked)
    assert len(heard) == 3  # begun, begun once more, and finished
    everything = optuna.load_study(study_name="s", storage=study._storage).trials
    assert [trial.state for trial in everything] == [TrialState.COMPLETE]


def test_a_trial_of_another_machine_is_lost_only_when_its_signs_of_life_have_stopped(reports, monkeypatch):
    monkeypatch.setattr(storage, "GRACE", 1)
    monkeypatch.setattr(workers, "POLL", 0.1)
    study, asked = study_of()
    trial = workers.ask(study)
    trial.set_user_attr("worker", {"machine": "another", "pid": 1, "started": 1})
    study._storage.record_heartbeat(trial._trial_id)
    started = time.monotonic()
    search.run_trials(study, 1, **asked)
    assert time.monotonic() - started > 1
    assert [t.state for t in study.trials] == [TrialState.FAIL, TrialState.COMPLETE]


def test_a_trial_that_ends_all_its_workers_is_given_up(reports, monkeypatch):
    monkeypatch.setattr(workers, "MOST_TRIES", 3)
    study, asked = study_of()
    for _ in range(3):
        workers.begin(study, work_for(1))  # whoever begins the next has ended this one
    search.run_trials(study, 1, **asked)
    assert [workers.first_try(t) for t in study.trials] == [0, 0, 0, 3]
    assert [t.state for t in study.trials] == [TrialState.FAIL] * 3 + [TrialState.COMPLETE]


@pytest.mark.slow
def test_a_full_disk_is_named_and_the_study_goes_on_when_there_is_room(reports):
    full = True

    def limit(connection, _):
        if full:
            connection.execute("PRAGMA max_page_count = 34")

    sqlalchemy.event.listen(sqlalchemy.Engine, "connect", limit)
    try:
        with pytest.raises(InputError, match=r"ctbprn_study\.db cannot be used: database or disk is full"):
            study, asked = study_of()
            search.run_trials(study, 100, **asked)
        full = False
        n_finished = len(search.load_study("s").get_trials(states=workers.FINISHED))
        study, asked = study_of()
        search.run_trials(study, n_finished + 2, **asked)
        check_exact(study.trials, n_finished + 2)
    finally:
        sqlalchemy.event.remove(sqlalchemy.Engine, "connect", limit)


def test_a_database_that_is_locked_is_waited_for_and_then_named(reports, monkeypatch):
    study, asked = study_of()
    other = sqlite3.connect(reports / "s" / "optuna_studies" / "ctbprn_study.db", isolation_level=None)
    monkeypatch.setattr(storage, "PATIENCE", 0.5)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(InputError, match=r"ctbprn_study\.db cannot be used for \d+ seconds: database is locked"):
        search.run_trials(study, 1, **asked)
    other.execute("COMMIT")
    other.close()
    with open(reports / "s" / "optuna_studies" / "ctbprn_study.db.lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(InputError, match=r"ctbprn_study\.db\.lock has been locked by another process for"):
            search.run_trials(study, 1, **asked)
    search.run_trials(study, 1, **asked)
    check_exact(study.trials, 1)


@contextlib.contextmanager
def as_nobody(folder):
    """folder and what is in it cannot be written to, as root can write anywhere."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    if os.geteuid() == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(os.getuid())
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)


def test_a_folder_that_cannot_be_written_is_named_and_can_still_be_read_from(monkeypatch):
    root = Path(tempfile.mkdtemp())  # not tmp_path, which none but its owner may enter
    root.chmod(0o755)
    monkeypatch.setattr(storage, "REPORTS", root)
    monkeypatch.delenv("CTBPRN_STORAGE", raising=False)
    with as_nobody(root), pytest.raises(InputError, match=rf"{root}/s/.+ cannot be written: Permission denied"):
        study_of()
    study, asked = study_of()
    search.run_trials(study, 1, **asked)
    with as_nobody(root):
        assert len(search.records(search.load_study("s"))) == 1
        with pytest.raises(InputError, match=rf"{root}/s/.+ cannot be written: Permission denied"):
            study_of()
    shutil.rmtree(root)


def test_a_read_only_checkout_is_named_before_any_training(run_here, project):
    root = Path(tempfile.mkdtemp())
    shutil.copytree(project / "notebooks", root / "notebooks")
    (root / "reports").mkdir()
    root.chmod(0o755)
    database = project / "elsewhere.db"
    message = r"runs: nothing can be written or locked there .*copy the project to a folder of your own"
    with as_nobody(root), pytest.raises(InputError, match=message):
        run_here(root, "tune", n_trials=1, n_steps=2, storage=f"sqlite:///{database}")
    assert not database.exists()
    shutil.rmtree(root)


@pytest.mark.slow
def test_a_damaged_database_is_named(reports):
    study, asked = study_of()
    search.run_trials(study, 4, **asked)
    storage.disconnect(study._storage)
    path = reports / "s" / "optuna_studies" / "ctbprn_study.db"
    whole, rng, refused = path.read_bytes(), random.Random(0), 0
    for damage in range(60):
        content = bytearray(whole)
        at = rng.randrange(len(content))
        if damage % 3 == 0:
            del content[at:]
        elif damage % 3 == 1:
            content[at : at + 512] = rng.randbytes(len(content[at : at + 512]))
        else:
            for at in rng.choices(range(len(content)), k=50):
                content[at] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        try:
            search.records(search.load_study("s"))
        except InputError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 20
    print(f"60 damaged databases: {refused} refused by name, the others read (the damage was in unused space or text)")
    path.write_text("not a database")
    with pytest.raises(InputError, match=r"ctbprn_study\.db cannot be used: file is not a database"):
        study_of()


class Poisoned(tasks.RoutingTask):
    """A task whose training batches are not numbers for the first of several replicas."""

    def draw(self, n_replicas, *words):
        batch = super().draw(n_replicas, *words)
        if n_replicas > 1:  # not the validation set
            batch.x[0] = float("nan")
        return batch


def test_one_replica_that_diverges_counts_as_chance_and_harms_no_other(reports):
    study, asked = study_of(task=Poisoned(n_areas=2, n_features=8, n_tokens=8))
    search.run_trials(study, 2, **asked)
    for trial in study.trials:
        first, second = trial.user_attrs["curves"]["val_ce"][-1]
        assert trial.state == TrialState.COMPLETE and trial.user_attrs["n_diverged"] == 1
        assert first is None and trial.value == pytest.approx((np.log(2) + second) / 2, abs=1e-5)


def test_a_study_whose_every_trial_diverges_stops_and_says_why(project, run_here):
    shutil.rmtree(project / "reports", ignore_errors=True)
    (project / "wild.yaml").write_text("lr: [1.0e+9]\nd: [8]\nbatch_size: [4]\nseq_len: [8]\n")
    with pytest.raises(InputError, match="the last 3 trials gave no score; the last one: all 2 replicas diverged"):
        run_here(project, "tune", **SMALL, n_trials=2, space="wild.yaml")
    assert not (project / "reports" / ".s.new").exists()


@pytest.fixture
def limited():
    """This process may use 4 GiB; where memory is promised without end, the batch below could else fit."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (4 * 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_DATA, before)


def test_shapes_that_do_not_fit_into_memory_fail_with_the_shape_and_the_study_goes_on(project, run_here, limited):
    shutil.rmtree(project / "reports", ignore_errors=True)
    (project / "large.yaml").write_text("d: [8]\nbatch_size: [4, 4194304]\nseq_len: [8]\n")
    run_here(project, "tune", **SMALL, n_trials=4, space="large.yaml")
    trials = search.records(search.load_study("s"))
    failed = trials[trials["state"] == "fail"]
    assert (trials["state"] == "complete").sum() == 4 and len(failed) >= 1
    assert failed["failure"].str.contains(r"out of memory at .*batch_size=4194304").all()
    assert failed[["val_ce", "val_accuracy"]].isna().all(axis=None)
    assert "failed: out of memory at" in report.render(report.load("s"), "all_trials")
