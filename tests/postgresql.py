"""A PostgreSQL server for tests that share a database among workers."""

import contextlib
import glob
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy

PASSWORD = "hunter2{X}"  # braces, as Optuna fills in what is in them


class Server:
    """A PostgreSQL of Debian's package on loopback, in a folder of its own; databases come and go with tests."""

    def __init__(self, programs):
        self.programs = Path(programs)
        self.user = "postgres" if os.geteuid() == 0 else None  # which refuses to be run by root
        self.folder = tempfile.mkdtemp(prefix="ctbprn-postgresql-")
        (Path(self.folder) / "password").write_text(PASSWORD)
        if self.user:
            shutil.chown(self.folder, self.user)
            shutil.chown(f"{self.folder}/password", self.user)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._run("initdb", "-D", f"{self.folder}/data", "-U", "tester", "-A", "scram-sha-256",
                  f"--pwfile={self.folder}/password")  # fmt: skip
        self.start()

    def start(self):
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={self.folder}"
        self._run("pg_ctl", "-D", f"{self.folder}/data", "-l", f"{self.folder}/log", "-w", "-o", options, "start")

    def stop(self):
        self._run("pg_ctl", "-D", f"{self.folder}/data", "-m", "immediate", "stop")

    def url(self, name):
        return f"postgresql://tester:{PASSWORD.replace('{', '%7B').replace('}', '%7D')}@127.0.0.1:{self.port}/{name}"

    def database(self, name):
        """The URL of a new, empty database."""
        engine = sqlalchemy.create_engine(self.url("postgres"), isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(sqlalchemy.text(f"CREATE DATABASE {name}"))
        engine.dispose()
        return self.url(name)

    def _run(self, program, *words):
        subprocess.run((self.programs / program, *words), cwd=self.folder, user=self.user, check=True, timeout=60,
                       stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)  # fmt: skip


@contextlib.contextmanager
def running_server() -> Iterator[Server]:
    """A server of Debian's package, which is installed if it is not there; the test is skipped where it cannot be."""
    pytest.importorskip("psycopg", reason="needs psycopg (the extra postgres), which make installs")
    if not glob.glob("/usr/lib/postgresql/*/bin/initdb"):
        install = "apt-get update -qq && apt-get install -qq -y --no-install-recommends postgresql"
        done = subprocess.run(install, shell=True, env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"},
                              capture_output=True, text=True, check=False)  # fmt: skip
        if done.returncode:
            pytest.skip(f"needs Debian's package postgresql, and it cannot be installed here: {done.stderr[-200:]}")
    made = Server(sorted(glob.glob("/usr/lib/postgresql/*/bin"))[-1])
    yield made
    made.stop()
    shutil.rmtree(made.folder)
