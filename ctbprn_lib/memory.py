"""How much memory a training step takes, found by counting the bytes of its tensors, so that no GPU is needed.

One step is run on the CPU with a batch of 2, and one with a batch of 3. After each operation the tensors that are alive
are counted. Tensors that share their memory count once. Each count is a constant plus so many bytes for each sample, so
two batches tell what any batch takes. tests/test_step_bytes.py compares this with counts of larger batches, and with
the peak memory of the process.

The allocator of a GPU holds the same tensors. It also needs memory for what is not counted here:
- CUDA's context, the workspaces of cuBLAS, and what a kernel takes for itself while it runs;
- rounding (a tensor to 512 bytes, a request to the GPU to 2 MiB) and gaps between tensors;
- the samples that a task keeps on the GPU, and scoring, which has its own bound (scoring.SCORING_BYTES).
In bf16 the copies are those of autocast on a CPU. On a GPU autocast also sums in float32, which is not counted.
"""

import itertools
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ctbprn_lib import InputError, published, search
from ctbprn_lib.device import PRECISIONS
from ctbprn_lib.tasks import RoutingTask, Task
from ctbprn_lib.train import Budget, Hyperparameters, Training

CARDS_GIB = (8, 24, 80)  # memory of usual GPUs
LEFT_FREE = 2**30  # bytes of a card that are left for what is not counted: an allowance, not a measurement
BATCHES = (2, 3)  # not 1: torch then makes views where it copies larger batches


@dataclass(frozen=True)
class StepBytes:
    """Bytes of the tensors of one training step, for all replicas together.

    weights, moments: what stays from step to step; AdamW keeps two moments. Gradients take as much as weights.
    peak: the most that is alive at once: weights, moments, gradients, batch, activations and temporaries.
    per_sample: how far the peak grows with each sample that is added to the batch of every replica.
    """

    weights: int
    moments: int
    peak: int
    per_sample: int


@dataclass(frozen=True)
class Card:
    """What a training step takes of a GPU with so many GiB: its share of them, and the largest batch that fits."""

    gib: int
    share: float
    largest_batch: int


def step_bytes(hyperparameters: Hyperparameters, task: Task, n_replicas: int = 1, precision: str = "fp32") -> StepBytes:
    """Count the bytes of a training step (train.Training), which trains n_replicas replicas at once.

    precision: "fp32", "tf32" or "bf16". A seq_len above the task's tokens means all of them.
    A batch of 1 takes a little less than what is returned, because torch then copies less.
    Raises InputError for another precision, and for n_replicas below 1.
    """
    step = _counted(hyperparameters, task, n_replicas, precision)
    alive = step.fixed + step.per_sample * hyperparameters.batch_size
    at_peak = alive.argmax()
    return StepBytes(step.weights, step.moments, int(alive[at_peak]), int(step.per_sample[at_peak]))


def largest_batch(
    hyperparameters: Hyperparameters, task: Task, limit_bytes: int, n_replicas: int = 1, precision: str = "fp32"
) -> int:
    """The largest batch size with which a training step takes at most limit_bytes, or 0 if none does.

    The batch size of the hyperparameters is not used. Raises InputError as step_bytes does.
    """
    step = _counted(hyperparameters, task, n_replicas, precision)
    room, grows = limit_bytes - step.fixed, step.per_sample > 0
    if (room < 0).any():
        return 0
    return int((room[grows] // step.per_sample[grows]).min())


def cards(hyperparameters: Hyperparameters, task: Task, n_replicas: int = 1, precision: str = "fp32") -> list[Card]:
    """What a training step takes of each of CARDS_GIB. The largest batch leaves LEFT_FREE bytes of the card free."""
    args = n_replicas, precision
    peak = step_bytes(hyperparameters, task, *args).peak
    sizes = {gib: gib * 2**30 for gib in CARDS_GIB}
    return [
        Card(gib, peak / size, largest_batch(hyperparameters, task, size - LEFT_FREE, *args))
        for gib, size in sizes.items()
    ]


def of_configuration(hyperparameters: Hyperparameters, task: Task) -> dict[str, Any]:
    """What a report says of the memory of one replica in fp32, as plain values.

    Keys: mib (peak of a step), sample_mib (for each sample more in the batch), cards (list of the values of Card).
    """
    step = step_bytes(hyperparameters, task)
    found = [asdict(card) for card in cards(hyperparameters, task)]
    return {"mib": step.peak / 2**20, "sample_mib": step.per_sample / 2**20, "cards": found}


def of_published_trial() -> dict[str, Any]:
    """What decides the original's two claims about memory: of_configuration of its trial 2, beside the space.

    More keys: batch_size, n_shapes of the published space, share_less (of them need less than trial 2), least_mib.
    It takes some seconds, as each shape is counted.
    """
    task, hp = RoutingTask(), published.hyperparameters(2)
    space = search.default_space(task)
    names = ("d", "rank", "batch_size", "seq_len")
    shapes = [dict(zip(names, shape, strict=True)) for shape in itertools.product(*(space[name] for name in names))]
    peaks = np.array([step_bytes(replace(hp, **shape), task).peak for shape in shapes])
    less = float((peaks < step_bytes(hp, task).peak).mean())
    beside = {"batch_size": hp.batch_size, "n_shapes": len(peaks), "share_less": less}
    return of_configuration(hp, task) | beside | {"least_mib": float(peaks.min() / 2**20)}


@dataclass(frozen=True)
class _Counted:
    """The bytes that are alive after each operation of a step: fixed + per_sample * batch size, both (operations,)."""

    weights: int
    moments: int
    fixed: np.ndarray
    per_sample: np.ndarray


def _counted(hp: Hyperparameters, task: Task, n_replicas: int, precision: str) -> _Counted:
    if precision not in PRECISIONS or precision == "auto":
        raise InputError(f'precision must be "fp32", "tf32" or "bf16" to count bytes, got {precision!r}')
    # the same values for what does not change the bytes, so that shapes that differ in it alone share one count
    shape = replace(hp, lr=1.0, temperature=1.0, batch_size=1, seq_len=min(hp.seq_len, task.n_tokens))
    return _count(shape, task, n_replicas, precision)


@lru_cache(32)
def _count(shape: Hyperparameters, task: Task, n_replicas: int, precision: str) -> _Counted:
    task.draw(1, 1, torch.Generator(), shape.seq_len)  # from its first draw on a task keeps its samples, once for all
    alive = []
    for batch_size in BATCHES:
        with LiveBytes() as live:  # from the beginning, so that it knows the weights and moments
            budget = Budget(n_steps=1, n_replicas=n_replicas)
            training = Training(replace(shape, batch_size=batch_size), task, budget, torch.device("cpu"), precision)
            live.after.clear()
            training.step()
        alive.append(np.array(live.after))
    few, more = alive
    per_sample = (more - few) // (BATCHES[1] - BATCHES[0])
    weights = sum(p.nbytes for p in training.parameters)
    states = training.optimizer.state.values()
    moments = sum(state["exp_avg"].nbytes + state["exp_avg_sq"].nbytes for state in states)
    return _Counted(weights, moments, few - BATCHES[0] * per_sample, per_sample)


class LiveBytes(TorchDispatchMode):
    """Follows the tensors that are made while it is on.

    after: the bytes of those that are alive, after each operation. Views add nothing, as they share their storage.
    """

    def __init__(self) -> None:
        super().__init__()
        self.after: list[int] = []
        self.storages: WeakSet[torch.UntypedStorage] = WeakSet()  # a storage leaves when its last tensor is freed

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.storages.update(tensor.untyped_storage() for tensor in tensors)
        self.after.append(sum(storage.nbytes() for storage in self.storages))
        return result
