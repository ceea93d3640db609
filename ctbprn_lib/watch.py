"""python -m ctbprn_lib.watch: seglearn's recordings of a smartwatch as runs/watch.npz.

The package seglearn holds them as a pickled array. Unpickling can run code of whoever made the file, so it happens
here alone, when somebody asks for it, and what is kept is a .npz file that can run nothing.
"""

import importlib.util
import sys
from pathlib import Path

import numpy as np

from ctbprn_lib import InputError, files, storage
from ctbprn_lib.compare import NEEDS

WINDOW = 128  # samples at 50 Hz: 2.6 seconds


def write(path: Path) -> int:
    """Cut the recordings into windows that do not overlap, with the subject as group; returns their number.

    Raises InputError if seglearn is not installed.
    """
    package = importlib.util.find_spec("seglearn")
    if package is None or not package.origin:
        raise InputError(f"the package seglearn is not installed; {NEEDS['seglearn']}")
    file = Path(package.origin).parent / "data" / "watch_dataset.npy"
    data = np.load(file, allow_pickle=True).item()
    x, y, groups = [], [], []
    for series, label, subject in zip(data["X"], data["y"], data["subject"], strict=True):
        for at in range(0, len(series) - WINDOW + 1, WINDOW):
            x.append(series[at : at + WINDOW])
            y.append(data["y_labels"][int(label)])
            groups.append(int(subject))
    areas = ["accelerometer"] * 3 + ["gyroscope"] * 3
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.whole(path) as new, open(new, "wb") as file_object:
        np.savez_compressed(file_object, x=np.array(x), y=np.array(y), groups=np.array(groups), areas=areas)
    return len(x)


if __name__ == "__main__":
    place = storage.REPORTS.parent / "runs" / "watch.npz"
    try:
        n = write(place)
    except InputError as error:
        sys.exit(str(error))
    print(f"{n} windows of {WINDOW} samples in runs/{place.name}")
