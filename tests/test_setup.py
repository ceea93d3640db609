"""One set of versions: pyproject.toml, environment.yml and constraints.txt agree."""

import tomllib
from pathlib import Path

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
