"""Noise-free scores of a network on a task's fixed splits, and where its router looks."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
import torch.nn.functional as F

from ctbprn_lib.model import Network
from ctbprn_lib.tasks import Task

# of one activation while scoring: bounds memory, and on a CPU stays near the caches
SCORING_BYTES = {"cpu": 8 * 2**20, "cuda": 256 * 2**20}


@torch.no_grad()
def score(
    model: Network,
    task: Task,
    split: str,
    n_samples: int | None = None,
    seq_len: int | None = None,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> dict[str, np.ndarray]:
    """Noise-free scores of each replica on the task's split "validation" or "test": {name: (R,)}.

    The names begin with val_ or test_: ce (nats), accuracy, and balanced_accuracy, which is the mean, over the classes
    of the split, of the share of a class's samples that is right.  Where the task knows the true area there are also
    route_accuracy_1 to route_accuracy_L, one a layer: the share of samples whose largest route logit is the true area.
    """
    n_layers, n_classes = model.config["n_layers"], model.config["n_classes"]
    return named(totals(model, task, split, n_samples, seq_len, autocast), n_layers, n_classes, split)


@torch.no_grad()
def totals(
    model: Network,
    task: Task,
    split: str,
    n_samples: int | None,
    seq_len: int | None,
    autocast: Callable[[], AbstractContextManager],
) -> torch.Tensor:
    """(2 + L + 2 C, R) sums over the samples, on the model's device: nats, hits, hits of the true area by each layer
    (NaN if unknown), hits in each class, and samples of each class.

    The samples go through in portions that bound memory.
    """
    R, L, device = model.config["n_replicas"], model.config["n_layers"], model.temperature.device
    C = model.config["n_classes"]
    tokens = min(seq_len or task.n_tokens, task.n_tokens)
    sample = 4 * R * task.n_areas * tokens * max(model.config["d"], task.n_features)
    portion = max(1, SCORING_BYTES[device.type] // sample)
    classes = torch.arange(C, device=device)
    sums = torch.zeros(2 + L + 2 * C, R, dtype=torch.double, device=device)
    for batch in task.fixed(split, n_samples, seq_len, device):
        batch = batch.for_replicas(R)
        for i in range(0, batch.y.shape[1], portion):
            x, y, mask, area = batch.samples(i, i + portion)
            with autocast():
                logits, route = model(x, None, mask)
            hit, of_class = logits.argmax(-1) == y, y[..., None] == classes  # (R,B), (R,B,C)
            sums[0] += cross_entropy(logits, y).double().sum(1)
            sums[1] += hit.sum(1)
            sums[2 : 2 + L] += torch.nan if area is None else (route.argmax(-1) == area[:, None]).sum(-1).T
            sums[2 + L : 2 + L + C] += (hit[..., None] & of_class).sum(1).T
            sums[2 + L + C :] += of_class.sum(1).T
    return sums


def named(sums: torch.Tensor, n_layers: int, n_classes: int, split: str) -> dict[str, np.ndarray]:
    """{name of score: (R,)} from totals and the split they are of."""
    rows = sums.cpu().numpy()
    nats, hits, routed = rows[0], rows[1], rows[2 : 2 + n_layers]
    hits_in_class, in_class = np.split(rows[2 + n_layers :], [n_classes])
    n, tested = in_class.sum(0), in_class[:, 0] > 0
    prefix = "test" if split == "test" else "val"
    scores = {
        f"{prefix}_ce": nats / n,
        f"{prefix}_accuracy": hits / n,
        f"{prefix}_balanced_accuracy": (hits_in_class[tested] / in_class[tested]).mean(0),
    }
    if not np.isnan(routed).all():
        scores |= {f"route_accuracy_{layer}": share / n for layer, share in enumerate(routed, 1)}
    return scores


def route_accuracy(scores: dict[str, np.ndarray], validation: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """{"route_accuracy": (R,)}: from scores, that of the layer which routes best by the scores on validation samples.

    It is {} where the task knows no true area.  Each replica has a best layer of its own.
    """
    layers = sorted(name for name in validation if name.startswith("route_accuracy_"))
    if not layers:
        return {}
    best = np.array([validation[name] for name in layers]).argmax(0)
    shares = np.array([scores[name] for name in layers])
    return {"route_accuracy": shares[best, np.arange(len(best))]}


@torch.no_grad()
def route_shares(
    model: Network, task: Task, n_samples: int = 2048, seq_len: int | None = None
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Where the router of each layer looks: (L, rows, K) shares of validation samples over all replicas.

    A sample looks at the area with the largest route logit.  A row is a true area where the task knows it, else a
    class.  Returns (shares, row names).
    """
    R, L, K, device = model.config["n_replicas"], model.config["n_layers"], task.n_areas, model.temperature.device
    names, rows, looks = task.class_names, [], []
    for batch in task.fixed("validation", n_samples, seq_len, device):
        x, y, mask, area = batch.for_replicas(R)
        names = task.class_names if area is None else task.area_names
        rows.append(y if area is None else area)  # (R,B)
        looks.append(model(x, None, mask)[1].argmax(-1))  # (R,L,B)
    row, look = torch.cat(rows, 1).cpu(), torch.cat(looks, 2).cpu()
    counts = torch.zeros(L, len(names), K)
    for layer in range(L):
        counts[layer].index_put_((row, look[:, layer]), torch.ones(()), accumulate=True)
    return (counts / counts.sum(-1, keepdim=True)).numpy(), names


def cross_entropy(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """logits (R,B,C), y (R,B) -> (R,B) in nats, in float32 whatever the precision of the network."""
    return F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), reduction="none").view(y.shape)
