"""Checkpoints of a training.

A checkpoint is written whole or not at all. It is used only if it is whole and belongs to the same training.
"""

import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ctbprn_lib import InputError, files

log = logging.getLogger(__name__)


def write(
    path: str | Path, tensors: Mapping[str, torch.Tensor], identity: Mapping[str, Any], progress: Mapping[str, Any]
) -> None:
    """Write a checkpoint to path; the checkpoint that was there becomes the previous one.

    tensors: the state, on the CPU. identity: which training this is. progress: how far it is.
    identity and progress hold plain JSON values.
    If the file cannot be written (the disk is full), that is logged and no error is raised: the training goes on.
    """
    path = Path(path)
    text = json.dumps({"of": identity, "about": progress})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            os.replace(path, previous(path))
        files.write_tensors(path, tensors, text)
    except OSError as error:
        log.warning("%s: no checkpoint was kept (%s)", path, error.strerror)


def read(
    path: str | Path, identity: Mapping[str, Any], use: Callable[[dict[str, torch.Tensor], dict[str, Any]], object]
) -> bool:
    """Read the checkpoint at path and pass it to use; if it cannot be used, try the previous one.

    identity: which training this is, as it was given to write.
    use: takes tensors and progress. It raises ValueError, TypeError, KeyError, AttributeError or RuntimeError if they
    do not fit the training.
    Returns whether a checkpoint was used. The reason why one was not used is logged.
    """
    for file in filter(Path.exists, (Path(path), previous(path))):
        try:
            tensors, text = files.tensors(file)
            record = json.loads(text)
            if record["of"] != json.loads(json.dumps(identity)):
                raise InputError("it is of another training")
            use(tensors, record["about"])
            return True
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
            reason = str(error).removeprefix(f"{file}: ")
            log.warning("%s: not used as a checkpoint (%s)", file.name, reason)
    return False


def remove(path: str | Path) -> None:
    """Remove the checkpoints of a training that is done."""
    for file in filter(Path.exists, (Path(path), previous(path))):  # in a read-only folder no other can be removed
        file.unlink()


def previous(path: str | Path) -> Path:
    """The path of the checkpoint that was written before the one at path."""
    return Path(path).with_suffix(".before")
