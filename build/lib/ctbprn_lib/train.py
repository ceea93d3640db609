"""R replicas of one configuration, trained together, and scored on the task's held-out samples."""

import ctypes
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from ctbprn_lib import InputError
from ctbprn_lib.model import CTBPRN

PRECISIONS = ("auto", "fp32", "tf32", "bf16")
SCHEDULES = ("one_cycle", "constant")
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
if hasattr(LIBC, "mallopt"):
    # glibc gives each large tensor fresh pages and hands them back at once, and half of a step goes into page faults;
    # with no mmap (M_MMAP_MAX = -4), no trimming (M_TRIM_THRESHOLD = -1) and growth by 256 MiB (M_TOP_PAD = -2) it
    # keeps them. PeakMemory trims once a fit.
    for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)):
        LIBC.mallopt(option, value)
SCORING_BYTES = 8 * 2**20  # of one activation while scoring: bounds memory and stays near the caches


@dataclass(frozen=True)
class Hyperparameters:
    """What is searched over; the names are the original report's, with torch-like values as defaults."""

    lr: float = 1e-3
    d: int = 64
    rank: int = 8
    temperature: float = 1.0
    batch_size: int = 32
    seq_len: int = 128
    n_layers: int = 2

    def __post_init__(self):
        for name, value in asdict(self).items():
            whole = isinstance(self.__dataclass_fields__[name].default, int)
            if isinstance(value, bool) or not isinstance(value, (int,) if whole else (int, float)) or not value > 0:
                raise InputError(f"{name} must be a {'whole ' if whole else ''}number above 0, got {value!r}")


@dataclass(frozen=True)
class Budget:
    """What one training costs, and how it is scored: the same for all trials of a study."""

    n_steps: int = 2000
    n_replicas: int = 4
    n_evals: int = 5  # scorings on the validation set, evenly spaced, the last after the last step
    n_validation: int = 2048  # samples, where the task can make as many as it likes
    schedule: str = "one_cycle"
    clip: float = 1.0  # largest gradient norm of a replica
    precision: str = "auto"  # see resolve_precision

    def __post_init__(self):
        for name in ("n_steps", "n_replicas", "n_evals", "n_validation", "clip"):
            value, kinds = getattr(self, name), (int, float) if name == "clip" else int
            if isinstance(value, bool) or not isinstance(value, kinds) or not value > 0:
                raise InputError(f"{name} must be a {'' if name == 'clip' else 'whole '}number above 0, got {value!r}")
        for name, known in (("schedule", SCHEDULES), ("precision", PRECISIONS)):
            if getattr(self, name) not in known:
                raise InputError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")


@dataclass
class Fit:
    """What came of R replicas: arrays are (R,) or, in curves, (evaluations, R); NaN from where a replica diverged."""

    hyperparameters: Hyperparameters
    budget: Budget
    model: CTBPRN
    device: str
    precision: str  # in which it was trained, never "auto"
    n_parameters: int  # of one replica
    steps: list[int] = field(default_factory=list)  # at which the curves were taken
    curves: dict[str, np.ndarray] = field(default_factory=dict)  # train_ce, val_ce, val_accuracy, route_accuracy
    diverged_at: list[int | None] = field(default_factory=list)  # step (from 1) of the first loss that was not finite
    step_time_ms: float = float("nan")  # one training step of all replicas, without scoring
    samples_seen: int = 0  # by each replica
    peak_mem_mib: float = float("nan")  # CUDA's own figure; on the CPU the process's peak growth

    @property
    def val_ce(self):
        """Held-out cross-entropy in nats after the last step."""
        return self.curves["val_ce"][-1]

    @property
    def val_accuracy(self):
        """Held-out accuracy after the last step."""
        return self.curves["val_accuracy"][-1]


def fit(hyperparameters, task, budget=None, seed=0, device="auto", on_eval=None):
    """Train R replicas at once and return their Fit.

    seed: an int or a numpy SeedSequence; initial values, batches and noise of every replica follow from it, so on one
    CPU the same call gives the same bits. on_eval(fit) is called after each scoring and may raise to stop.
    A replica whose loss is not finite is recorded in diverged_at and cannot harm its neighbours.
    Raises InputError for values that do not fit the task or the machine.
    """
    hp, budget = hyperparameters, budget or Budget()
    R = budget.n_replicas
    if hp.seq_len > task.n_tokens:
        raise InputError(f"seq_len must be at most the task's {task.n_tokens} tokens, got {hp.seq_len}")
    device = resolve_device(device)
    precision = resolve_precision(budget.precision, device)
    autocast = precision_context(precision, device)
    for _ in task.fixed("validation", budget.n_validation, hp.seq_len, device):
        pass  # drawn and kept before the memory of this training is measured
    memory = PeakMemory(device)
    model, generator = untrained(hp, task, R, seed, device)
    parameters = list(model.parameters())
    result = Fit(hp, budget, model, str(device), precision, sum(p[0].numel() for p in parameters))
    optimizer = torch.optim.AdamW(parameters, lr=hp.lr, fused=True)
    schedule = None
    if budget.schedule == "one_cycle":
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, hp.lr, max(budget.n_steps, 4), cycle_momentum=False)
    eval_steps = np.unique(np.linspace(0, budget.n_steps, budget.n_evals + 1)[1:].astype(int))
    diverged = torch.zeros(R, dtype=torch.long, device=device)
    losses, seconds, start = [], 0.0, time.perf_counter()
    for step in _progress(budget.n_steps):
        batch = task.draw(R, hp.batch_size, generator, hp.seq_len)
        noise = gumbel_noise((R, hp.n_layers, hp.batch_size, task.n_areas), generator)
        with autocast():
            logits, _ = model(batch.x, noise, batch.mask)
        loss = cross_entropy(logits, batch.y).mean(1)  # (R,); summed, each replica gets the gradient of a solo run
        loss.sum().backward()
        clip_gradients(parameters, budget.clip)
        optimizer.step()
        optimizer.zero_grad()
        if schedule and step < budget.n_steps:
            schedule.step()
        diverged = torch.where((diverged == 0) & ~loss.detach().isfinite(), step, diverged)
        losses.append(loss.detach())
        if step in eval_steps:
            train_ce = torch.stack(losses).mean(0).double().cpu().numpy()  # reads the device, so the clock is true
            seconds += time.perf_counter() - start
            losses = []
            result.steps.append(step)
            result.step_time_ms = 1000 * seconds / step
            result.samples_seen = step * hp.batch_size
            scores = score(model, task, "validation", budget.n_validation, hp.seq_len, autocast)
            worthless = torch.from_numpy(~np.isfinite(scores["val_ce"])).to(
                device
            )  # the last update may have broken it
            diverged = torch.where((diverged == 0) & worthless, step, diverged)
            result.diverged_at = [s or None for s in diverged.tolist()]
            for name, value in {"train_ce": train_ce, **scores}.items():
                value = np.where(diverged.cpu().numpy() > 0, np.nan, value)
                result.curves[name] = np.vstack([*result.curves.get(name, []), value])
            result.peak_mem_mib = memory.mib()
            if on_eval:
                on_eval(result)
            start = time.perf_counter()
    return result


def untrained(hyperparameters, task, n_replicas, seed=0, device="cpu"):
    """The untrained model that fit begins with, and the generator that its batches and noise come from."""
    hp, device = hyperparameters, torch.device(device)
    root = seed if isinstance(seed, np.random.SeedSequence) else np.random.SeedSequence(seed)
    init, stream = (int(s) for s in root.generate_state(2, np.uint64))
    seeds = np.random.SeedSequence(init).generate_state(n_replicas, np.uint32).tolist()
    model = CTBPRN(task.n_features, hp.d, hp.rank, task.n_areas, hp.n_layers, task.n_classes, hp.temperature,
                   n_replicas, seed=seeds)  # fmt: skip
    return model.to(device), torch.Generator(device).manual_seed(stream)


@torch.no_grad()
def score(model, task, split, n_samples, seq_len=None, autocast=nullcontext):
    """Noise-free scores of each replica on the task's fixed split: {"val_ce" or "test_ce": (R,), ...accuracy (R,)}.

    route_accuracy is there where the task knows the true area. Samples go through in portions that bound memory.
    """
    R, device = model.config["n_replicas"], model.temperature.device
    tokens = min(seq_len or task.n_tokens, task.n_tokens)
    portion = max(1, SCORING_BYTES // (4 * R * task.n_areas * tokens * max(model.config["d"], task.n_features)))
    ce, hits, routed, n = 0.0, 0.0, 0.0, 0
    for batch in task.fixed(split, n_samples, seq_len, device):
        for i in range(0, batch.y.shape[1], portion):
            x, y, mask, area = (
                None if t is None else t[:, i : i + portion].expand(R, *[-1] * (t.ndim - 1)) for t in batch
            )
            with autocast():
                logits, route = model(x, None, mask)
            ce = ce + cross_entropy(logits, y).double().sum(1)
            hits = hits + (logits.argmax(-1) == y).sum(1)
            routed = None if area is None else routed + (route[:, -1].argmax(-1) == area).sum(1)
            n += y.shape[1]
    prefix = "val" if split == "validation" else split
    scores = {f"{prefix}_ce": ce / n, f"{prefix}_accuracy": hits / n}
    if routed is not None:
        scores["route_accuracy"] = routed / n
    return {name: value.double().cpu().numpy() for name, value in scores.items()}


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


def gumbel_noise(shape, generator):
    """-log(E), E ~ Exp(1), as -log(-log(u)): several times faster than drawing E on a CPU."""
    u = torch.rand(shape, generator=generator, device=generator.device)
    return u.clamp_(min=1e-20).log_().neg_().log_().neg_()


def clip_gradients(parameters, largest):
    """Scale each replica's gradient, over all parameters, to a norm of at most largest."""
    square = sum(p.grad.flatten(1).square().sum(1) for p in parameters)  # (R,)
    factor = (largest / (square.sqrt() + 1e-6)).clamp(max=1)
    for p in parameters:
        p.grad.mul_(factor.view(-1, *[1] * (p.ndim - 1)))


def _progress(n_steps):
    """Steps 1..n_steps behind a progress bar on stderr, where tqdm is installed; it leaves nothing behind."""
    try:
        from tqdm import tqdm
    except ImportError:
        return range(1, n_steps + 1)
    return tqdm(range(1, n_steps + 1), "training", leave=False, delay=2, mininterval=2, unit="step")


def resolve_device(device):
    """torch.device for "auto", "cpu" or "cuda" (optionally with a number); InputError for anything else."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError:
        resolved = None
    if resolved is None or resolved.type not in ("cpu", "cuda"):
        raise InputError(f'device must be "auto", "cpu" or "cuda", got {device!r}')
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {device!r} is not there: this machine has {torch.cuda.device_count()} CUDA GPUs")
    return resolved


def resolve_precision(precision, device):
    """What "auto" stands for: tf32 on a GPU, bf16 on a CPU that multiplies in it (twice as fast), else fp32.

    Raises InputError for one that the device has not.
    """
    if precision == "tf32" and device.type == "cpu":
        raise InputError("precision tf32 needs a CUDA GPU; a CPU takes auto, fp32 or bf16")
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "tf32"
    can = torch.cpu.get_capabilities()
    return "bf16" if can.get("avx512_bf16") or can.get("amx_bf16") else "fp32"


def precision_context(precision, device):
    """A context factory for the forward pass; also sets how float32 products are computed on a GPU."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    if precision == "bf16":
        return lambda: torch.autocast(device.type, torch.bfloat16)
    return nullcontext


class PeakMemory:
    """Growth of the peak memory since it was made, in MiB: of the CUDA device, else of this process (Linux)."""

    def __init__(self, device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.start = torch.cuda.memory_allocated(device)
        elif sys.platform == "linux":
            if hasattr(LIBC, "malloc_trim"):
                LIBC.malloc_trim(0)  # else memory that an earlier fit left in the heap would hide this one's growth
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is used now
            self.start = self._status("VmRSS")

    def mib(self):
        if self.device.type == "cuda":
            return (torch.cuda.max_memory_allocated(self.device) - self.start) / 2**20
        return (self._status("VmHWM") - self.start) / 2**10 if hasattr(self, "start") else float("nan")

    @staticmethod
    def _status(key):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(key))
