"""Checks a notebook's parameters before anything is trained.

papermill accepts any name, code too, and keeps "false" as text. So the cell after the parameters calls
check(globals()), and the cell in between, which papermill writes, is read before IPython runs it.
"""

import ast
import difflib
import logging
import platform

import optuna
import torch
from IPython import get_ipython

from ctbprn_lib import InputError, __version__
from ctbprn_lib.device import PRECISIONS, device_name, resolve_device
from ctbprn_lib.search import OBJECTIVES, PRUNERS, SAMPLERS, commit
from ctbprn_lib.storage import storage_url, study_folder

AT_LEAST_ONE = {"n_trials", "n_steps", "n_replicas", "d", "rank", "batch_size", "n_samples", "max_steps", "n_top"}
AT_LEAST_ONE |= {"n_test", "n_sets", "n_reports", "n_power", "n_runs"}
AT_LEAST_TWO = {"n_seeds", "n_fresh_seeds", "n_spread_seeds", "n_curve_seeds", "n_pairs"}  # an interval needs two
ABOVE_ZERO = {"lr", "temperature", "run_seconds"}
CHOICES = {
    "protocol": ("replicated",),
    "objective": tuple(OBJECTIVES),
    "sampler": tuple(SAMPLERS),
    "pruner": tuple(PRUNERS),
    "precision": PRECISIONS,
}
INJECTED = "# Parameters\n"  # papermill's first line
KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def check(namespace):
    """Check the parameters of the notebook whose globals() these are, and print what will run.

    What a parameter may be follows from the parameters cell itself: its name and its annotation there.
    Raises InputError that names the parameter, what it may be and, for an unknown one, the nearest name.
    """
    known = _known(namespace)
    cells = reversed(namespace.get("In", ()))
    _check_injected(next((cell for cell in cells if cell.startswith(INJECTED)), ""), known)
    for name, kind in known.items():
        if name not in namespace:
            raise InputError(f"the parameter {name} is missing; it must be {KINDS[kind]}")
        _check_value(name, namespace[name], kind)
    logging.getLogger("IPKernelApp").addFilter(_not_of_ctrl_c)
    if get_ipython() is not None:  # a page shows the same cells whatever the user's own IPython shows
        get_ipython().ast_node_interactivity = "last_expr"
    values = {name: namespace[name] for name in known}
    where = device_name(resolve_device(values.get("device", "auto")))
    for name, value in values.items():
        print(f"{name:>14} = {value!r}")
    versions = f"torch {torch.__version__}, optuna {optuna.__version__}, Python {platform.python_version()}"
    print(f"\nctbprn {__version__} at commit {commit()}; {versions}; {where}")


def _not_of_ctrl_c(record):
    """False for the traceback that a kernel logs where papermill, ended by Ctrl-C, no longer listens to it."""
    return "Socket operation on non-socket" not in str(record.exc_info)


def _check_value(name, value, kind):
    def refuse(expected):
        raise InputError(f"{name} must be {expected}, got {value!r}")

    if kind is str and isinstance(value, (int, float)):
        refuse(f"text, which papermill takes for a number here: write -r {name} {value}")
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        refuse(KINDS[kind])
    if name in CHOICES and value not in CHOICES[name]:
        near = difflib.get_close_matches(value, CHOICES[name], 1, 0.5)
        refuse(f"one of {', '.join(CHOICES[name])}" + (f" (did you mean {near[0]}?)" if near else ""))
    if name in AT_LEAST_ONE and value < 1:
        refuse(f"{KINDS[kind]} of at least 1")
    if name in AT_LEAST_TWO and value < 2:
        refuse(f"{KINDS[kind]} of at least 2")
    if name in ABOVE_ZERO and not 0 < value < float("inf"):
        refuse("a number above 0")
    if name == "seq_len" and value < 0:
        refuse("a whole number above 0, or 0 for all tokens")
    if name == "seed" and not 0 <= value < 2**32:
        refuse("a whole number from 0 to 2**32 - 1")
    if name in ("study_name", "tested_by", "like") and value:
        study_folder(value)
    if name == "storage":
        storage_url("any", value)
    if name == "device":
        resolve_device(value)


def _known(namespace):
    return {name: kind for name, kind in namespace["__annotations__"].items() if kind in KINDS}


def _check_injected(source, known):
    """Refuse papermill's cell if it holds anything but names that are known and plain values."""
    try:
        statements = ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise InputError(f"a parameter is a name and a value, got {source.removeprefix(INJECTED)!r}") from None
    for statement in statements:
        targets = statement.targets if isinstance(statement, ast.Assign) else []  # of a = b = 1 there are two
        if not (len(targets) == 1 and isinstance(targets[0], ast.Name)):
            raise InputError(f"a parameter is a name and a value, got {ast.unparse(statement)!r}")
        name = targets[0].id
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, 0.5)
            hint = f"; did you mean {near[0]}?" if near else "."
            raise InputError(f"there is no parameter {name!r}{hint} The parameters are {', '.join(known)}")
        try:  # (papermill writes float('nan') too, which none of the parameters may be)
            ast.literal_eval(statement.value)
        except (ValueError, TypeError, RecursionError, MemoryError):
            raise InputError(f"{name} must be {KINDS[known[name]]}, got {ast.unparse(statement.value)!r}") from None


def _before_it_runs(lines):
    """IPython's cells on their way: what -p 'seed=f();seed' 1 makes of papermill's would call f."""
    if lines and lines[0] == INJECTED:
        _check_injected("".join(lines), _known(get_ipython().user_ns))
    return lines


if get_ipython() is not None:
    get_ipython().input_transformers_cleanup.append(_before_it_runs)
