"""What several tests share: one thread a process, and studies that live in a temporary folder."""

import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from crew import Crew

from ctbprn_lib import storage, tasks

torch.set_num_threads(1)


@pytest.fixture
def reports(tmp_path, monkeypatch):
    """An empty folder in the place of reports/, and no storage named by the environment."""
    folder = tmp_path / "reports"  # beside it runs/ is made
    folder.mkdir()
    monkeypatch.setattr(storage, "REPORTS", folder)
    monkeypatch.delenv("CTBPRN_STORAGE", raising=False)
    return folder


@pytest.fixture(scope="session")
def small_task():
    """A routing task that trains in milliseconds."""
    return tasks.RoutingTask(n_areas=2, n_features=8, n_tokens=8)


@pytest.fixture(scope="session")
def array_task():
    """90 samples of three classes that the means of two features, one in each area, tell apart."""
    rng = np.random.default_rng(0)
    y = np.repeat(["a", "b", "c"], 30)
    x = rng.normal(size=(90, 2, 6, 3)).astype(np.float32)
    x[y == "a", 0, :, 0] += 2
    x[y == "b", 1, :, 1] += 2
    return tasks.ArrayTask(x, y, source="three classes")


@pytest.fixture(scope="module")
def crew(tmp_path_factory):
    made = Crew(tmp_path_factory.mktemp("crew"))
    yield made
    made.end()


class Project(type(pathlib.Path())):
    """A copy of the library and the notebooks, whose reports/ and runs/ are its own."""

    def python(self, *words, **environment):
        """Run this Python there and wait; it may use 3 GiB, or looking for the largest batch would take minutes."""
        env = os.environ | {"PYTHONPATH": str(self), "OMP_NUM_THREADS": "1", "CTBPRN_STORAGE": ""} | environment
        limited = ("bash", "-c", 'ulimit -d 3145728; exec "$0" "$@"', sys.executable)
        return subprocess.run((*limited, *words), cwd=self, env=env, capture_output=True, text=True, check=False)

    def papermill(self, name, *parameters):
        """Run a notebook as a user types it; returns the finished process, with what its cells printed."""
        pairs = [word for pair in parameters for word in ("-p", *map(str, pair))]
        return self.python("-m", "papermill", "--log-output", "--no-progress-bar", f"notebooks/{name}.ipynb",
                           f"runs/{name}.ipynb", *pairs)  # fmt: skip


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    root = tmp_path_factory.mktemp("project")
    for name in ("ctbprn_lib", "notebooks"):
        shutil.copytree(storage.REPORTS.parent / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    (root / "runs").mkdir()
    (root / "tests").mkdir()
    shutil.copy(pathlib.Path(__file__).with_name("reference.py"), root / "tests")  # the benchmark's baseline
    return Project(root)
