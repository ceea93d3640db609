"""Optuna's dashboard shows a study while it runs."""

import contextlib
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import psutil
import pytest
from crew import until

from ctbprn_lib import search, storage, tasks, train


@pytest.fixture
def running(reports):
    """The URL of a study to which a thread adds trials."""
    task = tasks.RoutingTask()
    space = search.default_space(task)
    study = search.open_study("watched", task=task, space=space, budget=train.Budget(100, 2), sampler="random")
    ended = threading.Event()

    def work():
        while not ended.wait(0.2):
            trial = study.ask()
            search.suggest(trial, space)
            study.tell(trial, 0.5 + trial.number / 1000)

    thread = threading.Thread(target=work)
    thread.start()
    yield storage.storage_url("watched")
    ended.set()
    thread.join()


@pytest.fixture
def dashboard(running):
    """The address of a dashboard of it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = Path(sys.executable).parent / "optuna-dashboard"
    command = (program, "--quiet", "--port", str(port), running)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api/studies", timeout=5),
            ):
                break
            time.sleep(0.1)
        heard = {c.laddr.ip for c in psutil.Process(process.pid).net_connections() if c.status == psutil.CONN_LISTEN}
        assert heard == {"127.0.0.1"}
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium (Debian package), which .ci/run installs")
def test_the_dashboard_shows_the_study_and_the_trials_that_come(dashboard, tmp_path):
    def page(path):
        return subprocess.run(
            ("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
             "--disable-background-networking", "--disable-component-update", f"--user-data-dir={tmp_path / 'profile'}",
             "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--virtual-time-budget=15000", "--dump-dom",
             f"{dashboard}/dashboard/{path}"),
            capture_output=True, text=True, check=True, timeout=120,
        ).stdout  # fmt: skip

    def shown():
        return int(re.search(r">(\d+) Trials<", page("studies/1/trials"))[1])

    assert "watched" in page("")
    before = until(shown, 120)
    until(lambda: shown() > before, 120)  # the dashboard keeps what it has read for a while
