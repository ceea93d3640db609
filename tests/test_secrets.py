"""Passwords appear nowhere, parameters are no code, files get the user's umask, and nobody is listened to."""

import contextlib
import os
import re
import socket
import stat
import subprocess
import sys
import time
import traceback
import urllib.error
import urllib.request

import pandas as pd
import psutil
import pytest
from IPython.core.interactiveshell import InteractiveShell
from papermill.translators import PythonTranslator

from ctbprn_lib import InputError, checkpoint, parameters, search, storage
from ctbprn_lib.audit import original
from ctbprn_lib.model import CTBPRN

SECRET = "hunter2-ÿ"
CODED = "hunter2-%C3%BF"
NOBODY = "127.0.0.1:9"  # the discard port, which nothing answers


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://me:{CODED}@{NOBODY}/db",
        f"postgresql+psycopg://me:{CODED}@{NOBODY}/db",
        f"postgresql://:{CODED}@{NOBODY}/db",
        f"postgresql://me@{NOBODY}/db?password={CODED}",
        f"postgresql://me@{NOBODY}/db?p%61ssword={CODED}",
        f"postgresql://me@{NOBODY}/db?sslmode=require&sslpassword={CODED}",
        f"postgresql://{NOBODY}/db?user=me&PassWord={CODED}",
        f"postgresql://me:one@{CODED}@{NOBODY}/db",
        f"postgresql://me:one/{CODED}@{NOBODY}/db",
        f"postgresql://me/x:{CODED}@{NOBODY}/db",
        f"postgresql://me:{CODED}@host:port/db",
        f"mysql://me:{CODED}@{NOBODY}/db",
        f"not a url {CODED}",
    ],
)
def test_a_password_is_refused_as_a_parameter_and_told_to_nobody_from_the_environment(reports, monkeypatch, url):
    monkeypatch.setattr(storage, "PATIENCE", 0)
    with pytest.raises(InputError, match="storage ") as error:
        storage.storage_url("s", url)
    told = traceback.format_exception(error.value)
    monkeypatch.setenv("CTBPRN_STORAGE", url)
    for open_it in (lambda: search.load_study("s"), lambda: storage.connect(storage.storage_url("s"))):
        with pytest.raises(InputError) as error:
            open_it()
        told += traceback.format_exception(error.value)
        if "cannot be used" in str(error.value):
            assert "PostgreSQL database 'db' at 127.0.0.1:9" in str(error.value)
    assert not any(secret in "".join(told) for secret in (SECRET, CODED, "hunter2"))


def test_a_url_without_a_password_is_taken(reports):
    for url in (
        "postgresql://me@server/db",
        "postgresql://server:5433/db?passfile=/home/me/.pgpass",
        f"sqlite:///{reports.parent}/a@b:c.db",
    ):
        assert storage.storage_url("s", url) == url
    assert storage.sqlite_file(storage.storage_url("s", "sqlite:///a@b:c.db")) == storage.sqlite_file(url)


# ---- parameters


@pytest.fixture(scope="module")
def shell():
    """An IPython that has run the parameters cell of a notebook."""
    shell = InteractiveShell()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parameters, "get_ipython", lambda: shell)
        shell.input_transformers_cleanup.append(parameters._check_before_run)
        shell.run_cell("seed: int = 0\nstorage: str = ''\nran = []")
        yield shell


@pytest.mark.parametrize(
    "name",
    ["ran=ran+[1];seed", "seed=ran.append(1);seed", "seed=1\nran.append(1)\nseed", "!touch ran #", "ran.append(1) #",
     "%time ran.append(1) #", "seed=1 if ran.append(1) else 2 #", "import os;seed", "seed: ran.append(1)", "seed, seed",
     "ran[0]", "parameters", "__builtins__", "seed=(lambda: ran.append(1))();seed", "seed=f'{ran.append(1)}';seed",
     "se\0ed", "seed=" + "(" * 9999, "seed=[ran.append(1)][0]", "seed=zzz", "seed={[]: 1};seed"],
)  # fmt: skip
def test_a_parameter_that_is_code_is_refused_before_it_runs(shell, name, capsys):
    result = shell.run_cell(PythonTranslator.codify({name: 1}))
    assert isinstance(result.error_before_exec, InputError) and shell.user_ns["ran"] == []
    assert "parameter" in str(result.error_before_exec) or "seed must be" in str(result.error_before_exec)


def test_a_parameter_that_is_none_passes(shell):
    assert shell.run_cell(PythonTranslator.codify({"seed": -7, "storage": "a';ran.append(1);'\n#"})).success
    assert shell.user_ns["seed"] == -7 and shell.user_ns["ran"] == []
    assert shell.run_cell("ran = [1]\nran.clear()").success  # other cells are the notebook's own


# ---- the notebook


def test_papermill_is_not_a_way_to_run_code_and_exits_non_zero(project):
    done = project.papermill("tune", ("seed=open('ran','w');seed", 1), ("study_name", "never"))
    assert done.returncode != 0 and "seed must be a whole number, got \"open('ran', 'w')\"" in done.stderr
    assert not (project / "ran").exists() and not (project / "reports").exists()


def test_a_password_for_a_server_that_is_away_appears_nowhere(project):
    path = project / "ctbprn_lib" / "storage.py"
    source = path.read_text()
    path.write_text(source.replace(f"PATIENCE = {storage.PATIENCE}", "PATIENCE = 1"))
    words = ("-m", "papermill", "--log-output", "--log-level", "DEBUG", "notebooks/tune.ipynb", "runs/away.ipynb")
    done = project.python(*words, CTBPRN_STORAGE=f"postgresql://me:{CODED}@{NOBODY}/db")
    path.write_text(source)
    assert done.returncode != 0 and "PostgreSQL database 'db' at 127.0.0.1:9 cannot be used" in done.stderr
    left = [path for name in ("runs", "reports") for path in (project / name).rglob("*") if path.is_file()]
    assert project / "runs" / "away.ipynb" in left
    for content in (done.stdout.encode(), done.stderr.encode(), *(path.read_bytes() for path in left)):
        assert b"hunter2" not in content


@pytest.mark.slow
def test_jupyterlab_is_for_this_machine_and_whoever_has_its_token(tmp_path):
    """As make lab starts it, without the browser."""
    assert re.findall(r"jupyter lab (.*)", (storage.REPORTS.parent / "Makefile").read_text()) == [
        "$(if $(filter 0,$(shell id -u)),--allow-root) notebooks"  # no other address, no other token
    ]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = (sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", f"--port={port}", str(tmp_path))
    names = {f"JUPYTER_{kind}_DIR": str(tmp_path / kind) for kind in ("CONFIG", "DATA", "RUNTIME")}
    names |= {"HOME": str(tmp_path), "IPYTHONDIR": str(tmp_path / "ipython")}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, env=os.environ | names, stdout=log, stderr=log)
    try:
        for _ in range(300):
            with contextlib.suppress(urllib.error.URLError), urllib.request.urlopen(f"http://127.0.0.1:{port}/api"):
                break
            time.sleep(0.1)
        heard = [c.laddr for c in psutil.Process(process.pid).net_connections() if c.status == psutil.CONN_LISTEN]
        assert port in {address.port for address in heard}
        assert {address.ip for address in heard} <= {"127.0.0.1", "::1"}
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/api/contents")
    finally:
        process.terminate()
        process.wait(20)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_what_the_library_writes_gets_the_umask(tmp_path, umask, mode):
    model = CTBPRN(4, 8, 2, 2)
    before = os.umask(umask)
    try:
        model.save(tmp_path / "m.safetensors")
        checkpoint.write(tmp_path / "c.safetensors", model.state_dict(), {}, {})
        original.read_or_make(tmp_path / "t.csv", lambda: pd.DataFrame({"a": [1, 2]}))
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {"m.safetensors": mode, "c.safetensors": mode, "t.csv": mode}
