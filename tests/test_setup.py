"""One set of versions in pyproject.toml, environment.yml and constraints.txt; what git and the style leave out."""

import os
import runpy
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
PINS = {
    requirement.name.lower(): next(iter(requirement.specifier)).version
    for requirement in map(
        Requirement,
        filter(None, (r.split("#")[0].strip() for r in (ROOT / "constraints.txt").read_text().splitlines())),
    )
}


def test_the_pins_lie_within_the_bounds_of_every_requirement():
    assert PINS["torch"] == "2.13.0"
    assert set(EXTRAS) == {"test", "uea", "postgres", "dashboard"}
    for text in (*PROJECT["dependencies"], *(r for extra in EXTRAS.values() for r in extra)):
        requirement = Requirement(text)
        assert requirement.specifier.contains(PINS[requirement.name.lower()]), text
        assert len(str(requirement.specifier)) > 0 and "==" not in text


def test_the_conda_environment_is_the_same_one():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    python = next(entry for entry in environment if isinstance(entry, str) and entry.startswith("python"))
    assert SpecifierSet(python.removeprefix("python")) == SpecifierSet(PROJECT["requires-python"])
    pip = next(entry["pip"] for entry in environment if isinstance(entry, dict))
    assert pip == ["--constraint constraints.txt", f"--editable .[{','.join(EXTRAS)}]"]
    makefile = (ROOT / "Makefile").read_text()
    assert "--constraint constraints.txt" in makefile and f"--editable '.[{','.join(EXTRAS)}]'" in makefile


def test_the_version_is_said_once_over():
    from ctbprn_lib import __version__

    assert __version__ == PROJECT["version"]


def test_what_a_run_leaves_in_the_root_is_ignored_and_nothing_that_is_kept():
    if not (ROOT / ".git").exists():
        pytest.skip("needs a checkout")
    left = ["out.ipynb", "docs/Untitled.ipynb", "mine.npz", "my_space.yaml", "study.db", "tune.log", "slurm-1.out",
            ".ipynb_checkpoints/x", ".virtual_documents/x", ".jupyter_ystore.db", ".mypy_cache/x"]  # fmt: skip
    ignored = subprocess.run(("git", "check-ignore", *left), cwd=ROOT, capture_output=True, text=True, check=False)
    assert ignored.stdout.split() == left
    kept = subprocess.run(("git", "ls-files", "-ci", "--exclude-standard"), cwd=ROOT, capture_output=True, check=True)
    assert kept.stdout == b""


def test_the_style_is_that_of_the_project_and_not_of_executed_notebooks(tmp_path):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)  # without git, as in an archive of the project
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("import os\nx=  1")])
    ruff = shutil.which("ruff", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    for name, code in (("out.ipynb", 0), ("runs/out.ipynb", 0), ("notebooks/mine.ipynb", 1)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        nbformat.write(notebook, tmp_path / name)
        for command in ("check", "format --check"):
            done = subprocess.run((ruff, *command.split(), "."), cwd=tmp_path, capture_output=True, text=True)
            assert done.returncode == code, done.stdout + done.stderr


def test_notebooks_are_cleaned_of_all_but_their_cells_and_tags(tmp_path, monkeypatch, capsys):
    clean = ROOT / "notebooks" / "tune.ipynb"
    used = nbformat.read(clean, as_version=4)
    used.metadata["papermill"], used.metadata["language_info"]["version"] = {"duration": 1}, "3.11.7"
    for cell in used.cells:
        cell.metadata["papermill"] = {"duration": 1}
        if cell.cell_type == "code":
            cell.execution_count, cell.outputs = 1, [nbformat.v4.new_output("stream", text="printed")]
    nbformat.write(used, tmp_path / "tune.ipynb")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["clean_notebooks.py", "tune.ipynb"])
    for printed in ("cleaned tune.ipynb\n", ""):
        runpy.run_path(str(ROOT / ".ci" / "clean_notebooks.py"), run_name="__main__")
        assert capsys.readouterr().out == printed
        assert (tmp_path / "tune.ipynb").read_text() == clean.read_text()
