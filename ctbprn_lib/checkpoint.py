"""Checkpoints of a training: written whole or not at all, read only if they are whole and of this very training."""

import hashlib
import json
import logging
import os
from contextlib import suppress
from pathlib import Path

from ctbprn_lib import InputError

log = logging.getLogger(__name__)


def write(path, tensors, of, about):
    """Write {name: CPU tensor} and about to path in one move; what was there is kept as the one before.

    of: what the training is, about: how far it is; both plain JSON values. Where nothing can be written (a full disk)
    that is logged, and the training goes on.
    """
    from safetensors.torch import save

    path = Path(path)
    new = path.with_suffix(f".{os.getpid()}.new")  # another may be at it, whose trial this one's was
    tensors, text = {name: t.contiguous() for name, t in tensors.items()}, json.dumps({"of": of, "about": about})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(new, "wb") as file:  # save_file's own files are 0600, whatever the umask
            file.write(save(tensors, metadata={"checkpoint": text, "sha256": digest(tensors, text)}))
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            os.replace(path, before(path))
        os.replace(new, path)
    except OSError as error:
        with suppress(OSError):
            new.unlink()
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
                log.warning("%s: not used as a checkpoint (%s)", place.name, error)
    return False


def remove(path):
    """Forget the checkpoints of a training that is done."""
    for place in (Path(path), before(path)):
        place.unlink(missing_ok=True)


def before(path):
    """Where the checkpoint before the last one is."""
    return Path(path).with_suffix(".before")


def digest(tensors, text=""):
    """SHA-256 of names, shapes, kinds and values of {name: CPU tensor}, and of text."""
    sha = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        sha.update(f"{name} {tuple(tensors[name].shape)} {tensors[name].dtype}".encode())
        sha.update(tensors[name].numpy().tobytes())
    return sha.hexdigest()


def _checked(place, of):
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(place), "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise InputError(f"not a whole safetensors file: {error}") from None
    text = metadata.get("checkpoint", "")
    if metadata.get("sha256") != digest(tensors, text):
        raise InputError("it does not match its SHA-256; the file is damaged")
    kept = json.loads(text)
    if kept["of"] != json.loads(json.dumps(of)):
        raise InputError("it is of another training")
    return tensors, kept["about"]
