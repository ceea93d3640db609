"""Checkpoints of a training: written whole or not at all, read only if they are whole and of this very training."""

import json
import logging
import os
from pathlib import Path

from ctbprn_lib import InputError, files

log = logging.getLogger(__name__)


def write(path, tensors, of, about):
    """Write {name: CPU tensor} and about to path; what was there is kept as the one before.

    of: what the training is, about: how far it is; both plain JSON values. Where nothing can be written (a full disk)
    that is logged, and the training goes on.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            os.replace(path, before(path))
        files.write_tensors(path, tensors, json.dumps({"of": of, "about": about}))
    except OSError as error:
        log.warning("%s: no checkpoint was kept (%s)", path, error.strerror)


def read(path, of, use):
    """Call use(tensors, about) on the checkpoint at path, or if that is refused, on the one before.

    use raises ValueError, TypeError, KeyError, AttributeError or RuntimeError for content that does not fit.
    Returns whether one was used; why one was refused is logged.
    """
    for place in (Path(path), before(path)):
        if place.exists():
            try:
                use(*_checked(place, of))
                return True
            except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
                why = str(error).removeprefix(f"{place}: ")
                log.warning("%s: not used as a checkpoint (%s)", place.name, why)
    return False


def remove(path):
    """Forget the checkpoints of a training that is done."""
    for place in (Path(path), before(path)):
        if place.exists():  # in a folder that is read-only even a missing file cannot be removed
            place.unlink()


def before(path):
    """Where the checkpoint before the last one is."""
    return Path(path).with_suffix(".before")


def _checked(place, of):
    tensors, text = files.tensors(place)
    kept = json.loads(text)
    if kept["of"] != json.loads(json.dumps(of)):
        raise InputError("it is of another training")
    return tensors, kept["about"]
