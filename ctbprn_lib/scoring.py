"""Noise-free scores of a network on a task's fixed splits, and where its router looks."""

from contextlib import nullcontext

import numpy as np
import torch
import torch.nn.functional as F

# of one activation while scoring: bounds memory, and on a CPU stays near the caches
SCORING_BYTES = {"cpu": 8 * 2**20, "cuda": 256 * 2**20}


@torch.no_grad()
def score(model, task, split, n_samples, seq_len=None, autocast=nullcontext):
    """Noise-free scores of each replica on the task's fixed split: {"val_ce" or "test_ce": (R,), ...accuracy (R,)}.

    route_accuracy is there where the task knows the true area. Samples go through in portions that bound memory.
    """
    return named(*totals(model, task, split, n_samples, seq_len, autocast), split)


@torch.no_grad()
def totals(model, task, split, n_samples, seq_len, autocast):
    """(3,R) sums over the samples on the model's device: nats, hits, and hits of the true area (NaN if unknown); n."""
    R, device = model.config["n_replicas"], model.temperature.device
    tokens = min(seq_len or task.n_tokens, task.n_tokens)
    sample = 4 * R * task.n_areas * tokens * max(model.config["d"], task.n_features)
    portion, n = max(1, SCORING_BYTES[device.type] // sample), 0
    sums = torch.zeros(3, R, dtype=torch.double, device=device)
    for batch in task.fixed(split, n_samples, seq_len, device):
        for i in range(0, batch.y.shape[1], portion):
            x, y, mask, area = (
                None if t is None else t[:, i : i + portion].expand(R, *[-1] * (t.ndim - 1)) for t in batch
            )
            with autocast():
                logits, route = model(x, None, mask)
            sums[0] += cross_entropy(logits, y).double().sum(1)
            sums[1] += (logits.argmax(-1) == y).sum(1)
            sums[2] += torch.nan if area is None else (route[:, -1].argmax(-1) == area).sum(1)
            n += y.shape[1]
    return sums, n


def named(sums, n, split):
    """{name of score: (R,)} from totals and the split they are of."""
    ce, accuracy, routed = (sums / n).cpu().numpy()
    prefix = "val" if split == "validation" else split
    scores = {f"{prefix}_ce": ce, f"{prefix}_accuracy": accuracy}
    return scores if np.isnan(routed).all() else scores | {"route_accuracy": routed}


@torch.no_grad()
def route_shares(model, task, n_samples=2048, seq_len=None):
    """Where the router looks: (rows, K) shares of validation samples over all replicas, by largest last-layer logit.

    A row is a true area where the task knows it, else a class.  Returns (shares, row names).
    """
    R, K, device = model.config["n_replicas"], task.n_areas, model.temperature.device
    known, counts = False, None
    for batch in task.fixed("validation", n_samples, seq_len, device):
        known = batch.area is not None
        rows = batch.area if known else batch.y
        counts = torch.zeros(K if known else task.n_classes, K) if counts is None else counts
        x, mask = (None if t is None else t.expand(R, *[-1] * (t.ndim - 1)) for t in (batch.x, batch.mask))
        looks = model(x, None, mask)[1][:, -1].argmax(-1)  # (R,B)
        counts.index_put_((rows.expand(R, -1).cpu(), looks.cpu()), torch.ones(()), accumulate=True)
    return (counts / counts.sum(1, keepdim=True)).numpy(), task.area_names if known else task.class_names


def cross_entropy(logits, y):
    """logits (R,B,C), y (R,B) -> (R,B) in nats, in float32 whatever the precision of the network."""
    return F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), reduction="none").view(y.shape)
