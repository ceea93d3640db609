"""Where batches come from: the routing task of MODEL section 3, your own arrays, UEA files.

Every task offers the same few things:
- n_areas K, n_features F, n_tokens T, n_classes C, area_names (K,), class_names (C,) and classes (C,) as in the data;
- description: what makes two tasks the same; given: the name under which it was loaded;
- draw: a training batch for R replicas; fixed: a held-out set that never changes;
- baselines: test accuracy of simple rules; facts: what a reader of a score should know about the samples;
- preparation: how raw recordings become what a network sees.
seq_len is how many of the first tokens the network sees; labels always come from all of them.
"""

import hashlib
import importlib.util
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import torch

from ctbprn_lib import InputError, files

SPLITS = ("train", "validation", "test")
INTERIM_SAMPLES = 256  # of the split "interim": few validation samples, the same for all trainings, for the pruner
SPLIT_KEYS = {"validation": 1, "test": 3}  # of the routing task's seeds; the stem was chosen on samples made from key 2
CHUNK = 256  # samples of a fixed set drawn at once; part of what makes the set the same everywhere
UEA_AREAS = {"BasicMotions": ["accelerometer"] * 3 + ["gyroscope"] * 3}


class Batch(NamedTuple):
    """x (R,B,K,T,F); y (R,B) classes; mask (R,B,T) True where a token exists, or None; area (R,B) true area, or None.

    In a fixed set R is 1: all replicas sit the same exam.
    """

    x: torch.Tensor
    y: torch.Tensor
    mask: torch.Tensor | None = None
    area: torch.Tensor | None = None


class RoutingTask:
    """Find which area carries a signal, and say its sign (MODEL section 3).

    x = noise * N(0,1); one area also gets v ~ N(0, signal^2) on its first F // 4 features at every token; the label
    says whether those features of that area sum to more than 0 over all tokens.
    """

    n_classes = 2
    classes = np.arange(2)
    class_names = ("sum below zero", "sum above zero")
    given = "routing"
    facts: dict = {}  # noqa: RUF012 (nothing to say: every sample is drawn afresh)

    def __init__(self, n_areas=2, n_features=64, n_tokens=128, signal=0.5, noise=0.7):
        if min(n_areas, n_tokens) < 1 or n_features < 4:
            raise InputError(
                "the routing task needs n_areas and n_tokens of at least 1 and n_features of at least 4, "
                f"got {n_areas}, {n_tokens} and {n_features}"
            )
        self.n_areas, self.n_features, self.n_tokens = n_areas, n_features, n_tokens
        self.signal, self.noise = signal, noise
        self.n_biased = n_features // 4
        self.area_names = tuple(f"area {k + 1}" for k in range(n_areas))
        self.description = dict(task="routing", n_areas=n_areas, n_features=n_features, n_tokens=n_tokens,
                                signal=signal, noise=noise)  # fmt: skip
        self.preparation = Preparation.unchanged(n_areas, n_features)
        self._kept = {}

    def __getstate__(self) -> dict:
        """What another process needs; it draws the validation set itself."""
        return self.__dict__ | {"_kept": {}}

    def draw(self, n_replicas: int, batch_size: int, generator: torch.Generator, seq_len: int | None = None) -> Batch:
        """A fresh training batch for each replica, on the generator's device; only seq_len tokens are drawn."""
        seq_len = seq_len or self.n_tokens
        R, K, B, T, F, q = n_replicas, self.n_areas, batch_size, seq_len, self.n_features, self.n_biased
        kw = dict(generator=generator, device=generator.device)
        x = torch.randn(R, K, B, T, F, **kw).mul_(self.noise)
        area = torch.randint(0, K, (R, B), **kw)
        v = torch.randn(R, 1, B, 1, q, **kw).mul_(self.signal)
        carries = (area[:, None] == torch.arange(K, device=generator.device)[:, None])[..., None, None]  # (R,K,B,1,1)
        x[..., :q].add_(carries * v)
        total = (x[..., :q].sum((-2, -1)) * carries[..., 0, 0]).sum(1)  # (R,B) over the tokens seen
        unseen = self.n_tokens - seq_len
        if unseen:  # the sum over the tokens not seen is one normal number; no need to draw them one by one
            rest = torch.randn(R, B, **kw).mul_(self.noise * (unseen * q) ** 0.5)
            total = total + unseen * v.sum((1, 3, 4)) + rest
        return Batch(x.transpose(1, 2), (total > 0).long(), None, area)

    def fixed(
        self, split: str, n_samples: int, seq_len: int | None = None, device: str | torch.device = "cpu"
    ) -> Iterator[Batch]:
        """Yield the first n_samples of the validation or test set as batches with R = 1.

        split: "validation", "test", or "interim", which is the first INTERIM_SAMPLES of the validation set.

        Chunk i is drawn on the CPU from a seed made of the split and i, so the set is the same on every machine, for
        every n_samples and every seq_len. The validation set is kept in memory, since each trial asks for it.
        """
        if split == "interim":
            split, n_samples = "validation", min(n_samples, INTERIM_SAMPLES)
        for i in range(-(-n_samples // CHUNK)):
            batch = self._kept.get((split, i, device))
            if batch is None:
                seed = np.random.SeedSequence([SPLIT_KEYS[split], i]).generate_state(1, np.uint64)[0]
                batch = self.draw(1, CHUNK, torch.Generator().manual_seed(int(seed)))
                batch = _map(batch, lambda t: t.to(device))
                if split == "validation":
                    self._kept[split, i, device] = batch
            yield _map(_first_tokens(batch, seq_len), lambda t: t[:, : n_samples - i * CHUNK])  # noqa: B023

    def baselines(self, n_samples: int = 8192) -> dict[str, float]:
        """Test accuracy of rules that are not learnt.

        The majority class; the sign of the sum over both areas; the ceiling: the area first, then its sign.
        """
        hits = {"majority class": [], "linear rule": [], "ceiling": []}
        for batch in self.fixed("test", n_samples):
            sums = batch.x[0, ..., : self.n_biased].sum(2)  # (B,K,q)
            found = sums.square().sum(-1).argmax(-1)
            sign_of_found = sums.sum(-1).gather(1, found[:, None])[:, 0] > 0
            hits["majority class"].append(batch.y[0] == 1)
            hits["linear rule"].append((sums.sum((1, 2)) > 0).long() == batch.y[0])
            hits["ceiling"].append(sign_of_found.long() == batch.y[0])
        means = {rule: torch.cat(hit).double().mean().item() for rule, hit in hits.items()}
        share = means["majority class"]
        return means | {"majority class": max(share, 1 - share)}


class Preparation(NamedTuple):
    """How raw recordings become what a network sees: features sorted by area, each one standardised.

    columns: for recordings (N,T,F), the features of each area; None for recordings (N,K,T,F).
    center, scale: (K,F) float64 in the units of the recordings.  A feature whose scale is infinite is constant in the
    training samples (or fills up a smaller area), so it says nothing; it becomes 0 everywhere.
    """

    columns: tuple[tuple[int, ...], ...] | None
    center: np.ndarray
    scale: np.ndarray

    @classmethod
    def unchanged(cls, n_areas: int, n_features: int) -> "Preparation":
        """For recordings (N,K,T,F) that a network sees as they are."""
        return cls(None, np.zeros((n_areas, n_features)), np.ones((n_areas, n_features)))

    @classmethod
    def of(cls, x: np.ndarray, mask: np.ndarray, columns: tuple[tuple[int, ...], ...] | None) -> "Preparation":
        """Learn center and scale (mean and standard deviation) from the tokens of x that mask (N,T) says exist.

        A feature is constant if its values differ by no more than two roundings of the largest of them.
        Raises OverflowError where values of a feature differ by more than float64 can hold.
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
                raise OverflowError
            varies = spread > 2 * rounding * np.maximum(abs(low), abs(high))
            unit = np.where(varies, spread, 1)
            part = np.where(varies, (part - low) / unit, 0)  # in [0, 1], so that no unit is too small or too large
            self.center[k, : len(low)] = low + unit * part.mean(0)
            self.scale[k, : len(low)] = np.where(varies, unit * part.std(0), np.inf)
        return self

    def apply(self, x: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Raw x (N,T,F) or (N,K,T,F) -> (N,K,T,F) float32, 0 where mask (N,T) says that no token exists.

        A value too large for float32 becomes infinite.
        """
        (K, F), (N, T) = self.center.shape, mask.shape
        out = np.zeros((N, K, T, F), np.float32)
        for k, part in enumerate(_areas(x, self.columns)):
            f = part.shape[-1]
            with np.errstate(over="ignore", invalid="ignore"):  # tokens that do not exist may hold anything
                part = (part.astype(np.float64) - self.center[k, :f]) / self.scale[k, :f]
                out[:, k, :, :f] = np.where(mask[..., None], part, 0)
        return out


class ArrayTask:
    """A classification task from arrays.

    x (N,K,T,F), or (N,T,F) with areas (F,) naming the area of each feature; y (N,) labels; split (N,) of "train",
    "validation" and "test", or None for a stratified 60/20/20; without any "validation" a third of the training
    samples, stratified, is set aside for it. lengths (N,): tokens that exist, where sequences are unequal.
    groups (N,): what samples have in common (subject, session, recording); a group is never on two sides of a split.
    Features are standardised in float64 with the training samples' statistics only, so the unit does not matter.
    source: what the task is called; given: the name under which load_task found it.
    Raises InputError that names source and says what was expected, also where more than 1 % of a split are exact
    copies of samples in another one (with groups they are only counted).

    facts: what a reader of a score should know about the samples, as plain values (see _facts).
    """

    def __init__(
        self,
        x: np.ndarray,
        y: np.ndarray,
        areas: Sequence | np.ndarray | None = None,
        split: Sequence | np.ndarray | None = None,
        lengths: Sequence | np.ndarray | None = None,
        groups: Sequence | np.ndarray | None = None,
        source: str = "arrays",
        given: str = "",
    ) -> None:
        def refuse(text: str) -> NoReturn:
            raise InputError(f"{source}: {text}")

        x, mask = checked_recordings(x, lengths, refuse)
        y = np.asarray(y)
        N = len(x)
        if y.shape != (N,):
            refuse(f"y must be ({N},) for x {x.shape}, got shape {y.shape}")
        self.area_names, columns = _area_names(x, None if areas is None else np.asarray(areas), refuse)
        refuse_missing(x, mask, self.area_names, columns, refuse)
        classes, y = _classes(y, refuse)
        self.classes, self.class_names = classes, tuple(str(label) for label in classes.tolist())
        groups = None if groups is None else _groups(np.asarray(groups), N, refuse)
        split = _splits(split, y, groups, refuse)
        train = split == "train"
        if len(set(y[train])) < len(classes):
            absent = sorted(set(range(len(classes))) - set(y[train]))[0]
            reason = "" if groups is None else "; its groups are whole, and too few for every split"
            refuse(f"y: class {self.class_names[absent]!r} has no training sample{reason}")
        for name in SPLITS[1:]:
            if len(set(y[split == name])) == 1:
                only = self.class_names[y[split == name][0]]
                refuse(
                    f"all {name} samples are of one class, {only!r}, so a score would say nothing; give another split, "
                    "or more samples or groups of each class"
                )
        copies, pairs = _copies(x, mask, split)
        for name, n in copies.items():
            if groups is None and n > 0.01 * (split == name).sum():
                a, b = pairs[name]
                refuse(
                    f"{n} of the {(split == name).sum()} {name} samples are exact copies of samples in another split, "
                    f"the first pair is {a} ({split[a]}) and {b} ({split[b]}); a score would measure memory. Drop the "
                    "copies, or give groups (what samples have in common), which are kept on one side"
                )

        try:
            self.preparation = Preparation.of(x[train], mask[train], columns)
        except OverflowError:
            refuse("x: the values of a feature differ by more than float64 can hold")
        x = self.preparation.apply(x, mask)
        if not np.isfinite(x).all():
            refuse(
                "x: a held-out sample lies so far from the training samples that float32 cannot hold it standardised"
            )
        self.n_areas, self.n_tokens, self.n_features = x.shape[1:]
        self.n_classes, self.given = len(classes), given or source
        self.n_samples = {name: int((split == name).sum()) for name in SPLITS}
        content = b"".join(array.tobytes() for array in (x, y, mask, split))
        self.description = dict(
            task=source, n_areas=self.n_areas, n_features=self.n_features, n_tokens=self.n_tokens,
            n_classes=self.n_classes, n_samples=self.n_samples, sha256=hashlib.sha256(content).hexdigest(),
        )  # fmt: skip
        self.facts = _facts(self, y, split, copies, grouped=groups is not None)
        self._parts = {}
        for name in SPLITS:
            part = split == name
            tensors = (x[part].swapaxes(0, 1), y[part], None if mask.all() else mask[part])  # x: (K,N,T,F)
            self._parts[name] = tuple(None if a is None else torch.from_numpy(np.ascontiguousarray(a)) for a in tensors)
        x, y, mask = self._parts["validation"]
        some = np.random.default_rng(0).permutation(len(y))[:INTERIM_SAMPLES]
        self._parts["interim"] = x[:, some], y[some], None if mask is None else mask[some]

    def __getstate__(self) -> dict:
        """Plain arrays for another process: torch would send tensors through /dev/shm, which may be small."""
        parts = {name: self._parts[name] for name in (*SPLITS, "interim")}
        arrays = {name: tuple(None if t is None else t.numpy() for t in part) for name, part in parts.items()}
        return self.__dict__ | {"_parts": arrays}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        for name, part in self._parts.items():
            self._parts[name] = tuple(None if a is None else torch.from_numpy(a) for a in part)

    def draw(self, n_replicas: int, batch_size: int, generator: torch.Generator, seq_len: int | None = None) -> Batch:
        """A training batch for each replica, drawn with replacement, on the generator's device."""
        x, y, mask = self._on("train", generator.device)
        n = torch.randint(0, len(y), (n_replicas, batch_size), generator=generator, device=generator.device)
        batch = Batch(x[:, n].permute(1, 2, 0, 3, 4), y[n], None if mask is None else mask[n])
        return _first_tokens(batch, seq_len)

    def fixed(
        self, split: str, n_samples: int | None = None, seq_len: int | None = None, device: str | torch.device = "cpu"
    ) -> Iterator[Batch]:
        """Yield all validation or test samples as batches with R = 1.

        split: "validation", "test", or "interim", which is INTERIM_SAMPLES of the validation samples taken at random.

        n_samples, which a task that makes its own samples obeys, is not used: the first recordings of a file may be of
        one class or one subject.
        """
        x, y, mask = self._on(split, device)
        for i in range(0, len(y), CHUNK):
            part = slice(i, i + CHUNK)
            batch = Batch(x[:, part].transpose(0, 1)[None], y[None, part], None if mask is None else mask[None, part])
            yield _first_tokens(batch, seq_len)

    def baselines(self) -> dict[str, float]:
        """Test accuracy without the network: the largest class, and ridge regression on each feature's mean.

        Ridge's coefficients are found iteratively (LSQR) or by a factorisation, whichever takes less arithmetic, so
        that thousands of features cost no more than a training.
        """
        from sklearn.linear_model import RidgeClassifier  # takes a second to import

        def means(split: str) -> tuple[np.ndarray, np.ndarray]:
            x, y, mask = self._on(split, "cpu")
            m = x.mean(2) if mask is None else x.sum(2) / mask.sum(1)[:, None]  # (K,N,F)
            return m.transpose(0, 1).flatten(1).double().numpy(), y.numpy()

        (a, y), (a_test, y_test) = means("train"), means("test")
        few_classes = 200 * self.n_classes < min(a.shape)  # LSQR takes some 50 products with a for each class
        rule = RidgeClassifier(solver="lsqr" if few_classes else "cholesky", tol=1e-6).fit(a, y)
        return {
            "majority class": float((y_test == np.bincount(y).argmax()).mean()),
            "linear rule": float(rule.score(a_test, y_test)),
        }

    def _on(self, split, device):
        if (split, str(device)) not in self._parts:
            moved = tuple(None if t is None else t.to(device) for t in self._parts[split])
            self._parts[split, str(device)] = moved
        return self._parts[split, str(device)]


def load_task(name: str) -> "RoutingTask | ArrayTask":
    """The task that name says: "routing", "uea:BasicMotions", "uea:<folder>" or the path of a .npz file.

    A .npz holds x, y and, as ArrayTask has them, areas, split, lengths and groups.
    Raises InputError for anything else, naming the file and the field.
    """
    if name == "routing":
        return RoutingTask()
    if name.startswith("uea:"):
        return _load_uea(name)
    if not name.lower().endswith(".npz"):
        raise InputError(f'task {name!r}: expected "routing", "uea:<name or folder>" or the path of a .npz file')
    arrays = files.npz(name, ("x", "y"), ("areas", "split", "lengths", "groups"))
    return ArrayTask(**arrays, source=_text(Path(name).name), given=name)


def _load_uea(given):
    """A UEA archive problem: one that ships with aeon, or a folder with NAME_TRAIN.ts and NAME_TEST.ts."""
    name = given.removeprefix("uea:")
    folder = Path(name)
    if not name or not os.path.isdir(folder):
        aeon = importlib.util.find_spec("aeon")  # not imported, which takes seconds
        folder = aeon and Path(aeon.origin).parent / "datasets" / "data" / name
    if not name or not folder or not os.path.isdir(folder):
        missing = "" if folder else " (the first two need the aeon package: pip install 'ctbprn[uea]')"
        raise InputError(
            f"task {given}: expected BasicMotions, JapaneseVowels or a folder with its .ts files{missing}; a "
            f"relative folder is looked for in {os.getcwd()}"
        )
    folder = folder.resolve()  # "." has no name
    paths = [folder / f"{folder.name}_{part}.ts" for part in ("TRAIN", "TEST")]
    (train, train_y), (test, test_y) = (files.ts(path) for path in paths)
    series, n_features = train + test, train[0].shape[1]
    if test[0].shape[1] != n_features:
        raise InputError(f"{paths[1]}: {test[0].shape[1]} channels, where the training file has {n_features}")
    lengths = np.array([len(s) for s in series])
    n_bytes = 4 * len(series) * lengths.max() * n_features
    if files.too_large(n_bytes, 4 * lengths.sum() * n_features):
        raise InputError(f"{folder}: padded to the longest series, {lengths.max()} tokens, it is {n_bytes:,} bytes")
    x = np.zeros((len(series), lengths.max(), n_features))
    for n, s in enumerate(series):
        x[n, : len(s)] = s
    halves = ["first half" if f < -(-n_features // 2) else "second half" for f in range(n_features)]
    return ArrayTask(
        x,
        np.array(train_y + test_y),
        areas=UEA_AREAS.get(folder.name, halves),
        split=np.repeat(["train", "test"], [len(train), len(test)]),
        lengths=lengths,
        source=f"uea:{_text(folder.name)}",
        given=given,
    )


def checked_recordings(
    x: np.ndarray, lengths: Sequence | np.ndarray | None, refuse: Callable[[str], NoReturn]
) -> tuple[np.ndarray, np.ndarray]:
    """x as an array of numbers (N,T,F) or (N,K,T,F), and mask (N,T), True where lengths (N,) says a token exists."""
    x = np.asarray(x)
    if x.dtype.kind not in "fiu":
        refuse(f"x must hold numbers, got dtype {x.dtype}")
    if x.ndim not in (3, 4):
        refuse(f"x must be (N,K,T,F) or (N,T,F), got shape {x.shape}")
    if min(x.shape) < 1:
        refuse(f"x is empty: {x.shape}")
    N, T = x.shape[0], x.shape[-2]
    lengths = np.full(N, T) if lengths is None else np.asarray(lengths)
    if lengths.shape != (N,) or lengths.dtype.kind not in "iu" or lengths.min() < 1 or lengths.max() > T:
        refuse(f"lengths must be ({N},) whole numbers in 1..{T}")
    if x.dtype == np.longdouble:
        with np.errstate(over="ignore"):  # what becomes infinite is refused later
            x = x.astype(np.float64)
    return x, np.arange(T) < lengths[:, None]


def _areas(x, columns):
    """The recordings of each area in turn: (N,T,f), f its features."""
    return [x[..., list(f)] for f in columns] if columns else list(x.swapaxes(0, 1))


def _area_names(x, areas, refuse):
    """(names, columns): the areas in order of first appearance, and the features of each where x is (N,T,F)."""
    if x.ndim == 4:
        areas = np.arange(1, x.shape[1] + 1) if areas is None else areas
        if areas.shape != x.shape[1:2]:
            refuse(f"areas must name the {x.shape[1]} areas of x, got shape {areas.shape}")
        names = _names(areas, "areas", refuse)
        return names if areas.dtype.kind in "US" else tuple(f"area {name}" for name in names), None
    F = x.shape[2]
    if areas is None:
        refuse(f"x {x.shape} is (N,T,F) and needs areas: the area of each of the {F} features")
    if areas.shape != (F,):
        refuse(f"areas must name the area of each of the {F} features, got shape {areas.shape}")
    labels = _names(areas, "areas", refuse)
    names = tuple(dict.fromkeys(labels))
    columns = tuple(tuple(f for f in range(F) if labels[f] == name) for name in names)
    shape = (x.shape[0], len(names), x.shape[1], max(map(len, columns)))
    if files.too_large(4 * math.prod(shape), 4 * x.size):
        refuse(f"areas differ too much in size: padded to the largest, {shape[3]} features, x would be {shape}")
    return names, columns


def refuse_missing(
    x: np.ndarray,
    mask: np.ndarray,
    names: Sequence[str],
    columns: tuple[tuple[int, ...], ...] | None,
    refuse: Callable[[str], NoReturn],
) -> None:
    """Refuse values that are missing or infinite, with their number and the place of the first."""
    places = []
    for k, part in enumerate(_areas(x, columns)):
        found = np.argwhere(~np.isfinite(part) & mask[..., None])
        places += [(len(found), n, k, t, f) for n, t, f in found[:1]]
    if places:
        _, n, k, t, f = min(places, key=lambda place: place[1:])
        refuse(
            f"x has {sum(place[0] for place in places)} missing or infinite values, the first at sample {n}, "
            f"{names[k]}, token {t}, feature {f}; fill or drop them first"
        )


def _classes(y, refuse):
    """(classes, y): the labels there are, in order, and the number of each sample's."""
    _names(y[:1], "y", refuse)
    classes, y = np.unique(y, return_inverse=True)
    names = _names(classes, "y", refuse)
    if len(classes) < 2:
        refuse("y holds a single class; at least two are needed")
    return np.array(names) if classes.dtype.kind == "S" else classes, y


def _names(values, field, refuse):
    """Areas, classes or groups as text."""
    if values.dtype == object:
        refuse(f"{field} holds Python objects, as pandas makes of text; give {field}.astype(str)")
    if values.dtype.kind not in "iuUSb":
        refuse(f"{field} must hold whole numbers or strings, got dtype {values.dtype}")
    try:
        names = tuple(v.decode() if isinstance(v, bytes) else str(v) for v in values.tolist())
        "".join(names).encode()  # numpy also holds code points that are no text
    except (ValueError, SystemError):  # the latter for code points beyond the last
        refuse(f"{field} must hold whole numbers or strings, got something that is no text")
    return names


def _text(name):
    """The name of a file or folder that goes into the record of a study."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise InputError(f"the name {name!r} is no text in UTF-8; rename the file") from None
    return name


def _groups(groups, n_samples, refuse):
    """(N,) group names as text."""
    if groups.shape != (n_samples,):
        refuse(f"groups must be ({n_samples},), the group of each sample, got shape {groups.shape}")
    return np.array(_names(groups, "groups", refuse))


def _splits(split, y, groups, refuse):
    """(N,) of split names, completed by a draw, stratified by class, that depends on labels and groups alone."""
    if split is None:
        split = np.full(len(y), "train", dtype="U10")
        plan = {"validation": 0.2, "test": 0.2}
    else:
        split = np.asarray(split)
        if split.shape != y.shape or split.dtype.kind != "U" or not np.isin(split, SPLITS).all():
            refuse(f"split must be ({len(y)},) of {', '.join(SPLITS)}")
        split = split.astype("U10")
        plan = {} if (split == "validation").any() else {"validation": 1 / 3}
        for group in () if groups is None else np.unique(groups):
            sides = [name for name in SPLITS if (split[groups == group] == name).any()]
            if len(sides) > 1:
                refuse(f"group {str(group)!r} has samples in {' and in '.join(sides)}; a group belongs on one side")
    free = np.flatnonzero(split == "train")
    if plan and groups is not None:
        split[free] = _split_groups(y[free], groups[free], plan, refuse)
    elif plan:
        rng = np.random.default_rng(0)
        per_class = [rng.permutation(free[y[free] == c]) for c in np.unique(y)]
        for name, share in plan.items():
            for members in per_class:
                left = [n for n in members if split[n] == "train"]
                split[left[: round(share * len(members))]] = name
    for name in SPLITS:
        if not (split == name).any():
            refuse(f"no sample is left for {name}; give more samples or a split that has some")
    return split


def _split_groups(y, groups, plan, refuse):
    """(N,) of split names: whole groups, the largest first, each where it is needed most.

    That is where it brings classes that a split lacks, else where the classes then fit their shares best.

    plan: {"validation": share, ...}; the rest is training.
    """
    names, members = np.unique(groups, return_inverse=True)
    shares = {"train": 1 - sum(plan.values())} | plan
    if len(names) < len(shares):
        refuse(f"groups: {len(names)} cannot be divided among {', '.join(shares)}; give more groups, or a split")
    counts = np.zeros((len(names), y.max() + 1))  # samples of each class in each group
    np.add.at(counts, (members, y), 1)
    totals = np.maximum(counts.sum(0), 1)
    wanted = np.array(list(shares.values()))[:, None] * np.ones(len(totals))
    have = np.zeros_like(wanted)  # share of each class that each split has so far
    order = np.random.default_rng(0).permutation(len(names))
    order = order[np.argsort(-counts[order].sum(1), kind="stable")]
    side = np.zeros(len(names), int)
    for place, group in enumerate(order):
        added = counts[group] / totals
        cost = []
        for s in range(len(wanted)):
            then = have.copy()
            then[s] += added
            # a class that a split lacks counts most, then the shares, then how full a split is
            cost.append(((then == 0).sum(), round(((then - wanted) ** 2).sum(), 9), have[s].sum()))
        empty = np.flatnonzero(have.sum(1) == 0)
        must = len(empty) == len(order) - place  # each group that is left is needed by a split that has none
        side[group] = empty[0] if must else min(range(len(cost)), key=cost.__getitem__)
        have[side[group]] += added
    return np.array(list(shares), dtype="U10")[side[members]]


def _copies(x, mask, split):
    """({split: its samples that are exact copies of a sample in another split}, {split: the first such pair})."""
    same = {}
    for n, length in enumerate(mask.sum(1)):
        tokens = np.ascontiguousarray(x[n, ..., :length, :]) + 0  # and -0.0 becomes 0.0
        same.setdefault(hashlib.blake2b(tokens.tobytes()).digest(), []).append(n)
    counts, pairs = dict.fromkeys(SPLITS, 0), {}
    for samples in same.values():
        for n in samples:
            twin = next((m for m in samples if split[m] != split[n]), None)
            if twin is not None:
                counts[split[n]] += 1
                pairs[split[n]] = min(pairs.get(split[n], (n, twin)), (n, twin))
    return counts, pairs


def _facts(task, y, split, copies, grouped):
    """What a reader of a score should know about the samples, as plain values for the record of a study.

    given: the name under which the task was loaded; copies: samples of each split that stand in another one too;
    grouped: whether groups were kept apart; untested: {split: classes without a sample there}; tested: classes with
    test samples; largest_share: of the largest class among all samples; constant: features that say nothing.
    """
    counts = {name: np.bincount(y[split == name], minlength=task.n_classes) for name in SPLITS}
    absent = {name: [task.class_names[c] for c in np.flatnonzero(counts[name] == 0)] for name in SPLITS[1:]}
    real = [len(f) for f in task.preparation.columns] if task.preparation.columns else [task.n_features] * task.n_areas
    constant = sum(int(np.isinf(scale[:f]).sum()) for scale, f in zip(task.preparation.scale, real, strict=True))
    return dict(
        given=task.given, copies=copies, grouped=grouped, untested=absent, tested=int((counts["test"] > 0).sum()),
        largest_share=float(np.bincount(y).max() / len(y)), constant=constant, n_features=sum(real),
    )  # fmt: skip


def _first_tokens(batch, seq_len):
    if seq_len is None or seq_len >= batch.x.shape[3]:
        return batch
    mask = None if batch.mask is None else batch.mask[..., :seq_len]
    return batch._replace(x=batch.x[:, :, :, :seq_len], mask=mask)


def _map(batch, change):
    return Batch(*(None if t is None else change(t) for t in batch))
