"""Files and names from outside: read without pickle and in bounded memory, or refused with an InputError.  And files of
our own: written whole, and known again by their SHA-256.

What is returned is plain (arrays, series, cells, values); whether it makes sense is checked where it is used.
"""

from __future__ import annotations

import hashlib
import math
import os
import shlex
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from ctbprn_lib import InputError

if TYPE_CHECKING:
    import pandas as pd
    import torch

SMALL, GROWTH = 2**24, 100  # bytes that any file may unpack to, and how many times its own size a larger one may
LONGEST_YAML, DEEPEST_YAML = 10_000, 10  # characters, collections in collections


def too_large(n_bytes: float, of: float) -> bool:
    """Whether something made from of bytes may not take n_bytes: a small file must not fill the memory."""
    return n_bytes > max(SMALL, GROWTH * of)


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """Yields a path to write to; the file takes the place of path when all of it is there, and is gone if it fails."""
    path = Path(path)
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        yield new
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def write_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor], text: str) -> None:
    """Write {name: CPU tensor} and a text to a safetensors file that tensors reads; whole, or not at all."""
    from safetensors.torch import save

    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    content = save(tensors, metadata={"ctbprn": text, "sha256": digest(tensors, text)})
    with whole(path) as new, open(new, "wb") as file:  # save_file's own files are 0600, whatever the umask
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def tensors(path: str | Path) -> tuple[dict[str, torch.Tensor], str]:
    """({name: CPU tensor}, text) of a file of write_tensors; none of the values has been looked at."""
    from safetensors import SafetensorError, safe_open

    path = _file(path)
    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: not a whole safetensors file ({error})") from None
    if not {"ctbprn", "sha256"} <= set(metadata):
        raise InputError(f"{path}: a safetensors file, but not one that this library wrote")
    if digest(found, metadata["ctbprn"]) != metadata["sha256"]:
        raise InputError(f"{path}: the tensors do not match their SHA-256; the file is damaged")
    return found, metadata["ctbprn"]


def digest(tensors: dict[str, torch.Tensor], text: str) -> str:
    """SHA-256 of names, shapes, kinds and values of {name: CPU tensor}, and of text."""
    import torch

    sha = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        sha.update(f"{name} {tuple(tensors[name].shape)} {tensors[name].dtype}".encode())
        values = tensors[name].flatten().clone(memory_format=torch.contiguous_format)
        sha.update(values.view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def npz(path: str | Path, required: Sequence[str], optional: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """{name: array} of a .npz file that holds the arrays required and any of the optional ones."""
    file = _file(path)
    with (
        _reading(path, "a readable .npz of plain arrays"),
        file.open("rb") as stream,
        np.load(stream, allow_pickle=False) as archive,
    ):
        names = archive.files
        if not set(required) <= set(names) <= {*required, *optional} or len(names) > len(set(names)):
            raise InputError(
                f"{path}: expected the arrays {', '.join(required)} and optionally {', '.join(optional)}; "
                f"got {', '.join(sorted(names)) or 'none'}"
            )
        size = sum(member.file_size for member in archive.zip.infolist())  # zipfile reads no more than this
        if too_large(size, file.stat().st_size):
            raise InputError(
                f"{path}: unpacks to {size:,} bytes, more than {GROWTH} times its size; if that is meant, write it "
                "with numpy.savez, which does not compress"
            )
        return {name: _array(f"{path}: {name}.npy", name, archive) for name in names}


def _array(place: str, name: str, archive: Mapping[str, np.ndarray]) -> np.ndarray:
    with _reading(place, "a plain array"):
        try:
            array = archive[name]
        except ValueError as error:
            if "Object arrays" not in str(error):
                raise
            raise InputError(
                f"{place}: not a plain array but Python objects, as pandas makes of text, which are not read because "
                f"they can run code; save {name}.astype(str), or numbers"
            ) from None
        if not isinstance(array, np.ndarray):  # numpy returns the bytes of what is no array
            raise ValueError("it is no .npy")
    return array


def ts(path: str | Path) -> tuple[list[np.ndarray], list[str]]:
    """(series, labels) of a .ts file of the UEA archive: (T,F) arrays of equal F, and as many texts.

    Labels are what stands in the file, letter by letter.  Raises InputError for time stamps, for regression targets,
    and for a class that the line @classLabel does not declare.
    """
    file = _file(path)
    with _reading(path, "a readable .ts file"):
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    declared, start = _ts_header(path, lines)

    def refuse(n: int, text: str) -> NoReturn:
        raise InputError(f"{path}: line {n}: {text}")

    series: list[np.ndarray] = []
    labels: list[str] = []
    for n, line in enumerate(lines[start:], start + 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        *channels, label = line.split(":")
        if "(" in line.removesuffix(label):
            refuse(n, "time stamps are not read; write the values alone, at equal steps")
        try:
            rows = [[_ts_value(cell) for cell in channel.split(",")] for channel in channels]
        except ValueError as error:
            refuse(n, f"not a readable .ts file ({error})")
        if not rows or len({len(row) for row in rows}) > 1:
            refuse(n, f"expected channels of equal length and a class label, got {[len(row) for row in rows]} values")
        if series and len(rows) != series[0].shape[1]:
            refuse(n, f"{len(rows)} channels, where the first series has {series[0].shape[1]}")
        series.append(np.array(rows).T)
        labels.append(label.strip())
        if labels[-1] not in declared:
            refuse(n, f"the class {labels[-1]!r}, which @classLabel does not name; it names {', '.join(declared)}")
    if not series:
        raise InputError(f"{path}: expected series with a class label each, got 0")
    return series, labels


def _ts_header(path: str | Path, lines: Sequence[str]) -> tuple[list[str], int]:
    """(names of the classes, number of the first line of data) of a .ts file."""
    header: dict[str, list[str]] = {}
    key = ""
    for start, line in enumerate(lines, 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        key = words[0].lower()
        if key == "@data" or not key.startswith("@"):
            break
        if key in header:
            raise InputError(f"{path}: line {start}: {key} stands there twice")
        header[key] = words[1:]
    if key != "@data":
        raise InputError(f"{path}: not a readable .ts file: expected lines that begin with @, the last of them @data")
    answers = []
    for key in ("@timestamps", "@targetlabel", "@classlabel"):
        answer, *names = header.get(key) or ["false"]
        answers.append(answer.lower())
        if answers[-1] not in ("true", "false") or (names and key == "@timestamps"):
            text = " ".join([answer, *names])
            raise InputError(f"{path}: not a readable .ts file: {key} must be true or false, got {text!r}")
    if answers[0] == "true":
        raise InputError(f"{path}: it has time stamps (@timeStamps true), which are not read; write the values alone")
    if answers[1] == "true":
        raise InputError(f"{path}: it is a regression problem (@targetLabel true); expected classes (@classLabel true)")
    if answers[2] == "false" or not names:
        raise InputError(f"{path}: expected a line '@classLabel true' with the names of the classes")
    return names, start


def _ts_value(cell: str) -> float:
    """A number of a .ts file; NaN for "?"."""
    if "_" in cell:  # which Python's numbers may have
        raise ValueError(f"could not convert string to float: {cell!r}")
    return math.nan if cell.strip() == "?" else float(cell)


def mapping(path: str | Path, expected: str) -> dict[str, Any]:
    """{name: value} of a YAML file of plain values: no tags, no aliases, LONGEST_YAML characters at most.

    expected: what the names and values are, for the message where they are not there.
    """
    import yaml

    file = _file(path)
    with _reading(path, "a readable YAML file"):
        if file.stat().st_size > 4 * LONGEST_YAML or len(text := file.read_text(encoding="utf-8")) > LONGEST_YAML:
            raise ValueError(f"longer than {LONGEST_YAML:,} characters")
        depth = 0
        for event in yaml.parse(text, yaml.SafeLoader):  # as it is read: the loader takes minutes over a deep nest
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > DEEPEST_YAML:
                raise ValueError("it has an alias or too many levels")
        given = yaml.safe_load(text)
    if not isinstance(given, dict) or not given or not all(isinstance(name, str) for name in given):
        raise InputError(f"{path}: expected {expected}")
    return given


def table(
    path: str | Path,
    text: Sequence[str] = (),
    numbers: Mapping[str, float] | None = None,
    missing: Mapping[str, float] | None = None,
) -> pd.DataFrame:
    """A DataFrame of a CSV file with a header: the columns text as they are, then numbers.

    numbers: {column: largest value}, each cell empty (NaN) or a number from 0 on; None: every other column, any number.
    missing: {column: value} of columns that an older file need not have.
    """
    import pandas as pd

    file = _file(path)
    with _reading(path, "a readable CSV file"):
        content = pd.read_csv(
            file, dtype=dict.fromkeys(text, str), keep_default_na=False, na_values=[""], float_precision="round_trip"
        )
    content = content.assign(**{name: value for name, value in (missing or {}).items() if name not in content})
    wanted = [*text, *(numbers or ())]
    if not isinstance(content.index, pd.RangeIndex) or not set(wanted) <= set(content):  # rows with too many cells
        raise InputError(f"{path}: expected the columns {', '.join(wanted)}; got {', '.join(content)}")
    if numbers is None:
        numbers = dict.fromkeys((name for name in content if name not in text), math.inf)
    for name, largest in numbers.items():
        values, limits = content[name], "" if largest == math.inf else f" from 0 to {largest:g}"
        finite = values.dtype.kind in "iuf" and not np.isinf(values).any()
        if not finite or (limits and not values.dropna().between(0, largest).all()):
            raise InputError(f"{path}: {name} must hold numbers{limits}")
    return content[[*text, *numbers]].fillna(dict.fromkeys(text, ""))


def printable(text: object) -> str:
    """Text from outside on one line, with a sign in the place of control and bidirectional characters."""
    return "".join(c if c.isprintable() else "�" for c in str(text))


def word(text: object) -> str:
    """Text from outside as one word of a command on one line, so that it can end neither the word nor a code fence."""
    return shlex.quote(printable(text))


def _file(path: str | Path) -> Path:
    """path as a Path to a file: a pipe or a device would never end."""
    if not os.path.isfile(path):  # Path.is_file raises for a name that is too long
        where = "" if os.path.isabs(path) else f" in {os.getcwd()}, where relative paths begin"
        raise InputError(f"{path}: there is no such file{where}")
    return Path(path)


@contextmanager
def _reading(place: str | Path, what: str) -> Iterator[None]:
    """Parsers raise whatever they trip over, and warn where a caller can do nothing: say that place is not what."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{place}: not {what} ({type(error).__name__}: {' '.join(str(error).split())})") from None
