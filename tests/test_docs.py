"""docs/: what is written there is valid and starts the notebooks with parameters that they have."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import nbformat
import pytest
import yaml

ROOT = Path(__file__).parent.parent
SLURM = ROOT / "docs" / "slurm.sh"
WORKERS = (ROOT / "docs" / "workers.md").read_text()
SCRIPTS = {"slurm.sh": SLURM.read_text()} | {
    f"workers.md, block {i}": f"#!/usr/bin/env bash\n{block}"
    for i, block in enumerate(re.findall(r"```bash\n(.*?)```", WORKERS, re.S))
}
JOB = yaml.safe_load((ROOT / "docs" / "kubernetes.yaml").read_text())
POD = JOB["spec"]["template"]["spec"]
(WORKER,) = POD["containers"]
URL = "postgresql://me@server/studies"


@pytest.mark.parametrize("name", SCRIPTS)
def test_shell_scripts_pass_shellcheck(name, tmp_path):
    (tmp_path / "script.sh").write_text(SCRIPTS[name])
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    for command in ("bash -n", f"{shellcheck} --enable=all --exclude=SC2250"):  # (braces around every variable)
        done = subprocess.run((*command.split(), "script.sh"), cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_kubernetes_job_has_the_schema_of_one():
    for version in ("1.28", "1.37"):
        kubernetes_validate.validate(JOB, version, strict=True)
    with pytest.raises(kubernetes_validate.ValidationError, match="paralellism"):
        kubernetes_validate.validate(JOB | {"spec": JOB["spec"] | {"paralellism": 8}}, "1.37", strict=True)


def test_the_kubernetes_job_is_confined_and_has_its_password_from_a_secret():
    assert JOB["kind"] == "Job" and JOB["spec"]["completions"] == JOB["spec"]["parallelism"] == 8
    assert POD["securityContext"]["runAsNonRoot"] and POD["automountServiceAccountToken"] is False
    assert WORKER["resources"]["limits"]["nvidia.com/gpu"] == 1
    (url,) = (entry for entry in WORKER["env"] if entry["name"] == "CTBPRN_STORAGE")
    assert url["valueFrom"]["secretKeyRef"] == {"name": "ctbprn-storage", "key": "url"} and "value" not in url
    for container in (WORKER, *POD["initContainers"]):
        assert container["securityContext"]["readOnlyRootFilesystem"]
        assert container["securityContext"]["allowPrivilegeEscalation"] is False


@pytest.fixture
def calls(tmp_path):
    """Where a stand-in for papermill notes each call: its GPU, its storage, its words."""
    program = tmp_path / ".venv" / "bin" / "papermill"
    program.parent.mkdir(parents=True)
    program.write_text('#!/bin/sh\necho "${CUDA_VISIBLE_DEVICES-} $CTBPRN_STORAGE $*" >> calls\n')
    program.chmod(0o755)
    (tmp_path / "runs").mkdir()
    return tmp_path / "calls"


def started(calls, *command, **environment):
    """[(GPU, storage, notebook, output, {parameter: value})] of what a command has started."""
    done = subprocess.run(command, cwd=calls.parent, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = []
    for line in calls.read_text().splitlines():
        gpu, storage, words = line.split(" ", 2)
        notebook, output = re.findall(r"\S+\.ipynb", words)
        found.append((gpu, storage, notebook, output, dict(re.findall(r"-p (\S+) (\S+)", words))))
    return found


def fits(notebook, given):
    """Every parameter is one of the notebook's, and its value of the kind that it has there."""
    cells = nbformat.read(ROOT / notebook, as_version=4).cells
    (cell,) = (cell for cell in cells if "parameters" in cell.metadata.get("tags", []))
    kinds = {s.target.id: s.annotation.id for s in ast.parse(cell.source).body}
    assert given and given.keys() <= kinds.keys()
    assert all(value.isdecimal() for name, value in given.items() if kinds[name] == "int")


@pytest.mark.parametrize(
    ("notebook", "parameters"),
    [("tune", ["-p", "n_trials", "400", "-p", "n_replicas", "8"]), ("confirm", ["-p", "n_seed_runs", "1000"])],
)
def test_a_slurm_task_is_one_worker(calls, notebook, parameters):
    where = dict(CTBPRN_STORAGE=URL, SLURM_ARRAY_TASK_ID="3", CUDA_VISIBLE_DEVICES="1")
    (found,) = started(calls, "bash", str(SLURM), notebook, *parameters, **where)
    assert found[:4] == ("1", URL, f"notebooks/{notebook}.ipynb", f"runs/{notebook}-3.ipynb")
    assert found[4].items() >= dict(zip(parameters[1::3], parameters[2::3], strict=True)).items()
    fits(f"notebooks/{notebook}.ipynb", found[4])
    assert "--array=0-7" in SCRIPTS["slurm.sh"] and "--gres=gpu:1" in SCRIPTS["slurm.sh"]
    for environment, said in (({"CTBPRN_STORAGE": ""}, "CTBPRN_STORAGE: set it"), (where, "tune or confirm")):
        done = subprocess.run(("bash", str(SLURM)), env=os.environ | environment, capture_output=True, text=True)
        assert done.returncode != 0 and said in done.stderr


def test_a_kubernetes_pod_is_one_worker_of_tune_or_with_the_documented_edit_of_confirm(calls):
    edit = re.search(r"sed (.*?)docs/kubernetes.yaml", WORKERS, re.S).group(1).replace("\\\n", "")
    done = subprocess.run(f"sed {edit} docs/kubernetes.yaml", shell=True, cwd=ROOT, capture_output=True, text=True)
    of_confirm = yaml.safe_load(done.stdout)
    kubernetes_validate.validate(of_confirm, "1.37", strict=True)
    assert of_confirm["metadata"]["name"] == "ctbprn-confirm" != JOB["metadata"]["name"]
    for job, notebook, parameter in ((JOB, "tune", "n_trials"), (of_confirm, "confirm", "n_seed_runs")):
        calls.unlink(missing_ok=True)
        (worker,) = job["spec"]["template"]["spec"]["containers"]
        variables = {entry["name"]: entry["value"] for entry in worker["env"] if "value" in entry}
        given = {name: variables[name] for name in ("NOTEBOOK", "PARAMETERS")}
        *shell, script = worker["command"]
        script = script.replace("/ctbprn/", "./")  # where the image has it
        (found,) = started(calls, *shell, script, CTBPRN_STORAGE=URL, JOB_COMPLETION_INDEX="5", **given)
        assert found[1:4] == (URL, f"notebooks/{notebook}.ipynb", f"runs/{notebook}-5.ipynb") and parameter in found[4]
        fits(f"notebooks/{notebook}.ipynb", found[4])


def test_machines_join_both_notebooks_by_the_same_lines(calls):
    found = started(calls, "bash", "-c", next(s for s in SCRIPTS.values() if "HOSTNAME" in s), HOSTNAME="a")
    assert [call[3] for call in found] == ["runs/tune-a.ipynb", "runs/confirm-a.ipynb"]
    for call in found:
        assert call[1] == URL and call[4]["study_name"] == "flagship"
        fits(call[2], call[4])


def test_the_image_lacks_what_one_machine_alone_has():
    kept_out = (ROOT / ".dockerignore").read_text().splitlines()
    assert {".git", ".venv", "runs", "reports/*"} <= set(kept_out) and "COPY . " in WORKERS
    lines = [line for line in (ROOT / ".gitignore").read_text().splitlines() if not line.startswith("#")]
    ignored = {line.lstrip("!").strip("/") for line in lines}
    ignored -= {"*.npz", "*.yaml", "*.yml", ".pre-commit-config.yaml", "environment.yml"}  # a worker's input
    assert ignored <= {line.lstrip("!").removeprefix("**/") for line in kept_out}


def test_every_command_on_a_study_of_many_workers_says_where_it_is():
    for name, script in SCRIPTS.items():
        assert "flagship" not in script or "CTBPRN_STORAGE" in script, name


def test_no_password_is_on_a_command_line():
    for name, script in SCRIPTS.items():
        assert not re.search(r"://[^\s/@]*:[^\s/@]*@", script), name
