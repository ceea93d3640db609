"""Other people's recordings as arrays: checked, split, and standardised for a network.

Each step raises InputError for what it cannot use. Letters: N samples, K areas, T tokens, F features.
"""

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from ctbprn_lib import InputError, files

SPLITS = ("train", "validation", "test")
Columns = tuple[tuple[int, ...], ...] | None  # the features of each area in recordings (N,T,F); None for (N,K,T,F)


@contextmanager
def errors_about(source: str) -> Iterator[None]:
    """Let the message of an InputError that is raised inside begin with source."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{source}: {error}") from None


class Preparation(NamedTuple):
    """How raw recordings become what a network sees: features sorted by area, each one standardised.

    center, scale: (K,F) float64 in the units of the recordings.  A feature whose scale is infinite is constant in the
    training samples (or fills up a smaller area), so it says nothing; it becomes 0 everywhere.
    """

    columns: Columns
    center: np.ndarray
    scale: np.ndarray

    @classmethod
    def of(cls, x: np.ndarray, mask: np.ndarray, columns: Columns) -> "Preparation":
        """Learn center and scale (mean and standard deviation) from the tokens of x that mask (N,T) says exist.

        A feature is constant if its values differ by no more than two roundings of the largest of them.
        Raises InputError where values of a feature differ by more than float64 can hold.
        """
        parts = [part[mask].astype(np.float64) for part in _areas(x, columns)]  # each (tokens of all samples, F)
        n_features = max(part.shape[1] for part in parts)
        self = cls(columns, np.zeros((len(parts), n_features)), np.full((len(parts), n_features), np.inf))
        rounding = np.finfo(x.dtype if x.dtype.kind == "f" else np.float64).eps
        for k, part in enumerate(parts):
            low, high = part.min(0), part.max(0)
            with np.errstate(over="ignore"):
                spread = high - low
            if np.isinf(spread).any():
                raise InputError("x: the values of a feature differ by more than float64 can hold")
            varies = spread > 2 * rounding * np.maximum(abs(low), abs(high))
            unit = np.where(varies, spread, 1)
            part = np.where(varies, (part - low) / unit, 0)  # in [0, 1], so that no unit is too small or too large
            self.center[k, : len(low)] = low + unit * part.mean(0)
            self.scale[k, : len(low)] = np.where(varies, unit * part.std(0), np.inf)
        return self

    def apply(self, x: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Raw x (N,T,F) or (N,K,T,F) -> (N,K,T,F) float32, 0 where mask (N,T) says that no token exists.

        Raises InputError for a value that lies too far from the training samples for float32.
        """
        (K, F), (N, T) = self.center.shape, mask.shape
        out = np.zeros((N, K, T, F), np.float32)
        for k, part in enumerate(_areas(x, self.columns)):
            f = part.shape[-1]
            with np.errstate(over="ignore", invalid="ignore"):  # tokens that do not exist may hold anything
                part = (part.astype(np.float64) - self.center[k, :f]) / self.scale[k, :f]
                out[:, k, :, :f] = np.where(mask[..., None], part, 0)
        if not np.isfinite(out).all():
            raise InputError(
                "x: a value lies so far from the training samples that float32 cannot hold it standardised"
            )
        return out


def checked(x: np.ndarray, lengths: Sequence | np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """x as an array of numbers (N,T,F) or (N,K,T,F), and mask (N,T), True where lengths (N,) says a token exists."""
    x = np.asarray(x)
    if x.dtype.kind not in "fiu":
        raise InputError(f"x must hold numbers, got dtype {x.dtype}")
    if x.ndim not in (3, 4):
        raise InputError(f"x must be (N,K,T,F) or (N,T,F), got shape {x.shape}")
    if min(x.shape) < 1:
        raise InputError(f"x is empty: {x.shape}")
    N, T = x.shape[0], x.shape[-2]
    lengths = np.full(N, T) if lengths is None else np.asarray(lengths)
    if lengths.shape != (N,) or lengths.dtype.kind not in "iu" or lengths.min() < 1 or lengths.max() > T:
        raise InputError(f"lengths must be ({N},) whole numbers in 1..{T}")
    if x.dtype == np.longdouble:
        with np.errstate(over="ignore"):  # what becomes infinite is refused later
            x = x.astype(np.float64)
    return x, np.arange(T) < lengths[:, None]


def _areas(x: np.ndarray, columns: Columns) -> list[np.ndarray]:
    """The recordings of each area in turn: (N,T,f), f its features."""
    return [x[..., list(f)] for f in columns] if columns else list(x.swapaxes(0, 1))


def sorted_areas(x: np.ndarray, areas: Sequence | np.ndarray | None) -> tuple[tuple[str, ...], Columns]:
    """(names, columns): the areas in order of first appearance, and the features of each where x is (N,T,F)."""
    if x.ndim == 4:
        areas = np.arange(1, x.shape[1] + 1) if areas is None else np.asarray(areas)
        if areas.shape != x.shape[1:2]:
            raise InputError(f"areas must name the {x.shape[1]} areas of x, got shape {areas.shape}")
        names = _names(areas, "areas")
        return names if areas.dtype.kind in "US" else tuple(f"area {name}" for name in names), None
    F = x.shape[2]
    if areas is None:
        raise InputError(f"x {x.shape} is (N,T,F) and needs areas: the area of each of the {F} features")
    areas = np.asarray(areas)
    if areas.shape != (F,):
        raise InputError(f"areas must name the area of each of the {F} features, got shape {areas.shape}")
    columns = defaultdict(list)
    for f, name in enumerate(_names(areas, "areas")):
        columns[name].append(f)
    shape = (x.shape[0], len(columns), x.shape[1], max(map(len, columns.values())))
    if files.too_large(4 * math.prod(shape), 4 * x.size):
        raise InputError(
            f"areas differ too much in size: padded to the largest, {shape[3]} features, x would be {shape}"
        )
    return tuple(columns), tuple(map(tuple, columns.values()))


def refuse_missing_values(x: np.ndarray, mask: np.ndarray, names: Sequence[str], columns: Columns) -> None:
    """Refuse values that are missing or infinite, with their number and the place of the first."""
    places = []
    for k, part in enumerate(_areas(x, columns)):
        found = np.argwhere(~np.isfinite(part) & mask[..., None])
        places += [(len(found), n, k, t, f) for n, t, f in found[:1]]
    if places:
        _, n, k, t, f = min(places, key=lambda place: place[1:])
        raise InputError(
            f"x has {sum(place[0] for place in places)} missing or infinite values, the first at sample {n}, "
            f"{names[k]}, token {t}, feature {f}; fill or drop them first"
        )


def numbered_classes(y: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(classes, y): the labels there are, in order, and the number of each sample's."""
    y = np.asarray(y)
    if y.shape != (len(x),):
        raise InputError(f"y must be ({len(x)},) for x {x.shape}, got shape {y.shape}")
    _names(y[:1], "y")
    classes, y = np.unique(y, return_inverse=True)
    names = _names(classes, "y")
    if len(classes) < 2:
        raise InputError("y holds a single class; at least two are needed")
    return np.array(names) if classes.dtype.kind == "S" else classes, y


def _names(values: np.ndarray, field: str) -> tuple[str, ...]:
    """Areas, classes or groups as text."""
    if values.dtype == object:
        raise InputError(f"{field} holds Python objects, as pandas makes of text; give {field}.astype(str)")
    if values.dtype.kind not in "iuUSb":
        raise InputError(f"{field} must hold whole numbers or strings, got dtype {values.dtype}")
    try:
        names = tuple(v.decode() if isinstance(v, bytes) else str(v) for v in values.tolist())
        "".join(names).encode()  # numpy also holds code points that are no text
    except (ValueError, SystemError):  # the latter for code points beyond the last
        raise InputError(f"{field} must hold whole numbers or strings, got something that is no text") from None
    return names


def completed_split(
    split: Sequence | np.ndarray | None, y: np.ndarray, groups: Sequence | np.ndarray | None
) -> np.ndarray:
    """(N,) of split names, completed by a draw, stratified by class, that depends on labels and groups alone."""
    if groups is not None:
        groups = np.asarray(groups)
        if groups.shape != y.shape:
            raise InputError(f"groups must be ({len(y)},), the group of each sample, got shape {groups.shape}")
        groups = np.array(_names(groups, "groups"))
    if split is None:
        split = np.full(len(y), "train", dtype="U10")
        plan = {"validation": 0.2, "test": 0.2}
    else:
        split = np.asarray(split)
        if split.shape != y.shape or split.dtype.kind != "U" or not np.isin(split, SPLITS).all():
            raise InputError(f"split must be ({len(y)},) of {', '.join(SPLITS)}")
        split = split.astype("U10")
        plan = {} if (split == "validation").any() else {"validation": 1 / 3}
        for group in () if groups is None else np.unique(groups):
            sides = [name for name in SPLITS if (split[groups == group] == name).any()]
            if len(sides) > 1:
                raise InputError(
                    f"group {str(group)!r} has samples in {' and in '.join(sides)}; a group belongs on one side"
                )
    free = np.flatnonzero(split == "train")
    if plan and groups is not None:
        split[free] = _split_groups(y[free], groups[free], plan)
    elif plan:
        rng = np.random.default_rng(0)
        for c in np.unique(y):
            left = rng.permutation(free[y[free] == c])
            for name, n in [(name, round(share * len(left))) for name, share in plan.items()]:
                split[left[:n]], left = name, left[n:]
    for name in SPLITS:
        if not (split == name).any():
            raise InputError(f"no sample is left for {name}; give more samples or a split that has some")
    return split


def _split_groups(y: np.ndarray, groups: np.ndarray, plan: dict[str, float]) -> np.ndarray:
    """(N,) of split names: whole groups, the largest first, each where it is needed most.

    That is where it brings classes that a split lacks, else where the classes then fit their shares best.

    plan: {"validation": share, ...}; the rest is training.
    """
    names, members = np.unique(groups, return_inverse=True)
    shares = {"train": 1 - sum(plan.values())} | plan
    if len(names) < len(shares):
        raise InputError(
            f"groups: {len(names)} cannot be divided among {', '.join(shares)}; give more groups, or a split"
        )
    counts = np.zeros((len(names), y.max() + 1))  # samples of each class in each group
    np.add.at(counts, (members, y), 1)
    totals = np.maximum(counts.sum(0), 1)
    wanted = np.array(list(shares.values()))[:, None]
    have = np.zeros((len(shares), len(totals)))  # share of each class that each split has so far
    order = np.random.default_rng(0).permutation(len(names))
    order = order[np.argsort(-counts[order].sum(1), kind="stable")]
    side = np.zeros(len(names), int)
    for place, group in enumerate(order):
        empty = np.flatnonzero(have.sum(1) == 0)
        if len(empty) == len(order) - place:  # each group that is left is needed by a split that has none
            side[group] = empty[0]
        else:
            then = have + np.eye(len(shares))[..., None] * (counts[group] / totals)  # row s: if the group goes to s
            misfit = ((then - wanted) ** 2).sum((1, 2)).round(9)
            # a class that a split lacks counts most, then the shares, then how full a split is
            side[group] = np.lexsort((have.sum(1), misfit, (then == 0).sum((1, 2))))[0]
        have[side[group]] += counts[group] / totals
    return np.array(list(shares), dtype="U10")[side[members]]


def refuse_missing_classes(y: np.ndarray, split: np.ndarray, class_names: Sequence[str], grouped: bool) -> None:
    """Refuse a class that no training sample has, and a held-out set of a single class."""
    absent = np.setdiff1d(np.arange(len(class_names)), y[split == "train"])
    if len(absent):
        reason = "; its groups are whole, and too few for every split" if grouped else ""
        raise InputError(f"y: class {class_names[absent[0]]!r} has no training sample{reason}")
    for name in SPLITS[1:]:
        present = np.unique(y[split == name])
        if len(present) == 1:
            raise InputError(
                f"all {name} samples are of one class, {class_names[present[0]]!r}, so a score would say nothing; give "
                "another split, or more samples or groups of each class"
            )


def count_copies(x: np.ndarray, mask: np.ndarray, split: np.ndarray, grouped: bool) -> dict[str, int]:
    """{split: its samples that are exact copies of a sample in another split}; refuses many, unless grouped."""
    same = defaultdict(list)  # samples by their content
    for n, length in enumerate(mask.sum(1)):
        tokens = np.ascontiguousarray(x[n, ..., :length, :]) + 0  # and -0.0 becomes 0.0
        same[hashlib.blake2b(tokens.tobytes()).digest()].append(n)
    twins, counts = {}, {}
    for samples in same.values():
        for n in samples:
            other = next((m for m in samples if split[m] != split[n]), None)
            if other is not None:
                twins[n] = other
    for name in SPLITS:
        copies = sorted(n for n in twins if split[n] == name)
        counts[name], size = len(copies), (split == name).sum()
        if not grouped and len(copies) > 0.01 * size:
            a, b = copies[0], twins[copies[0]]
            raise InputError(
                f"{len(copies)} of the {size} {name} samples are exact copies of samples in another split, the first "
                f"pair is {a} ({split[a]}) and {b} ({split[b]}); a score would measure memory. Drop the copies, or "
                "give groups (what samples have in common), which are kept on one side"
            )
    return counts
