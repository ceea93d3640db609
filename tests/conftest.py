"""What several tests share: one thread a process, and studies that live in a temporary folder.

The process that hands out the tests reads this file too, so what takes seconds to import is imported where it is used.
"""

import ast
import multiprocessing
import os
import pathlib
import shutil
import subprocess
import sys
import types

import pytest

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = pathlib.Path(__file__).parent.parent
SLOW_FILES = {f"test_{name}" for name in ("confirm", "findings", "memory", "original", "report", "verdicts")}
STARTING = {"project", "crew", "server", "dashboard"}  # fixtures with which tests start processes


def pytest_collection_modifyitems(items):
    """Mark slow tests, which start processes or are in files that confirm, recompute reports or run the original.

    Files with slow tests come first, so that the processes that run the tests end together.
    """
    for item in items:
        if not STARTING.isdisjoint(item.fixturenames) or item.path.stem in SLOW_FILES:
            item.add_marker(pytest.mark.slow)
    slow_files = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow_files)


@pytest.fixture
def reports(tmp_path, monkeypatch):
    """An empty folder in the place of reports/, and no storage named by the environment."""
    from ctbprn_lib import storage

    folder = tmp_path / "reports"  # beside it runs/ is made
    folder.mkdir()
    monkeypatch.setattr(storage, "REPORTS", folder)
    monkeypatch.delenv("CTBPRN_STORAGE", raising=False)
    return folder


@pytest.fixture(scope="module")
def tuned(request, tmp_path_factory):
    """The database of a study with finished trials, as TUNED in the tests' file says: name, trials, what it asks."""
    from ctbprn_lib import search

    name, n_trials, question = request.module.TUNED
    path = tmp_path_factory.mktemp("tuned") / "study.db"
    made = search.open_study(name, f"sqlite:///{path}", pruner="none", **question)
    search.run_trials(made, n_trials, **question)
    return path


@pytest.fixture
def study(request, tuned, reports):
    """A copy of that study in the usual place."""
    from ctbprn_lib import search

    name = request.module.TUNED[0]
    folder = reports / name / "optuna_studies"
    folder.mkdir(parents=True)
    shutil.copy(tuned, folder / "ctbprn_study.db")
    return search.load_study(name)


@pytest.fixture(scope="session")
def small_task():
    """A routing task that trains in milliseconds."""
    from ctbprn_lib import tasks

    return tasks.RoutingTask(n_areas=2, n_features=8, n_tokens=8)


@pytest.fixture(scope="session")
def array_task():
    """90 samples of three classes that the means of two features, one in each area, tell apart."""
    import numpy as np

    from ctbprn_lib import tasks

    rng = np.random.default_rng(0)
    y = np.repeat(["a", "b", "c"], 30)
    x = rng.normal(size=(90, 2, 6, 3)).astype(np.float32)
    x[y == "a", 0, :, 0] += 2
    x[y == "b", 1, :, 1] += 2
    return tasks.ArrayTask(x, y, source="three classes")


@pytest.fixture(scope="session", autouse=True)
def forks():
    """Let the library's pools fork their processes too, as a new Python needs seconds for its imports."""
    from crew import FORKS

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multiprocessing, "get_context", lambda method=None: FORKS)
        yield


@pytest.fixture(scope="session", autouse=True)
def migrations():
    """Let Optuna read its 30 scripts of migrations once, and not for every new database."""
    from optuna.storages._rdb.storage import _VersionManager

    read, scripts = _VersionManager._create_alembic_script, []

    def read_once(manager):
        if not scripts:
            scripts.append(read(manager))
        return scripts[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_VersionManager, "_create_alembic_script", read_once)
        yield


@pytest.fixture(scope="session")
def crew(tmp_path_factory):
    from crew import Crew

    made = Crew(tmp_path_factory.mktemp("crew"))
    yield made
    made.end()


@pytest.fixture
def run_here(monkeypatch):
    """Run a notebook in this process, as no kernel has to start for that: its cells one after another, then analyze.

    run_here(root, name, **parameters): root is the folder of the project, whose reports/ and notebooks/ are used.
    Returns the values that cells end with, such as the sentences of a report.
    """
    import nbformat

    from ctbprn_lib import storage
    from ctbprn_lib.report import publish

    shown = []
    monkeypatch.delenv("CTBPRN_STORAGE", raising=False)
    monkeypatch.setattr("IPython.display.publish_display_data", lambda *_: None)
    monkeypatch.setattr("IPython.display.display", lambda *_, **__: types.SimpleNamespace(update=lambda figure: None))

    def run(root, name, **parameters):
        scope = {"In": []}  # as IPython keeps the cells that have run
        for module in (storage, publish):
            monkeypatch.setattr(module, "REPORTS", root / "reports")
        monkeypatch.setattr(publish, "publish", lambda study, url="": analyze(root, study, url))
        monkeypatch.chdir(root)
        for cell in nbformat.read(root / "notebooks" / f"{name}.ipynb", as_version=4).cells:
            if cell.cell_type == "code":
                *statements, last = ast.parse(cell.source).body
                ends_in_value = isinstance(last, ast.Expr)
                statements += [] if ends_in_value else [last]
                exec(compile(ast.Module(statements, []), name, "exec"), scope)
                if ends_in_value:
                    shown.append(eval(compile(ast.Expression(last.value), name, "eval"), scope))
                scope["In"].append(cell.source)
                if "parameters" in cell.metadata.get("tags", []):
                    assert parameters.keys() <= scope.keys()
                    scope |= parameters
        return shown

    def analyze(root, study, url):
        run(root, "analyze", study_name=study, storage=url)
        return root / "reports" / study

    return run


class Project(type(pathlib.Path())):
    """A copy of the library and the notebooks, whose reports/ and runs/ are its own."""

    def change(self, before, after):
        """Change a piece of code, whichever module or notebook it is in; fails if it is in none or in several."""
        files = [*self.glob("ctbprn_lib/**/*.py"), *self.glob("notebooks/*.ipynb")]
        (file,) = (path for path in files if before in path.read_text())
        file.write_text(file.read_text().replace(before, after))

    def shorten_report(self):
        """Leave of analyze.ipynb the beginning with one picture, and the tables."""
        import nbformat

        path = self / "notebooks" / "analyze.ipynb"
        notebook = nbformat.read(path, as_version=4)
        shown = ("all_trials", "raw_data", "trials_finding")
        notebook.cells = [*notebook.cells[:6], *(c for c in notebook.cells[6:] if any(n in c.source for n in shown))]
        nbformat.write(notebook, path)

    def publish(self, study):
        """Publish a study of this project from this process; the kernel that runs analyze.ipynb is a new one."""
        from ctbprn_lib import storage
        from ctbprn_lib.report import publish

        with pytest.MonkeyPatch.context() as patch:
            for module in (storage, publish):
                patch.setattr(module, "REPORTS", self / "reports")
            patch.setenv("PYTHONPATH", str(self))
            patch.delenv("CTBPRN_STORAGE", raising=False)
            publish.publish(study)

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
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    (root / "runs").mkdir()
    (root / "tests").mkdir()
    shutil.copy(pathlib.Path(__file__).with_name("reference.py"), root / "tests")  # the benchmark's baseline
    return Project(root)


@pytest.fixture(scope="module")
def server():
    """A PostgreSQL server (see postgresql.py)."""
    from postgresql import running_server

    with running_server() as made:
        yield made
