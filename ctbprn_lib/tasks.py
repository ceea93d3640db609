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
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ctbprn_lib import InputError, files

SPLITS = ("train", "validation", "test")
INTERIM_SAMPLES = 256  # of the split "interim": few validation samples, the same for all trainings, for the pruner
SPLIT_KEYS = {"validation": 1, "test": 3}  # of the routing task's seeds; the stem was chosen on samples made from key 2
CHUNK = 256  # samples of a fixed set drawn at once; part of what makes the set the same everywhere
Columns = tuple[tuple[int, ...], ...] | None  # the features of each area in recordings (N,T,F); None for (N,K,T,F)
UEA_AREAS = {"BasicMotions": ["accelerometer"] * 3 + ["gyroscope"] * 3}


@contextmanager
def errors_about(source: str) -> Iterator[None]:
    """Let the message of an InputError that is raised inside begin with source."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{source}: {error}") from None


class Batch(NamedTuple):
    """x (R,B,K,T,F); y (R,B) classes; mask (R,B,T) True where a token exists, or None; area (R,B) true area, or None.

    In a fixed set R is 1: all replicas sit the same exam.
    """

    x: torch.Tensor
    y: torch.Tensor
    mask: torch.Tensor | None = None
    area: torch.Tensor | None = None

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        """The batch with change applied to each of its tensors."""
        optional = (None if tensor is None else change(tensor) for tensor in (self.mask, self.area))
        return Batch(change(self.x), change(self.y), *optional)

    def samples(self, start: int, stop: int) -> "Batch":
        """The samples from number start to before stop."""
        return self.map(lambda tensor: tensor[:, start:stop])

    def for_replicas(self, n_replicas: int) -> "Batch":
        """The samples of a batch with R = 1 for each of so many replicas."""
        return self.map(lambda tensor: tensor.expand(n_replicas, *[-1] * (tensor.ndim - 1)))

    def first_tokens(self, seq_len: int | None) -> "Batch":
        """The batch with the first seq_len tokens of x and mask; None for all."""
        mask = None if self.mask is None else self.mask[..., :seq_len]
        return self._replace(x=self.x[:, :, :, :seq_len], mask=mask)


class RoutingTask:
    """Find which area carries a signal, and say its sign (MODEL section 3).

    x = noise * N(0,1); one area also gets v ~ N(0, signal^2) on its first F // 4 features at every token; the label
    says whether those features of that area sum to more than 0 over all tokens.
    """

    n_classes = 2
    classes = np.arange(2)
    class_names = ("sum below zero", "sum above zero")
    given = "routing"
    facts: dict[str, Any] = {}  # noqa: RUF012 (nothing to say: every sample is drawn afresh)

    def __init__(
        self, n_areas: int = 2, n_features: int = 64, n_tokens: int = 128, signal: float = 0.5, noise: float = 0.7
    ) -> None:
        if min(n_areas, n_tokens) < 1 or n_features < 4:
            raise InputError(
                "the routing task needs n_areas and n_tokens of at least 1 and n_features of at least 4, "
                f"got {n_areas}, {n_tokens} and {n_features}"
            )
        self.n_areas, self.n_features, self.n_tokens = n_areas, n_features, n_tokens
        self.signal, self.noise = signal, noise
        self.n_biased = n_features // 4
        self.area_names = tuple(f"area {k + 1}" for k in range(n_areas))
        sizes = dict(n_areas=n_areas, n_features=n_features, n_tokens=n_tokens)
        self.description: dict[str, Any] = dict(task="routing", **sizes, signal=signal, noise=noise)
        self.preparation = Preparation.unchanged(n_areas, n_features)
        self._kept: dict[tuple[str, int, str | torch.device], Batch] = {}

    def __getstate__(self) -> dict:
        """What another process needs; it draws the validation set itself."""
        return self.__dict__ | {"_kept": {}}

    def draw(self, n_replicas: int, batch_size: int, generator: torch.Generator, seq_len: int | None = None) -> Batch:
        """A fresh training batch for each replica, on the generator's device; only seq_len tokens are drawn."""
        seq_len = seq_len or self.n_tokens
        R, K, B, T, F, q = n_replicas, self.n_areas, batch_size, seq_len, self.n_features, self.n_biased
        kw: dict[str, Any] = dict(generator=generator, device=generator.device)
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
        self, split: str, n_samples: int | None = None, seq_len: int | None = None, device: str | torch.device = "cpu"
    ) -> Iterator[Batch]:
        """Yield the first n_samples (None: 8192) of the validation or test set as batches with R = 1.

        split: "validation", "test", or "interim", which is the first INTERIM_SAMPLES of the validation set.

        Chunk i is drawn on the CPU from a seed made of the split and i, so the set is the same on every machine, for
        every n_samples and every seq_len. The validation set is kept in memory, since each trial asks for it.
        """
        n_samples = n_samples or 8192
        if split == "interim":
            split, n_samples = "validation", min(n_samples, INTERIM_SAMPLES)
        for i in range(-(-n_samples // CHUNK)):
            batch = self._kept.get((split, i, device))
            if batch is None:
                seed = np.random.SeedSequence([SPLIT_KEYS[split], i]).generate_state(1, np.uint64)[0]
                batch = self.draw(1, CHUNK, torch.Generator().manual_seed(int(seed))).map(lambda t: t.to(device))
                if split == "validation":
                    self._kept[split, i, device] = batch
            yield batch.first_tokens(seq_len).samples(0, n_samples - i * CHUNK)

    def baselines(self, n_samples: int | None = None) -> dict[str, float]:
        """Test accuracy of rules that are not learnt.

        The majority class; the sign of the sum over both areas; the ceiling: the area first, then its sign.
        """
        hits: dict[str, list[torch.Tensor]] = {"majority class": [], "linear rule": [], "ceiling": []}
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

    center, scale: (K,F) float64 in the units of the recordings.  A feature whose scale is infinite is constant in the
    training samples (or fills up a smaller area), so it says nothing; it becomes 0 everywhere.
    """

    columns: Columns
    center: np.ndarray
    scale: np.ndarray

    @classmethod
    def unchanged(cls, n_areas: int, n_features: int) -> "Preparation":
        """For recordings (N,K,T,F) that a network sees as they are."""
        return cls(None, np.zeros((n_areas, n_features)), np.ones((n_areas, n_features)))

    @classmethod
    def of(cls, x: np.ndarray, mask: np.ndarray, columns: Columns) -> "Preparation":
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
        with errors_about(source):
            x, mask = checked_recordings(x, lengths)
            self.area_names, columns = _area_names(x, areas)
            refuse_missing(x, mask, self.area_names, columns)
            self.classes, y = _classes(y, x)
            self.class_names = tuple(str(label) for label in self.classes.tolist())
            groups = None if groups is None else _groups(np.asarray(groups), len(x))
            split = _splits(split, y, groups)
            _refuse_missing_classes(y, split, self.class_names, groups is not None)
            copies = _copies(x, mask, split, groups is not None)
            self.preparation, x = _standardised(x, mask, split, columns)

        self.n_areas, self.n_tokens, self.n_features = x.shape[1:]
        self.n_classes, self.given = len(self.classes), given or source
        self.n_samples = {name: int((split == name).sum()) for name in SPLITS}
        sizes = dict(n_areas=self.n_areas, n_features=self.n_features, n_tokens=self.n_tokens, n_classes=self.n_classes)
        sha256 = hashlib.sha256(b"".join(array.tobytes() for array in (x, y, mask, split))).hexdigest()
        self.description: dict[str, Any] = dict(task=source, **sizes, n_samples=self.n_samples, sha256=sha256)
        self.facts = _facts(self, y, split, copies, grouped=groups is not None)
        self._arrays = {  # of each split: x (K,N,T,F), y (N,), and mask (N,T) or None
            name: (np.ascontiguousarray(x[part].swapaxes(0, 1)), y[part], None if mask.all() else mask[part])
            for name, part in ((name, split == name) for name in SPLITS)
        }
        held_out, labels, exists = self._arrays["validation"]
        some = np.random.default_rng(0).permutation(len(labels))[:INTERIM_SAMPLES]
        self._arrays["interim"] = held_out[:, some], labels[some], None if exists is None else exists[some]
        self._tensors: dict[tuple[str, str], tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Plain arrays for another process: torch would send tensors through /dev/shm, which may be small."""
        return self.__dict__ | {"_tensors": {}}

    def draw(self, n_replicas: int, batch_size: int, generator: torch.Generator, seq_len: int | None = None) -> Batch:
        """A training batch for each replica, drawn with replacement, on the generator's device."""
        x, y, mask = self._on("train", generator.device)
        n = torch.randint(0, len(y), (n_replicas, batch_size), generator=generator, device=generator.device)
        batch = Batch(x[:, n].permute(1, 2, 0, 3, 4), y[n], None if mask is None else mask[n])
        return batch.first_tokens(seq_len)

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
            yield batch.first_tokens(seq_len)

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

    def _on(self, split: str, device: str | torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The arrays of a split as tensors on a device, where they stay."""
        place = (split, str(device))
        if place not in self._tensors:
            x, y, mask = self._arrays[split]
            there = None if mask is None else torch.from_numpy(mask).to(device)
            self._tensors[place] = torch.from_numpy(x).to(device), torch.from_numpy(y).to(device), there
        return self._tensors[place]


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


def _load_uea(given: str) -> ArrayTask:
    """A UEA archive problem: one that ships with aeon, or a folder with NAME_TRAIN.ts and NAME_TEST.ts."""
    name = given.removeprefix("uea:")
    folder = Path(name)
    if not name or not os.path.isdir(folder):
        aeon = importlib.util.find_spec("aeon")  # not imported, which takes seconds
        missing = "" if aeon else " (the first two need the aeon package: pip install 'ctbprn[uea]')"
        folder = Path(aeon.origin).parent / "datasets" / "data" / name if aeon and aeon.origin else folder
        if not name or not os.path.isdir(folder):
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


def checked_recordings(x: np.ndarray, lengths: Sequence | np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
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


def _area_names(x: np.ndarray, areas: Sequence | np.ndarray | None) -> tuple[tuple[str, ...], Columns]:
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


def refuse_missing(x: np.ndarray, mask: np.ndarray, names: Sequence[str], columns: Columns) -> None:
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


def _classes(y: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
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


def _text(name: str) -> str:
    """The name of a file or folder that goes into the record of a study."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise InputError(f"the name {name!r} is no text in UTF-8; rename the file") from None
    return name


def _groups(groups: np.ndarray, n_samples: int) -> np.ndarray:
    """(N,) group names as text."""
    if groups.shape != (n_samples,):
        raise InputError(f"groups must be ({n_samples},), the group of each sample, got shape {groups.shape}")
    return np.array(_names(groups, "groups"))


def _splits(split: Sequence | np.ndarray | None, y: np.ndarray, groups: np.ndarray | None) -> np.ndarray:
    """(N,) of split names, completed by a draw, stratified by class, that depends on labels and groups alone."""
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


def _refuse_missing_classes(y: np.ndarray, split: np.ndarray, class_names: Sequence[str], grouped: bool) -> None:
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


def _copies(x: np.ndarray, mask: np.ndarray, split: np.ndarray, grouped: bool) -> dict[str, int]:
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


def _standardised(
    x: np.ndarray, mask: np.ndarray, split: np.ndarray, columns: Columns
) -> tuple[Preparation, np.ndarray]:
    """The preparation that the training samples need, and all samples (N,K,T,F) prepared with it."""
    train = split == "train"
    try:
        preparation = Preparation.of(x[train], mask[train], columns)
    except OverflowError:
        raise InputError("x: the values of a feature differ by more than float64 can hold") from None
    x = preparation.apply(x, mask)
    if not np.isfinite(x).all():
        raise InputError(
            "x: a held-out sample lies so far from the training samples that float32 cannot hold it standardised"
        )
    return preparation, x


def _facts(task: ArrayTask, y: np.ndarray, split: np.ndarray, copies: dict[str, int], grouped: bool) -> dict[str, Any]:
    """What a reader of a score should know about the samples, as plain values for the record of a study.

    given: the name under which the task was loaded; copies: samples of each split that stand in another one too;
    grouped: whether groups were kept apart; untested: {split: classes without a sample there}; tested: classes with
    test samples; largest_share: of the largest class among all samples; constant: features that say nothing.
    """
    counts = {name: np.bincount(y[split == name], minlength=task.n_classes) for name in SPLITS}
    absent = {name: [task.class_names[c] for c in np.flatnonzero(counts[name] == 0)] for name in SPLITS[1:]}
    real = [len(f) for f in task.preparation.columns] if task.preparation.columns else [task.n_features] * task.n_areas
    constant = sum(int(np.isinf(scale[:f]).sum()) for scale, f in zip(task.preparation.scale, real, strict=True))
    facts = dict(given=task.given, copies=copies, grouped=grouped, untested=absent)
    facts |= dict(tested=int((counts["test"] > 0).sum()), largest_share=float(np.bincount(y).max() / len(y)))
    return facts | dict(constant=constant, n_features=sum(real))
