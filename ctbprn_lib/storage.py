"""Where a study is kept: a SQLite file or a PostgreSQL database, which may be busy, away for a while, or broken."""

import fcntl
import functools
import os
import random
import re
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, RDBStorage, _CachedStorage

from ctbprn_lib import InputError

REPORTS = Path(__file__).resolve().parent.parent / "reports"
PATIENCE = 120  # seconds for which a database that is away or busy is waited for, and a lock
GRACE = 180  # seconds without a sign of life until a trial counts as lost: longer, or an outage would end them all
FROZEN = 30  # seconds until PostgreSQL takes the lock from a worker that stands still
ADVISORY_LOCK = 0x435442  # its number in PostgreSQL, which has one such lock for each number and database
# Seconds and milliseconds after which a silent server counts as gone; without them a broken line hangs for minutes.
POSTGRESQL = dict(
    connect_timeout=10, keepalives_idle=30, keepalives_interval=10, keepalives_count=3, tcp_user_timeout=30_000
)
# Errors that may pass; the last is of Optuna's second attempt on a lost connection.
PASSING = (sqlalchemy.exc.OperationalError, sqlalchemy.exc.InterfaceError, sqlalchemy.exc.PendingRollbackError)
HOPELESS = "authentication failed|no password|pg_hba|does not exist|permission denied|No space left"  # of waiting


ELSEWHERE = "set the variable CTBPRN_STORAGE to sqlite:///<file> in a folder of this machine that you may write to"


class StorageError(InputError):
    """The database cannot be used: the message names its file, or its server and name, and says why."""


def study_folder(name: str) -> Path:
    """reports/<name>; the name is confined to letters, digits, dot, dash and underscore."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise InputError(
            f"study_name must be 1 to 64 of a-z, A-Z, 0-9, '.', '_' and '-', not beginning with a sign, got {name!r}"
        )
    return REPORTS / name


def storage_url(name: str, storage: str = "") -> str:
    """Where a study is kept: storage, else the variable CTBPRN_STORAGE, else SQLite in the study's own folder.

    A SQLite file without a whole path lies in the project, whatever folder a notebook runs in.
    """
    if storage and _secrets(storage):
        raise InputError(
            "storage holds a password, which papermill writes into its output notebook: delete that, and put the URL "
            "into the variable CTBPRN_STORAGE or the password into ~/.pgpass"
        )
    storage = storage or os.environ.get("CTBPRN_STORAGE", "").strip()  # a Secret made from a file ends in a newline
    if not storage:
        return _sqlite_url(study_folder(name) / "optuna_studies" / "ctbprn_study.db")
    file = sqlite_file(storage)
    if file is None or file.is_absolute():
        return storage
    return _sqlite_url(REPORTS.parent / file, _parsed(storage).query)


def _sqlite_url(file, query=None):
    """The URL of a file, whatever characters its path has."""
    try:
        url = sqlalchemy.URL.create("sqlite", database=str(file), query=query or {}).render_as_string()
    except UnicodeEncodeError:
        raise StorageError(
            f"{str(file)!r}: a path that is no text in UTF-8 cannot hold a database; {ELSEWHERE}"
        ) from None
    if sqlalchemy.make_url(url).database != str(file):  # SQLAlchemy before 2.1 ends a path at a "?"
        raise StorageError(f"{file}: this SQLAlchemy cannot open a path with a ? in it; {ELSEWHERE}")
    return url


def sqlite_file(url: str) -> Path | None:
    """The file of a SQLite URL; None for another database."""
    parsed = _parsed(url)
    return Path(parsed.database) if parsed.get_backend_name() == "sqlite" else None


def _parsed(url):
    try:
        parsed = sqlalchemy.make_url(url)
    except (sqlalchemy.exc.ArgumentError, ValueError):
        parsed = None  # (its text may be a password)
    if parsed is None or parsed.get_backend_name() not in ("sqlite", "postgresql") or not parsed.database:
        raise InputError("storage must be sqlite:///<file> or postgresql://<user>@<server>/<database>")
    query = url.partition("?")[2]
    if parsed.get_backend_name() == "sqlite" and query and not re.fullmatch(r"([a-z_]+=[^&/]*(&|$))+", query):
        raise InputError("storage must be sqlite:///<file>; a ? in its path is written %3F, and a % is written %25")
    if parsed.get_backend_name() == "postgresql" and "@" in f"{parsed.host}{parsed.database}":
        raise InputError("storage has an @ too many; one in a password is written %40, and a / %2F")
    return parsed


def _secrets(url):
    """The passwords in a URL."""
    url = _parsed(url)
    in_query = [value for key, value in url.query.items() if re.search("pass(?!file)|pwd|secret|token", key, re.I)]
    return [str(secret) for secret in (url.password, *in_query) if secret]


def _place(url):
    """The file, or the server and the database, without the password."""
    if file := sqlite_file(url):
        return str(file)
    url = _parsed(url)
    return f"PostgreSQL database {url.database!r} at {url.host or 'this machine'}:{url.port or 5432}"


def _patiently(url, call):
    """call(), again and again with growing pauses while its database is away or busy.

    Raises StorageError after PATIENCE seconds, and at once where waiting cannot help.
    """
    started, pause, announced = time.monotonic(), 0.05, False
    while True:
        try:
            return call()
        except (StorageInternalError, sqlalchemy.exc.SQLAlchemyError) as error:
            cause = error.__cause__ if isinstance(error, StorageInternalError) else error
            original = getattr(cause, "orig", None) or cause
            reason = " ".join(str(original).split())
            for secret in _secrets(url):
                reason = reason.replace(secret, "***")
            if isinstance(original, sqlite3.Error):
                passes = "locked" in reason
            else:
                passes = isinstance(cause, PASSING) and not re.search(HOPELESS, reason)
            waited = time.monotonic() - started
            if not passes or waited > PATIENCE:
                after = f" for {waited:.0f} seconds" if passes else ""
                raise StorageError(f"{_place(url)} cannot be used{after}: {reason}") from None
            if waited > 5 and not announced:
                announced = True
                print(f"waiting for {_place(url)}: {reason}", flush=True)
        time.sleep(pause * random.uniform(0.5, 1))
        pause = min(2 * pause, 5)


class PatientStorage:
    """Optuna's storage in a database; a call that finds the database away or busy waits for it (see _patiently).

    It has every method of RDBStorage, and tries a call again as a whole.
    """

    # What these can object to is only what they find in the database.
    READING = ("_get_trials", "get_trial", "get_study_user_attrs")

    def __init__(self, url: str, reading: bool = False) -> None:
        if url.startswith("sqlite"):
            options: dict[str, Any] = dict(connect_args=dict(timeout=2))  # Ctrl-C is not heard while SQLite waits
        else:
            options = dict(connect_args=POSTGRESQL, pool_size=1)  # a server has few connections
        plain = url.replace("{", "{{").replace("}", "}}")  # Optuna would fill in what is in braces
        self.url = url
        self._database = RDBStorage(plain, options, skip_table_creation=reading)
        # The grace period is used; the interval is not, but must be a number.
        self._database.grace_period, self._database.heartbeat_interval = GRACE, 1

    def get_heartbeat_interval(self) -> None:
        """None, or study.ask would warn that no study.optimize gives signs of life. workers.py gives them."""
        return None

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._database, name)
        if not callable(value):
            return value

        @functools.wraps(value)
        def patient(*args: Any, **kwargs: Any) -> Any:
            try:
                return _patiently(self.url, lambda: value(*args, **kwargs))
            except StorageError:
                raise
            except (ValueError, LookupError, TypeError) as error:
                is_absent = isinstance(error, KeyError) and "does not exist" in str(error)
                if name not in self.READING or is_absent:
                    raise
                raise StorageError(f"{_place(self.url)} is damaged: {error}") from None

        return patient


def connect(url: str, reading: bool = False) -> BaseStorage:
    """The storage at url; one worker at a time makes its file and tables, and a reader waits for it.

    reading: a SQLite file whose folder cannot be written to can be read.
    Raises StorageError where the database cannot be used.
    """
    try:
        with ExitStack() as lock:
            try:
                lock.enter_context(locked(url))
                has_tables = False
            except StorageError:
                if not (reading and url.startswith("sqlite")):
                    raise
                has_tables = True
            storage = _patiently(url, lambda: PatientStorage(url, has_tables))
    except (RuntimeError, ImportError, UnicodeDecodeError) as error:  # another Optuna's; no psycopg; a damaged schema
        raise StorageError(f"{_place(url)} cannot be used: {error}") from None
    return _CachedStorage(storage)  # as Optuna wraps its own, so that a finished trial is read once


def url_of(study: optuna.Study) -> str:
    """The URL of the database that a study from connect lies in."""
    return study._storage._backend.url  # type: ignore[attr-defined]


def disconnect(storage: BaseStorage) -> None:
    """Close the connections of a storage from connect."""
    storage._backend.engine.dispose()  # type: ignore[attr-defined]


@contextmanager
def locked(url: str) -> Iterator[Callable[[], bool]]:
    """Keep all other workers out of the database at url; yields a function that says whether they still are.

    It is a lock on a file beside a SQLite file, and an advisory lock in PostgreSQL, which is lost with its connection.
    """
    if url.startswith("sqlite"):
        path = Path(f"{_place(url)}.lock")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a")
        except OSError as error:
            raise StorageError(f"{path} cannot be written: {error.strerror}; {ELSEWHERE}") from None
        with file:
            started = time.monotonic()
            while not _flock(file):
                if time.monotonic() - started > PATIENCE:
                    raise StorageError(f"{path} has been locked by another process for {PATIENCE} seconds")
                time.sleep(random.uniform(0.01, 0.05))
            yield lambda: True
        return
    options = dict(options=f"-c lock_timeout=5s -c idle_session_timeout={FROZEN}s")
    engine = sqlalchemy.create_engine(
        url, connect_args=POSTGRESQL | options, isolation_level="AUTOCOMMIT", poolclass=sqlalchemy.NullPool
    )
    with _patiently(url, lambda: _advisory_lock(engine)) as connection:
        yield lambda: _answers(connection)


def _flock(file):
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kind that SQLite takes
    except BlockingIOError:
        return False
    except OSError as error:
        folder = Path(file.name).parent
        raise StorageError(f"{folder}: its file system has no file locks ({error.strerror}); {ELSEWHERE}") from None
    return True


def _advisory_lock(engine):
    connection = engine.connect()
    try:
        connection.execute(sqlalchemy.text(f"SELECT pg_advisory_lock({ADVISORY_LOCK})"))
    except BaseException:
        connection.close()
        raise
    return connection


def _answers(connection):
    try:
        connection.execute(sqlalchemy.text("SELECT 1"))
    except sqlalchemy.exc.SQLAlchemyError:
        return False
    return True


def beside(study: optuna.Study, name: str) -> optuna.Study:
    """The study of that name in the same database; made if it is not there."""
    with locked(url_of(study)):
        return optuna.create_study(study_name=name, storage=study._storage, load_if_exists=True)
