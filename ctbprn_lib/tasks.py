"""Where batches come from: the routing task of MODEL section 3, your own arrays, UEA files.

Every task offers the same few things: n_areas K, n_features F, n_tokens T, n_classes C, description (what makes two
tasks the same), draw (a training batch for R replicas), fixed (a held-out set that never changes) and baselines.
seq_len is how many of the first tokens the network sees; labels always come from all of them.
"""

import hashlib
import math
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ctbprn_lib import InputError, files

SPLITS = ("train", "validation", "test")
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
    class_names = ("sum below zero", "sum above zero")

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
        self._kept = {}

    def draw(self, n_replicas, batch_size, generator, seq_len=None):
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

    def fixed(self, split, n_samples, seq_len=None, device="cpu"):
        """Yield the first n_samples of the validation or test set as batches with R = 1.

        Chunk i is drawn on the CPU from a seed made of the split and i, so the set is the same on every machine, for
        every n_samples and every seq_len. The validation set is kept in memory, since each trial asks for it.
        """
        for i in range(-(-n_samples // CHUNK)):
            batch = self._kept.get((split, i, device))
            if batch is None:
                seed = np.random.SeedSequence([SPLIT_KEYS[split], i]).generate_state(1, np.uint64)[0]
                batch = self.draw(1, CHUNK, torch.Generator().manual_seed(int(seed)))
                batch = _map(batch, lambda t: t.to(device))
                if split == "validation":
                    self._kept[split, i, device] = batch
            yield _map(_first_tokens(batch, seq_len), lambda t: t[:, : n_samples - i * CHUNK])  # noqa: B023

    def baselines(self, n_samples=8192):
        """Test accuracy of rules that are not learnt: chance, the sign of the sum over areas, area first then sign."""
        hits = {"chance": [], "linear rule": [], "ceiling": []}
        for batch in self.fixed("test", n_samples):
            sums = batch.x[0, ..., : self.n_biased].sum(2)  # (B,K,q)
            found = sums.square().sum(-1).argmax(-1)
            sign_of_found = sums.sum(-1).gather(1, found[:, None])[:, 0] > 0
            hits["chance"].append(batch.y[0] == 1)
            hits["linear rule"].append((sums.sum((1, 2)) > 0).long() == batch.y[0])
            hits["ceiling"].append(sign_of_found.long() == batch.y[0])
        means = {rule: torch.cat(hit).double().mean().item() for rule, hit in hits.items()}
        return means | {"chance": max(means["chance"], 1 - means["chance"])}


class ArrayTask:
    """A classification task from arrays.

    x (N,K,T,F), or (N,T,F) with areas (F,) naming the area of each feature; y (N,) labels; split (N,) of "train",
    "validation" and "test", or None for a stratified 60/20/20; without any "validation" a third of the training
    samples, stratified, is set aside for it. lengths (N,): tokens that exist, where sequences are unequal.
    Features are standardised with the training samples' statistics only.
    Raises InputError that names source and says what was expected.
    """

    def __init__(self, x, y, areas=None, split=None, lengths=None, source="arrays"):
        def refuse(what):
            raise InputError(f"{source}: {what}")

        x, y = np.asarray(x), np.asarray(y)
        areas = None if areas is None else np.asarray(areas)
        if x.dtype.kind not in "fiu":
            refuse(f"x must hold numbers, got dtype {x.dtype}")
        if x.ndim not in (3, 4):
            refuse(f"x must be (N,K,T,F) or (N,T,F), got shape {x.shape}")
        if min(x.shape) < 1:
            refuse(f"x is empty: {x.shape}")
        N, T, F = x.shape[0], *x.shape[-2:]
        if y.shape != (N,):
            refuse(f"y must be ({N},) for x {x.shape}, got shape {y.shape}")
        lengths = np.full(N, T) if lengths is None else np.asarray(lengths)
        if lengths.shape != (N,) or lengths.dtype.kind not in "iu" or lengths.min() < 1 or lengths.max() > T:
            refuse(f"lengths must be ({N},) whole numbers in 1..{T}")
        with np.errstate(over="ignore", invalid="ignore"):  # what becomes infinite is refused below
            x = x.astype(np.float32)
        if x.ndim == 3:
            if areas is None:
                refuse(f"x {x.shape} is (N,T,F) and needs areas: the area of each of the {F} features")
            x, self.area_names = _by_area(x, areas, refuse)
        else:
            areas = np.arange(1, x.shape[1] + 1) if areas is None else areas
            if areas.shape != x.shape[1:2]:
                refuse(f"areas must name the {x.shape[1]} areas of x, got shape {areas.shape}")
            names = _names(areas, "areas", refuse)
            self.area_names = names if areas.dtype.kind in "US" else tuple(f"area {name}" for name in names)
        N, K, T, F = x.shape
        mask = np.arange(T) < lengths[:, None]  # (N,T)
        missing = ~np.isfinite(x) & mask[:, None, :, None]
        if missing.any():
            n, k, t, f = np.argwhere(missing)[0]
            refuse(
                f"x has {missing.sum()} missing or infinite values, the first at sample {n}, {self.area_names[k]}, "
                f"token {t}, feature {f}; fill or drop them first"
            )
        classes, y = np.unique(y, return_inverse=True)
        self.class_names = _names(classes, "y", refuse)
        if len(classes) < 2:
            refuse("y holds a single class; at least two are needed")
        split = _splits(split, y, refuse)
        train = split == "train"
        if len(set(y[train])) < len(classes):
            absent = sorted(set(range(len(classes))) - set(y[train]))[0]
            refuse(f"y: class {self.class_names[absent]!r} has no training sample")

        weight = mask[train][:, None, :, None]
        count = weight.sum((0, 2), keepdims=True)
        seen = np.where(weight, x[train], 0)
        mean = seen.sum((0, 2), keepdims=True, dtype=np.float64) / count
        std = np.sqrt((np.where(weight, seen - mean, 0) ** 2).sum((0, 2), keepdims=True) / count)
        with np.errstate(over="ignore"):
            x = np.where(mask[:, None, :, None], (x - mean) / np.where(std > 1e-12, std, 1), 0).astype(np.float32)
        if not np.isfinite(x).all():
            refuse(
                "x: a held-out sample lies so far from the training samples that float32 cannot hold it standardised"
            )

        # what a new recording needs before the network of this task can read it
        self.standardised = {"mean": mean[0, :, 0].tolist(), "std": std[0, :, 0].tolist()}  # (K,F)
        self.n_areas, self.n_tokens, self.n_features, self.n_classes = K, T, F, len(classes)
        self.n_samples = {name: int((split == name).sum()) for name in SPLITS}
        content = b"".join(array.tobytes() for array in (x, y, mask, split))
        self.description = dict(task=source, n_areas=K, n_features=F, n_tokens=T, n_classes=len(classes),
                                n_samples=self.n_samples, sha256=hashlib.sha256(content).hexdigest())  # fmt: skip
        self._parts = {}
        for name in SPLITS:
            part = split == name
            tensors = (x[part].swapaxes(0, 1), y[part], None if mask.all() else mask[part])  # x: (K,N,T,F)
            self._parts[name] = tuple(None if a is None else torch.from_numpy(np.ascontiguousarray(a)) for a in tensors)

    def draw(self, n_replicas, batch_size, generator, seq_len=None):
        """A training batch for each replica, drawn with replacement, on the generator's device."""
        x, y, mask = self._on("train", generator.device)
        n = torch.randint(0, len(y), (n_replicas, batch_size), generator=generator, device=generator.device)
        batch = Batch(x[:, n].permute(1, 2, 0, 3, 4), y[n], None if mask is None else mask[n])
        return _first_tokens(batch, seq_len)

    def fixed(self, split, n_samples=None, seq_len=None, device="cpu"):
        """Yield the validation or test samples (at most n_samples) as batches with R = 1."""
        x, y, mask = self._on(split, device)
        end = min(len(y), n_samples or len(y))
        for i in range(0, end, CHUNK):
            part = slice(i, min(i + CHUNK, end))
            batch = Batch(x[:, part].transpose(0, 1)[None], y[None, part], None if mask is None else mask[None, part])
            yield _first_tokens(batch, seq_len)

    def baselines(self):
        """Test accuracy without the network: the largest class, and ridge regression on each feature's mean."""

        def means(split):
            x, y, mask = self._on(split, "cpu")
            m = x.mean(2) if mask is None else x.sum(2) / mask.sum(1)[:, None]  # (K,N,F)
            m = m.transpose(0, 1).flatten(1).double()
            return torch.cat([m, torch.ones(len(m), 1)], 1), y

        (a, y), (a_test, y_test) = means("train"), means("test")
        onehot = torch.nn.functional.one_hot(y, self.n_classes).double()
        weights = torch.linalg.solve(a.T @ a + torch.eye(a.shape[1]), a.T @ onehot)
        return {
            "chance": (y_test == y.mode().values).double().mean().item(),
            "linear rule": ((a_test @ weights).argmax(1) == y_test).double().mean().item(),
        }

    def _on(self, split, device):
        if (split, str(device)) not in self._parts:
            moved = tuple(None if t is None else t.to(device) for t in self._parts[split])
            self._parts[split, str(device)] = moved
        return self._parts[split, str(device)]


def load_task(name):
    """The task that name says: "routing", "uea:BasicMotions", "uea:<folder>" or the path of a .npz file.

    A .npz holds x, y and, as ArrayTask has them, areas, split and lengths.
    Raises InputError for anything else, naming the file and the field.
    """
    if name == "routing":
        return RoutingTask()
    if name.startswith("uea:"):
        return _load_uea(name.removeprefix("uea:"))
    if not name.endswith(".npz"):
        raise InputError(f'task {name!r}: expected "routing", "uea:<name or folder>" or the path of a .npz file')
    arrays = files.npz(name, ("x", "y"), ("areas", "split", "lengths"))
    return ArrayTask(**arrays, source=Path(name).name)


def _load_uea(name):
    """A UEA archive problem: one that ships with aeon, or a folder with NAME_TRAIN.ts and NAME_TEST.ts."""
    try:
        import aeon
    except ImportError:
        raise InputError(f"task uea:{name} needs the aeon package: pip install 'ctbprn[uea]'") from None
    shipped = Path(aeon.__file__).parent / "datasets" / "data"
    folder = next((place for place in (Path(name), shipped / name) if os.path.isdir(place)), None)
    if folder is None:
        raise InputError(f"task uea:{name}: expected BasicMotions, JapaneseVowels or a folder with its .ts files")
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
        train_y + test_y,
        areas=UEA_AREAS.get(folder.name, halves),
        split=np.repeat(["train", "test"], [len(train), len(test)]),
        lengths=lengths,
        source=f"uea:{folder.name}",
    )


def _names(values, what, refuse):
    """Areas or classes as text."""
    if values.dtype.kind not in "iuUSb":
        refuse(f"{what} must hold whole numbers or strings, got dtype {values.dtype}")
    try:
        names = tuple(v.decode() if isinstance(v, bytes) else str(v) for v in values.tolist())
        "".join(names).encode()  # numpy also holds code points that are no text
    except (ValueError, SystemError):  # the latter for code points beyond the last
        refuse(f"{what} must hold whole numbers or strings, got something that is no text")
    return names


def _by_area(x, areas, refuse):
    """(N,T,F) -> (N,K,T,F'), features grouped by area name in order of first appearance, zero-padded to equal F'."""
    if areas.shape != (x.shape[2],):
        refuse(f"areas must name the area of each of the {x.shape[2]} features, got shape {areas.shape}")
    labels = np.array(_names(areas, "areas", refuse))
    names = tuple(dict.fromkeys(labels.tolist()))
    groups = [np.flatnonzero(labels == name) for name in names]
    shape = (x.shape[0], len(names), x.shape[1], max(map(len, groups)))
    if files.too_large(4 * math.prod(shape), x.nbytes):
        refuse(f"areas differ too much in size: padded to the largest, {shape[3]} features, x would be {shape}")
    out = np.zeros(shape, np.float32)
    for k, features in enumerate(groups):
        out[:, k, :, : len(features)] = x[:, :, features]
    return out, names


def _splits(split, y, refuse):
    """(N,) of split names, completed by a stratified draw that depends on the labels alone."""
    if split is None:
        split = np.full(len(y), "train", dtype="U10")
        plan = (("validation", 0.2), ("test", 0.2))
    else:
        split = np.asarray(split)
        if split.shape != y.shape or split.dtype.kind != "U" or not np.isin(split, SPLITS).all():
            refuse(f"split must be ({len(y)},) of {', '.join(SPLITS)}")
        split = split.astype("U10")
        plan = () if (split == "validation").any() else (("validation", 1 / 3),)
    rng = np.random.default_rng(0)
    per_class = [rng.permutation(np.flatnonzero((y == c) & (split == "train"))) for c in np.unique(y)]
    for name, share in plan:
        for members in per_class:
            free = [n for n in members if split[n] == "train"]
            split[free[: round(share * len(members))]] = name
    for name in SPLITS:
        if not (split == name).any():
            refuse(f"no sample is left for {name}; give more samples or a split that has some")
    return split


def _first_tokens(batch, seq_len):
    if seq_len is None or seq_len >= batch.x.shape[3]:
        return batch
    mask = None if batch.mask is None else batch.mask[..., :seq_len]
    return batch._replace(x=batch.x[:, :, :, :seq_len], mask=mask)


def _map(batch, change):
    return Batch(*(None if t is None else change(t) for t in batch))
