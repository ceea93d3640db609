"""R replicas of one configuration, trained together, and scored on the task's held-out samples."""

import copy
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch

from ctbprn_lib import InputError
from ctbprn_lib import checkpoint as checkpoints
from ctbprn_lib.device import PRECISIONS, PeakMemory, captured, precision_context, resolve_device, resolve_precision
from ctbprn_lib.model import CTBPRN, Network
from ctbprn_lib.scoring import cross_entropy, named, route_accuracy, totals
from ctbprn_lib.tasks import Batch, Task
from ctbprn_lib.transformer import Transformer

SCORED = ("interim", "validation")  # the splits that a training is scored on
SCHEDULES = ("one_cycle", "constant")
# What can be left out: the controller's weights (all areas count alike), the message between areas, the gate's noise.
PARTS = ("routing", "message", "noise")
NETWORKS = ("ctbprn", "transformer")
PROGRESS_SECONDS = 2  # between two updates of the line that says how far a training is
CHECKPOINT_SECONDS = 30  # a training shorter than this is cheaper to repeat than to keep


@dataclass(frozen=True)
class Entry:
    """What is known of one hyperparameter beside its default: a row of the table in Hyperparameters.

    label: its name as people read it.
    ladder: the levels that an ablation may move it through, in order.
    unit: of its axis in a picture.
    digits: how a value is printed, as a format specification.
    shapes: whether it changes which initial values are drawn.  Equal seeds make pairs where no such one differs.
    zero: whether 0 is allowed; otherwise a value must be above 0. There is no largest value but that of a search space.
    added: whether it came after the first confirmations were recorded, which therefore do not name it. True for every
    new hyperparameter: its default must then be the training of before.
    """

    label: str
    ladder: tuple[float, ...] = ()
    unit: str = ""
    digits: str = "g"
    shapes: bool = False
    zero: bool = False
    added: bool = False

    def text(self, value: float) -> str:
        """A value as people read it; a dash where there is none."""
        return "–" if value is None or math.isnan(value) else format(value, self.digits)

    @property
    def axis(self) -> str:
        """The label of an axis."""
        return f"{self.label.lower()} ({self.unit})" if self.unit else self.label.lower()


class Rate(Entry):
    """The learning rate, which is printed with two digits below 0.001 and with five decimals above."""

    def text(self, value: float) -> str:
        return super().text(value) if not value >= 1e-3 else f"{value:.5f}".rstrip("0")


def _row(default, entry):
    return field(default=default, metadata={"entry": entry})


@dataclass(frozen=True)
class Hyperparameters:
    """What is searched over; the first six names are the original report's.

    This is the one table of them: space, training, ablation, pictures and report read it.  A new hyperparameter is a
    row here and its use in the training below.
    """

    lr: float = _row(
        1e-3, Rate("Learning rate", (3e-5, 1e-4, 4e-4, 1e-3, 1.5e-3, 2e-3, 4e-3, 1e-2, 3e-2), digits=".2g")
    )
    d: int = _row(64, Entry("Width d", (16, 32, 64, 96, 128, 192), shapes=True))
    rank: int = _row(8, Entry("Router rank", (2, 4, 8, 16, 32, 64), shapes=True))
    temperature: float = _row(1.0, Entry("Temperature", (0.25, 0.5, 1.0, 1.7, 2.0, 3.0), digits=".2f"))
    batch_size: int = _row(32, Entry("Batch size", (4, 8, 16, 32, 64, 128), unit="samples"))
    seq_len: int = _row(128, Entry("Sequence length", unit="tokens"))  # its ladder depends on the task
    n_layers: int = _row(2, Entry("Layers", (1, 2, 3, 4), shapes=True))
    weight_decay: float = _row(0.01, Entry("Weight decay", (0.0, 1e-3, 0.01, 0.03, 0.1, 0.3), zero=True, added=True))
    dropout: float = _row(0.0, Entry("Dropout", (0.0, 0.1, 0.2, 0.3, 0.5), zero=True, added=True))
    input_noise: float = _row(0.0, Entry("Input noise", (0.0, 0.1, 0.2, 0.5, 1.0), unit="SD", zero=True, added=True))
    gate_noise: float = _row(1.0, Entry("Gate noise", (0.0, 0.25, 0.5, 1.0, 2.0), zero=True, added=True))
    time_shift: int = _row(0, Entry("Time shift", (0, 1, 2, 4, 8), unit="tokens", zero=True, added=True))

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            whole, zero = KINDS[name] is int, TABLE[name].zero
            number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
            if not number or not (value > 0 or (zero and value == 0)):
                least = "of at least 0" if zero else "above 0"
                raise InputError(f"{name} must be a {'whole ' if whole else ''}number {least}, got {value!r}")
        if self.dropout >= 1:
            raise InputError(f"dropout must be below 1, got {self.dropout!r}")

    def identity(self) -> dict[str, float]:
        """The values that tell one training from another: one that was added later counts only if it is not usual."""
        usual = {name: row.default for name, row in self.__dataclass_fields__.items()}
        return {k: v for k, v in asdict(self).items() if not TABLE[k].added or v != usual[k]}


TABLE: dict[str, Entry] = {row.name: row.metadata["entry"] for row in fields(Hyperparameters)}
KINDS: dict[str, type] = {row.name: type(row.default) for row in fields(Hyperparameters)}


@dataclass(frozen=True)
class Budget:
    """What one training costs, and how it is scored: the same for all trials of a study."""

    n_steps: int = 2000
    n_replicas: int = 4
    n_evals: int = 5  # scorings, evenly spaced: the last after the last step, those before on few samples
    n_validation: int = 2048  # samples of the last scoring, where the task can make as many as it likes
    schedule: str = "one_cycle"
    clip: float = 1.0  # largest gradient norm of a replica
    precision: str = "auto"  # see resolve_precision

    def __post_init__(self) -> None:
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
    model: Network
    device: str
    precision: str  # in which it was trained, never "auto"
    n_parameters: int  # of one replica
    steps: list[int] = field(default_factory=list)  # at which the curves were taken
    curves: dict[str, np.ndarray] = field(default_factory=dict)  # train_ce, and the scores on the validation set
    diverged_at: list[int | None] = field(default_factory=list)  # step (from 1) of the first loss that was not finite
    step_time_ms: float = float("nan")  # one training step of all replicas, without scoring
    samples_seen: int = 0  # by each replica
    cost: float = 0.0  # multiply-adds of each replica's steps, as training_cost counts them
    peak_mem_mib: float = float("nan")  # CUDA's own figure; on the CPU the process's peak growth

    @property
    def val_ce(self) -> np.ndarray:
        """Held-out cross-entropy in nats after the last step."""
        return self.curves["val_ce"][-1]

    @property
    def val_accuracy(self) -> np.ndarray:
        """Held-out accuracy after the last step."""
        return self.curves["val_accuracy"][-1]


class Training:
    """R replicas of one shape in training.

    All that a step or a scoring touches lives on the device and stays in its place, so that a GPU replays each as one
    CUDA graph, captured once for all trainings of a shape: start sets everything else in place.
    loss_sum (R,) since it was last zeroed, diverged (R,) the step (from 1) of the first loss that was not finite, or 0.
    """

    def __init__(
        self,
        shape: Hyperparameters,
        task: Task,
        budget: Budget,
        device: torch.device,
        precision: str,
        without: str = "",
        network: str = "ctbprn",
    ) -> None:
        self.task, self.budget, self.network, R = task, budget, network, budget.n_replicas
        self.autocast, self.memory = precision_context(precision, device), PeakMemory(device)
        self.shape, self.model = shape, _model(shape, task, R, None, network).to(device)
        self.without = self.model.without = without
        self.parameters = list(self.model.parameters())
        self.generator = torch.Generator(device)
        self.rate = torch.zeros((), device=device)
        self.rates = torch.zeros(budget.n_steps + 3, device=device)  # three: a graph's warm-up
        on_gpu = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=self.rate, weight_decay=shape.weight_decay, fused=True, capturable=on_gpu
        )
        for p in self.parameters:  # as AdamW would make it at its first step
            moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            self.optimizer.state[p] = {"step": torch.zeros((), device=device), **moments}
        self.taken = torch.zeros(1, dtype=torch.long, device=device)
        self.loss_sum, self.diverged = torch.zeros(R, device=device), torch.zeros(R, dtype=torch.long, device=device)
        n_sums = 2 + shape.n_layers + 2 * task.n_classes
        self.totals = torch.zeros(n_sums, R, dtype=torch.double, device=device)
        self.step = captured(self._step, self.generator)
        self._score_replays = {split: captured(partial(self._score, split), self.generator) for split in SCORED}
        self._mib = self.memory.mib() if on_gpu else None  # a replay allocates nothing, so later there is no peak

    def start(self, hyperparameters: Hyperparameters, seed: int | np.random.SeedSequence) -> None:
        """Begin anew, as untrained begins: initial values, AdamW's moments, rates and random draws."""
        model, generator = untrained(hyperparameters, self.task, self.budget.n_replicas, seed, network=self.network)
        self.generator.manual_seed(generator.initial_seed())
        with torch.no_grad():
            for ours, theirs in zip(self.model.state_dict().values(), model.state_dict().values(), strict=True):
                ours.copy_(theirs)
        for tensor in self._progress().values():
            tensor.zero_()
        self.rates[: self.budget.n_steps] = rates(self.budget.schedule, hyperparameters.lr, self.budget.n_steps)

    def state(self) -> dict[str, torch.Tensor]:
        """{name: CPU tensor} of all that changes from one scoring to the next."""
        tensors = {**self.model.state_dict(), **self._progress(), "draws": self.generator.get_state()}
        return {name: tensor.detach().cpu() for name, tensor in tensors.items()}

    @torch.no_grad()
    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from a state of a training of the same shape.  Raises InputError if it is of another one."""
        mine = self.state()
        if {n: (t.shape, t.dtype) for n, t in mine.items()} != {n: (t.shape, t.dtype) for n, t in state.items()}:
            raise InputError("its tensors are not those of this training")
        self.generator.set_state(state["draws"])
        for name, tensor in {**self.model.state_dict(), **self._progress()}.items():
            tensor.copy_(state[name])

    def _progress(self):
        moments = enumerate(self.optimizer.state.values())
        return {"taken": self.taken, "diverged": self.diverged, "loss_sum": self.loss_sum} | {
            f"adamw.{i}.{name}": tensor for i, state in moments for name, tensor in state.items()
        }

    def scores(self, split: str = "validation") -> dict[str, np.ndarray]:
        """Noise-free validation scores of each replica, as score gives them, and route_accuracy of its best layer.

        split: "validation", or "interim" for the few samples that serve the pruner.
        """
        self._score_replays[split]()
        scores = named(self.totals, self.shape.n_layers, self.task.n_classes, "validation")
        return scores | route_accuracy(scores, scores)

    def mean_loss(self, n_steps: int) -> np.ndarray:
        """(R,) mean training loss in nats of the last n_steps; the sum begins anew.

        It reads from the device, so that a clock looked at afterwards is right.
        """
        mean = (self.loss_sum / n_steps).double().cpu().numpy()
        self.loss_sum.zero_()
        return mean

    def peak_mem_mib(self) -> float:
        """CUDA's own figure; on the CPU the process's peak growth."""
        return self.memory.mib() if self._mib is None else self._mib

    def _step(self):
        hp = self.shape
        batch = self.task.draw(self.budget.n_replicas, hp.batch_size, self.generator, hp.seq_len)
        shape = (*batch.y.shape[:1], hp.n_layers, hp.batch_size, self.task.n_areas)
        noise = hp.gate_noise * gumbel_noise(shape, self.generator)
        x, keep = augmented(batch, hp, self.generator), dropped(self.model, hp, self.generator)
        with self.autocast():
            logits, _ = self.model(x, None if self.without == "noise" else noise, batch.mask, keep)
        loss = cross_entropy(logits, batch.y).mean(1)  # (R,); summed, each replica gets the gradient of a solo run
        loss.sum().backward()
        clip_gradients(self.parameters, self.budget.clip)
        self.rate.copy_(self.rates.index_select(0, self.taken)[0])
        self.optimizer.step()
        self.optimizer.zero_grad()
        loss = loss.detach()
        self.taken.add_(1)
        self.loss_sum.add_(loss)
        self.diverged.copy_(torch.where((self.diverged == 0) & ~loss.isfinite(), self.taken, self.diverged))

    def _score(self, split):
        args = split, self.budget.n_validation, self.shape.seq_len, self.autocast
        self.totals.copy_(totals(self.model, self.task, *args))


_captured_once = lru_cache(128)(Training)  # for GPUs, where making one means capturing two graphs


def _training(*settings):
    device = settings[3]
    if device.type == "cpu":
        return Training(*settings)
    with suppress(torch.OutOfMemoryError):
        return _captured_once(*settings)
    _captured_once.cache_clear()  # the shapes before hold memory that this one may need
    torch.cuda.empty_cache()
    return _captured_once(*settings)


def fit(
    hyperparameters: Hyperparameters,
    task: Task,
    budget: Budget | None = None,
    seed: int | np.random.SeedSequence = 0,
    device: str = "auto",
    on_eval: Callable[[Fit], None] | None = None,
    checkpoint: str | Path | None = None,
    without: str = "",
    network: str = "ctbprn",
) -> Fit:
    """Train R replicas at once and return their Fit.

    seed: initial values, batches and noise of every replica follow from it, so on one CPU the same call gives the same
    bits.
    on_eval(fit) is called after each scoring and may raise to stop.
    checkpoint: a file in which the training is kept every CHECKPOINT_SECONDS. The same call goes on from there if it
    was stopped. The caller removes it (checkpoint.remove) when the result is safe.
    network: one of NETWORKS; a Transformer has no rank and no temperature.
    without: one of PARTS, which is left out of the network while it is trained and scored; "" for none.
    A replica whose loss is not finite is recorded in diverged_at and cannot harm its neighbours.
    Raises InputError for values that do not fit the task or the machine.
    """
    hp, budget = hyperparameters, budget or Budget()
    if network not in NETWORKS or (without and network != "ctbprn"):
        raise InputError(f"network must be one of {', '.join(NETWORKS)}, and only ctbprn has parts, got {network!r}")
    if without not in ("", *PARTS):
        raise InputError(f"without must be one of {', '.join(PARTS)}, or empty, got {without!r}")
    if hp.seq_len > task.n_tokens:
        raise InputError(f"seq_len must be at most the task's {task.n_tokens} tokens, got {hp.seq_len}")
    place = resolve_device(device)
    precision = resolve_precision(budget.precision, place)
    _move_to(place, task, hp, budget)
    training = _training(replace(hp, lr=1.0, temperature=1.0), task, budget, place, precision, without, network)
    root = seed if isinstance(seed, np.random.SeedSequence) else np.random.SeedSequence(seed)
    training.start(hp, root)
    n_parameters = sum(p[0].numel() for p in training.parameters)
    result = Fit(hp, budget, training.model, str(place), precision, n_parameters)
    n_evals = min(budget.n_evals, budget.n_steps)
    eval_steps = np.linspace(0, budget.n_steps, n_evals + 1)[1:].astype(int).tolist()
    identity = dict(
        hyperparameters=hp.identity(), budget=asdict(budget), task=task.description, device=place.type,
        precision=precision, torch=torch.__version__, seed=[str(root.entropy), *root.spawn_key],
    )  # fmt: skip
    if without:
        identity["without"] = without
    if network != "ctbprn":
        identity["network"] = network
    if checkpoint:
        checkpoints.read(checkpoint, identity, partial(_resume, training, result, eval_steps))

    clock = _Clock(training, result)
    saved = time.monotonic()
    for step in _with_progress(range(clock.step + 1, budget.n_steps + 1), is_told=not checkpoint):
        training.step()
        if step in eval_steps:
            train_ce = training.mean_loss(step - (result.steps[-1] if result.steps else 0))
            clock.stop(step)
            _record(training, result, step, train_ce)
            if on_eval:
                on_eval(result)
            clock.start()
        if checkpoint and step < budget.n_steps and time.monotonic() - saved >= CHECKPOINT_SECONDS:
            state = training.state()  # which waits for the device, so the clock is right
            clock.stop(step)
            checkpoints.write(checkpoint, state, identity, _progress(result, step))
            saved = time.monotonic()
            clock.start()
    if place.type == "cuda":
        result.model = copy.deepcopy(training.model)  # the next training of this shape begins in the same place
    return result


class _Clock:
    """Keeps a Fit's step_time_ms: the seconds of training steps alone, over the steps taken so far."""

    def __init__(self, training: Training, result: Fit) -> None:
        self.result, self.step = result, int(training.taken)  # steps taken, more than none after a checkpoint
        self.seconds = result.step_time_ms * self.step / 1000 if self.step else 0.0
        self.start()

    def start(self) -> None:
        """Training steps begin."""
        self.started = time.perf_counter()

    def stop(self, step: int) -> None:
        """So many steps are taken, and what comes now is not training."""
        self.seconds += time.perf_counter() - self.started
        self.result.step_time_ms = 1000 * self.seconds / step


def _with_progress(steps: range, is_told: bool) -> Iterator[int]:
    """The steps. In a notebook a line says every two seconds how far they are, and at the end how long they took.

    is_told: whether there is such a line; searches and confirmations, which have lines of their own, need none.
    """
    if not is_told or not hasattr(sys.modules.get("IPython"), "get_ipython"):
        yield from steps
        return
    from IPython import get_ipython
    from IPython.display import DisplayHandle

    if get_ipython() is None:
        yield from steps
        return
    line, started = DisplayHandle(), time.monotonic()
    shown = started
    for step in steps:
        if time.monotonic() - shown >= PROGRESS_SECONDS:
            show = line.display if shown == started else line.update
            show({"text/plain": f"training: step {step} of {steps.stop - 1}"}, raw=True)
            shown = time.monotonic()
        yield step
    if shown > started:
        line.update({"text/plain": f"trained for {len(steps)} steps in {time.monotonic() - started:.0f} s"}, raw=True)


def _move_to(device, task, hp, budget):
    """Put the validation samples on the device, where they stay, before the memory of a training is measured."""
    for split in SCORED:
        for _ in task.fixed(split, budget.n_validation, hp.seq_len, device):
            pass
    if device.type == "cuda":
        task.draw(1, 1, torch.Generator(device), hp.seq_len)


def _record(training, result, step, train_ce):
    """Score the training after a step, and add that to the result."""
    scores = training.scores("validation" if step == result.budget.n_steps else "interim")
    worthless = torch.from_numpy(~np.isfinite(scores["val_ce"])).to(
        training.diverged.device
    )  # the last update broke it
    training.diverged.masked_fill_((training.diverged == 0) & worthless, step)
    lost = training.diverged.cpu().numpy() > 0
    for name, values in {"train_ce": train_ce, **scores}.items():
        result.curves[name] = np.vstack([*result.curves.get(name, []), np.where(lost, np.nan, values)])
    result.steps.append(step)
    result.diverged_at = [at or None for at in training.diverged.tolist()]
    result.samples_seen = step * result.hyperparameters.batch_size
    result.cost = training_cost(result.hyperparameters, training.task, step)
    result.peak_mem_mib = training.peak_mem_mib()


def _progress(result, step):
    """How far a training has come, as a checkpoint keeps it beside its state."""
    curves = {name: curve.tolist() for name, curve in result.curves.items()}
    return dict(step=step, steps=result.steps, curves=curves, step_time_ms=result.step_time_ms)


def _resume(training, result, eval_steps, state, progress):
    """Set a training and its result to what a checkpoint holds.  Raises InputError if that does not fit."""
    steps, step_time_ms = progress["steps"], float(progress["step_time_ms"])
    curves = {name: np.array(rows, dtype=float) for name, rows in progress["curves"].items()}
    shapes = {curve.shape for curve in curves.values()}
    expected = {(len(steps), result.budget.n_replicas)} if steps else set()
    if steps != eval_steps[: len(steps)] or shapes != expected:
        raise InputError("its curves are not those of this training")
    taken, last = int(state["taken"]), steps[-1] if steps else 0
    following = next((step for step in eval_steps if step > last), last)
    if taken != progress["step"] or not last <= taken < following:
        raise InputError("its state is not that of its curves")
    training.restore(state)
    result.steps, result.curves, result.step_time_ms = steps, curves, step_time_ms


def untrained(
    hyperparameters: Hyperparameters,
    task: Task,
    n_replicas: int,
    seed: int | np.random.SeedSequence = 0,
    device: str | torch.device = "cpu",
    network: str = "ctbprn",
) -> tuple[Network, torch.Generator]:
    """The untrained model that fit begins with, and the generator that its batches and noise come from."""
    root = seed if isinstance(seed, np.random.SeedSequence) else np.random.SeedSequence(seed)
    init, stream = (int(s) for s in root.generate_state(2, np.uint64))
    seeds = np.random.SeedSequence(init).generate_state(n_replicas, np.uint32).tolist()
    model = _model(hyperparameters, task, n_replicas, seeds, network)
    return model.to(device), torch.Generator(device).manual_seed(stream)


def _model(hp, task, n_replicas, seed, network):
    if network == "transformer":
        sizes = (task.n_features, hp.d, task.n_areas, hp.n_layers, task.n_classes, task.n_tokens)
        return Transformer(*sizes, n_replicas, seed=seed)
    sizes = (task.n_features, hp.d, hp.rank, task.n_areas, hp.n_layers, task.n_classes)
    return CTBPRN(*sizes, hp.temperature, n_replicas, seed=seed)


def training_cost(hyperparameters: Hyperparameters, task: Task, n_steps: int) -> int:
    """The multiply-adds of training one replica for so many steps, which no busy machine changes.

    The forward and the backward pass of a sample together count as three forward passes (see multiply_adds).
    """
    return 3 * multiply_adds(hyperparameters, task) * hyperparameters.batch_size * n_steps


def multiply_adds(hyperparameters: Hyperparameters, task: Task) -> int:
    """The multiply-adds of one replica's forward pass on one sample; a training step takes about three times as many.

    It counts matrix products alone, each as the network computes it (see Layer.forward).
    """
    hp, K, T = hyperparameters, task.n_areas, min(hyperparameters.seq_len, task.n_tokens)
    d, r = hp.d, hp.rank
    message = min(K * r, d)  # width of what an area receives, before it is multiplied by W_a and half of W_g
    tokens = K * T * (4 * d * d + 2 * d * message + d * r)
    if K * r >= d:  # the message itself is formed
        tokens += T * K * r * d
    controller = K * d * d + 2 * K * d * d + 2 * d * K
    stem, head = K * T * task.n_features * d, K * d * task.n_classes
    return stem + hp.n_layers * (tokens + controller) + head


def rates(schedule: str, lr: float, n_steps: int) -> torch.Tensor:
    """(n_steps,) the learning rate of each step."""
    if schedule == "constant":
        return torch.full((n_steps,), lr)
    optimizer, values = torch.optim.SGD([torch.zeros(1)], lr), []
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, max(n_steps, 4), cycle_momentum=False)
    for _ in range(n_steps - 1):
        values.append(cycle.get_last_lr()[0])
        optimizer.step()
        cycle.step()
    return torch.tensor([*values, cycle.get_last_lr()[0]])


def augmented(batch: Batch, hyperparameters: Hyperparameters, generator: torch.Generator) -> torch.Tensor:
    """The input x (R,B,K,T,F) of a training batch with noise, and shifted in time by up to time_shift tokens.

    Each sample is shifted by a number of its own; its first or last token that exists is repeated. input_noise is in
    standard deviations of the features, which are 1. Nothing is drawn where both are 0.
    """
    x, mask, hp = batch.x, batch.mask, hyperparameters
    if hp.input_noise:
        noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        x = x + hp.input_noise * (noise if mask is None else noise * mask[:, :, None, :, None])
    if hp.time_shift:
        (R, B, K, T, F), most = x.shape, hp.time_shift
        shift = torch.randint(-most, most + 1, (R, B, 1), generator=generator, device=x.device)
        last = torch.full_like(shift, T - 1) if mask is None else mask.sum(2, keepdim=True) - 1
        at = (torch.arange(T, device=x.device) + shift).clamp(min=0).minimum(last)  # (R,B,T)
        moved = x.gather(3, at[:, :, None, :, None].expand(R, B, K, T, F))
        x = moved if mask is None else moved * mask[:, :, None, :, None]
    return x


def dropped(model: Network, hyperparameters: Hyperparameters, generator: torch.Generator) -> torch.Tensor | None:
    """(R,B,width) by what the features before the head are multiplied: 0 for a share dropout of them; None for none."""
    share = hyperparameters.dropout
    if not share:
        return None
    shape = (model.config["n_replicas"], hyperparameters.batch_size, model.width)
    draws = torch.rand(shape, generator=generator, device=generator.device)
    return (draws >= share) / (1 - share)


def gumbel_noise(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """-log(E), E ~ Exp(1), as -log(-log(u)): several times faster than drawing E on a CPU."""
    u = torch.rand(shape, generator=generator, device=generator.device)
    return u.clamp_(min=1e-20).log_().neg_().log_().neg_()


def clip_gradients(parameters: list[torch.nn.Parameter], largest: float) -> None:
    """Scale each replica's gradient, over all parameters, to a norm of at most largest."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack([torch.linalg.vector_norm(gradient.flatten(1), dim=1) for gradient in gradients])
    factor = (largest / (torch.linalg.vector_norm(norms, dim=0) + 1e-6)).clamp(max=1)  # (R,)
    for gradient in gradients:
        gradient.mul_(factor.view(-1, *[1] * (gradient.ndim - 1)))
