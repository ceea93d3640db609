"""Checks of a notebook's parameters before anything is trained.

papermill takes any name for a parameter, code too, and leaves "false" as text. So two things are checked:
- the cell that papermill writes (the injected cell), before IPython runs it: it may hold only known names and plain
  values;
- the values, in the cell after the parameters, which calls check(globals()).
"""

import ast
import contextlib
import difflib
import logging
import platform
from collections.abc import Mapping
from typing import Any, NoReturn

import optuna
import torch
from IPython import get_ipython

from ctbprn_lib import InputError, __version__
from ctbprn_lib.device import PRECISIONS, device_name, resolve_device
from ctbprn_lib.search import OBJECTIVES, PRUNERS, SAMPLERS, commit
from ctbprn_lib.storage import storage_url, study_folder

LEAST: dict[str, int] = {  # the smallest value of a parameter; an interval needs two seeds
    **dict.fromkeys(("n_trials", "n_steps", "n_replicas", "d", "rank", "batch_size", "n_samples", "max_steps"), 1),
    **dict.fromkeys(("n_resamples", "factor", "n_top", "n_test", "n_sets", "n_reports", "n_power", "n_runs"), 1),
    **dict.fromkeys(("n_seeds", "n_fresh_seeds", "n_spread_seeds", "n_curve_seeds", "n_pairs"), 2),
    **dict.fromkeys(("n_workers", "n_levels", "minutes", "most_cost", "n_timed", "timed_minutes"), 0),
}
ABOVE_ZERO = {"lr", "temperature", "run_seconds"}
STUDY_NAMES = {"study_name", "tested_by", "like"}
CHOICES: dict[str, tuple[str, ...]] = {
    "protocol": ("replicated",),
    "objective": tuple(OBJECTIVES),
    "sampler": tuple(SAMPLERS),
    "pruner": tuple(PRUNERS),
    "base_from": ("confirmed", "search"),
    "precision": PRECISIONS,
}
INJECTED = "# Parameters\n"  # the first line of the cell that papermill writes
KINDS: dict[type, str] = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def check(namespace: Mapping[str, Any]) -> None:
    """Check the parameters of a notebook, and print them with what they will run on.

    namespace: the notebook's globals(). The parameters are the annotated names of its parameters cell; the name and the
    annotation of each say what it may be.
    Raises InputError that names the parameter and says what it may be or, for a name that is not known, which known
    name is nearest.
    """
    kinds = _kinds(namespace)
    injected = [cell for cell in namespace.get("In", ()) if cell.startswith(INJECTED)]
    _check_injected("".join(injected[-1:]), kinds)
    for name, kind in kinds.items():
        if name not in namespace:
            raise InputError(f"the parameter {name} is missing; it must be {KINDS[kind]}")
        _check_value(name, namespace[name], kind)
    logging.getLogger("IPKernelApp").addFilter(_is_not_from_ctrl_c)
    if shell := get_ipython():  # a page shows the same cells whatever the user's own IPython shows
        shell.ast_node_interactivity = "last_expr"
        shell.set_custom_exc((KeyboardInterrupt,), _show_interrupt)
    values = {name: namespace[name] for name in kinds}
    hardware = device_name(resolve_device(values.get("device", "auto")))
    for name, value in values.items():
        print(f"{name:>14} = {value!r}")
    versions = f"torch {torch.__version__}, optuna {optuna.__version__}, Python {platform.python_version()}"
    print(f"\nctbprn {__version__} at commit {commit()}; {versions}; {hardware}")


def _show_interrupt(shell: Any, kind: type, error: BaseException, traceback: Any, tb_offset: int | None = None) -> None:
    """Show an interrupt of any cell as one sentence; IPython calls it in place of its own traceback."""
    sentence = str(error) or "Interrupted. Run the notebook again; what a study has finished is kept."
    shell._showtraceback(kind, error, [sentence])


def _is_not_from_ctrl_c(record: logging.LogRecord) -> bool:
    """A filter of logging: False for the traceback that a kernel logs when Ctrl-C has ended its papermill."""
    return "Socket operation on non-socket" not in str(record.exc_info)


def _check_value(name: str, value: Any, kind: type) -> None:
    """Raise InputError if the value of a parameter is not of its kind or not one that the parameter may have."""

    def refuse(expected: str) -> NoReturn:
        raise InputError(f"{name} must be {expected}, got {value!r}")

    if kind is str and isinstance(value, (int, float)):
        refuse(f"text, which papermill takes for a number here: write -r {name} {value}")
    types = (int, float) if kind is float else kind
    misplaced = isinstance(value, bool) != (kind is bool)  # for Python true and false are whole numbers too
    is_of_kind = isinstance(value, types) and not misplaced
    if not is_of_kind:
        refuse(KINDS[kind])
    if name in CHOICES and value not in CHOICES[name]:
        nearest = difflib.get_close_matches(value, CHOICES[name], 1, 0.5)
        hint = f" (did you mean {nearest[0]}?)" if nearest else ""
        refuse(f"one of {', '.join(CHOICES[name])}{hint}")
    if name in LEAST and not LEAST[name] <= value < float("inf"):
        refuse(f"{KINDS[kind]} of at least {LEAST[name]}")
    if name in ABOVE_ZERO and not 0 < value < float("inf"):
        refuse("a number above 0")
    if name == "seq_len" and value < 0:
        refuse("a whole number above 0, or 0 for all tokens")
    if name == "seed" and not 0 <= value < 2**32:
        refuse("a whole number from 0 to 2**32 - 1")
    if name in STUDY_NAMES and value:
        study_folder(value)  # these three raise InputError themselves
    if name == "storage":
        storage_url("any", value)
    if name == "device":
        resolve_device(value)


def _kinds(namespace: Mapping[str, Any]) -> dict[str, type]:
    """{name: kind} of the parameters, from the annotations of the parameters cell.

    Python 3.14 no longer collects annotations, so there they are read from the text of the cells that have run.
    """
    if "__annotations__" in namespace:
        return {name: kind for name, kind in namespace["__annotations__"].items() if kind in KINDS}
    by_name, kinds = {kind.__name__: kind for kind in KINDS}, {}
    for cell in namespace["In"]:
        with contextlib.suppress(SyntaxError, ValueError):  # a cell with a magic is no Python
            for node in ast.parse(cell).body:
                if isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation) in by_name:
                    kinds[ast.unparse(node.target)] = by_name[ast.unparse(node.annotation)]
    return kinds


def _check_injected(source: str, kinds: Mapping[str, type]) -> None:
    """Raise InputError if the injected cell holds anything but known names and plain values.

    source: the text of the cell. kinds: {name: kind} of the known parameters.
    """
    try:
        statements = ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise InputError(f"a parameter is a name and a value, got {source.removeprefix(INJECTED)!r}") from None
    for statement in statements:
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=value) if name in kinds:
                try:  # papermill also writes float('nan'), which is no plain value; no parameter may be that
                    ast.literal_eval(value)
                except (ValueError, TypeError, RecursionError, MemoryError):
                    raise InputError(f"{name} must be {KINDS[kinds[name]]}, got {ast.unparse(value)!r}") from None
            case ast.Assign(targets=[ast.Name(id=name)]):
                nearest = difflib.get_close_matches(name, kinds, 1, 0.5)
                hint = f"; did you mean {nearest[0]}?" if nearest else "."
                raise InputError(f"there is no parameter {name!r}{hint} The parameters are {', '.join(kinds)}")
            case _:
                raise InputError(f"a parameter is a name and a value, got {ast.unparse(statement)!r}")


def _check_before_run(lines: list[str]) -> list[str]:
    """A transformer of IPython: takes the lines of a cell that is about to run, and returns them as they are.

    Raises InputError for an injected cell that holds code: -p 'seed=f();seed' 1 would else call f.
    """
    if lines and lines[0] == INJECTED:
        shell = get_ipython()
        assert shell is not None  # IPython alone calls this
        _check_injected("".join(lines), _kinds(shell.user_ns))
    return lines


_shell = get_ipython()
if _shell is not None:
    _shell.input_transformers_cleanup.append(_check_before_run)
