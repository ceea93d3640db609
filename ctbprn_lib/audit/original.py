"""The original protocol, run again draw for draw, and what its scores are worth.

The protocol is kept so that the published numbers can be reproduced and explained, not because it is sound.
A trial trains one seed for five steps. After each step the network is scored on a fresh batch of at most 32 samples,
with the noise of the gate still on. "Val Acc" is the best of these five accuracies. "CE Loss" is the mean of the five
training losses. tests/reference.py holds the same training as a plain loop.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import optuna
import pandas as pd
import torch
import torch._dynamo  # torch.optim imports it on first use: a second of import, which is no part of the protocol

from ctbprn_lib import InputError, __version__, files, published
from ctbprn_lib.model import CTBPRN
from ctbprn_lib.scoring import cross_entropy, score
from ctbprn_lib.tasks import RoutingTask
from ctbprn_lib.train import Hyperparameters

COLUMNS: list[str] = list(published.TABLE.columns)
SCORES, SETTINGS = COLUMNS[1:3], COLUMNS[3:]
# Digits after the point with which the original report prints each column.
DIGITS = {"val_accuracy": 4, "ce_loss": 4, "lr": 5, "d": 0, "rank": 0, "temperature": 2, "batch_size": 0, "seq_len": 0}
N_AREAS, N_LAYERS, N_CLASSES, N_STEPS = 2, 2, 2, 5


def run_study(n_trials: int = 10, tpe_seed: int = 42, data_seed: int = 42, device: str = "cpu") -> pd.DataFrame:
    """Run the whole original study.

    tpe_seed: the seed of the sampler. data_seed: the seed of every trial. device: where torch trains.
    Returns one row for each trial, with the columns COLUMNS.
    """
    sampler = optuna.samplers.TPESampler(n_startup_trials=5, seed=tpe_seed)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    rows = []

    def objective(trial: optuna.Trial) -> float:
        hp = Hyperparameters(
            lr=trial.suggest_float("lr", 1e-4, 1e-2, log=True),
            d=trial.suggest_categorical("d", [32, 64, 96]),
            rank=trial.suggest_categorical("rank", [4, 8, 16]),
            temperature=trial.suggest_float("temperature", 0.5, 2.0),
            batch_size=trial.suggest_categorical("batch_size", [8, 16, 32]),
            seq_len=trial.suggest_categorical("seq_len", [32, 64, 128]),
        )
        try:
            losses, accuracies, _ = run_seeds(hp, [data_seed], device=device)
        except torch.OutOfMemoryError:  # the original gave such a trial the score 0.0
            losses, accuracies = np.full((1, 1), np.nan), np.zeros((1, 1))
        val_accuracy, ce_loss = published_score(losses[:, 0], accuracies[:, 0])
        rows.append([trial.number, val_accuracy, ce_loss, *(trial.params[name] for name in SETTINGS)])
        return val_accuracy

    study.optimize(objective, n_trials=n_trials)
    return pd.DataFrame(rows, columns=COLUMNS)


def published_score(losses: np.ndarray, accuracies: np.ndarray) -> tuple[float, float]:
    """The original's scores of one seed.

    losses, accuracies: (rounds,) the training loss in nats and the noisy accuracy of each round.
    Returns ("Val Acc", "CE Loss"). The original stopped after the third or a later round if no accuracy had reached
    0.4, so later rounds do not count here.
    """
    best_so_far = np.maximum.accumulate(accuracies)
    stops = (best_so_far < 0.4) & (np.arange(len(accuracies)) >= 2)
    n_rounds = int(np.argmax(stops)) + 1 if stops.any() else len(accuracies)
    return float(best_so_far[n_rounds - 1]), float(np.mean(losses[:n_rounds]))


def run_seeds(
    hp: Hyperparameters,
    seeds: Sequence[int],
    n_steps: int = N_STEPS,
    device: str = "cpu",
    on_step: Callable[[int, CTBPRN], None] | None = None,
) -> tuple[np.ndarray, np.ndarray, CTBPRN]:
    """Run the original's training loop for R seeds side by side.

    Each seed has random draws of its own, in the original's order, so it gives the same numbers as if it ran alone.
    on_step: called with the step (from 1) and the model after each step.
    Returns the training losses (n_steps, R) in nats, the noisy accuracies (n_steps, R), and the trained model.
    """
    d, B, T, R = hp.d, hp.batch_size, hp.seq_len, len(seeds)
    n_scored = min(32, 2 * B)
    model = CTBPRN(d, d, hp.rank, N_AREAS, N_LAYERS, N_CLASSES, hp.temperature, R, stem=False, seed=None)
    streams = [_build(model, r, seed, device) for r, seed in enumerate(seeds)]
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=hp.lr)
    losses, accuracies = [], []
    for step in range(1, n_steps + 1):
        x, y, gumbel = _draw_for_all(streams, B, T, d)
        loss = cross_entropy(model(x, gumbel)[0], y).mean(1)  # (R,)
        optimizer.zero_grad()
        loss.sum().backward()  # each seed gets the gradient of a run of its own
        optimizer.step()
        losses.append(loss.detach())
        x, y, gumbel = _draw_for_all(streams, n_scored, T, d)
        with torch.no_grad():
            accuracies.append((model(x, gumbel)[0].argmax(-1) == y).float().mean(1))
        if on_step:
            on_step(step, model)
    return torch.stack(losses).double().cpu().numpy(), torch.stack(accuracies).double().cpu().numpy(), model


def coin_scores(n_studies: int, seed: int = 0) -> np.ndarray:
    """Simulate the "Val Acc" of the ten published trials for a network that guesses by the throw of a fair coin.

    Returns (n_studies, 10) accuracies in [0, 1].
    """
    rng = np.random.default_rng(seed)
    n_scored = np.minimum(32, 2 * published.TABLE["batch_size"].to_numpy())
    accuracies = rng.binomial(n_scored, 0.5, size=(n_studies, N_STEPS, len(n_scored))) / n_scored
    best_so_far = np.maximum.accumulate(accuracies, 1)
    for i in range(2, N_STEPS - 1):  # a trial that stops after round i keeps its best of that round
        best = best_so_far[:, i : i + 1]
        best_so_far[:, i + 1 :] = np.where(best < 0.4, best, best_so_far[:, i + 1 :])
    return best_so_far[:, -1]


def reproduced(table: pd.DataFrame) -> pd.DataFrame:
    """Compare a run of the protocol with the published table.

    table: as run_study returns it.
    Returns a Boolean frame with one row for each published trial and the columns of DIGITS. A cell is True where both
    numbers are the same when rounded as published.
    """
    ours = table.set_index("trial").reindex(published.TABLE["trial"])
    theirs = published.TABLE.set_index("trial")
    return pd.DataFrame({name: (ours[name] - theirs[name]).abs() < 0.5001 * 10.0**-n for name, n in DIGITS.items()})


def answer(cpu: pd.DataFrame, gpu: pd.DataFrame | None = None) -> str:
    """A sentence that says whether this is the published system.

    cpu, gpu: what reproduced returns for a run on a CPU and, if there was one, for a run on a CUDA GPU.
    """
    drawn = cpu.loc[:4, SETTINGS].to_numpy()  # the sampler draws these trials before it looks at a score
    n_scores, n_on_cpu = cpu[SCORES].size, cpu[SCORES].to_numpy().sum()
    is_same = "" if drawn.all() else "not "
    text = (
        f"**The search is {is_same}the published one**: {drawn.sum()} of the {drawn.size} "
        "hyperparameters that it draws before it looks at a score are the same. "
        f"**Of the {n_scores} scores {n_on_cpu} are the same on a CPU**, whose random numbers are others "
        "than those of the original's CUDA GPU"
    )
    if gpu is None:
        return f"{text}; whether the scores come back can be seen on such a GPU alone, which this run had not."
    return f"{text}; on the CUDA GPU of this run {gpu[SCORES].to_numpy().sum()} of {n_scores} come back."


def tally(same: pd.DataFrame) -> str:
    """A sentence that says how many of the published numbers appear again.

    same: what reproduced returns.
    """
    parts = {
        "hyperparameters of trials 0 to 4": same.loc[:4, SETTINGS],
        "hyperparameters of trials 5 to 9": same.loc[5:, SETTINGS],
        "scores": same[SCORES],
    }
    counts = ", ".join(f"{int(part.to_numpy().sum())} of {part.size} {name}" for name, part in parts.items())
    return f"Of the {same.size} published numbers {int(same.to_numpy().sum())} appear again: {counts}."


def seed_scores(
    hp: Hyperparameters,
    seeds: Sequence[int],
    device: str = "cpu",
    n_samples: int = 0,
    n_steps: int = N_STEPS,
    portion: int = 8,
) -> pd.DataFrame:
    """Run the protocol with many seeds of one configuration.

    n_samples: fresh samples on which each trained network is scored without noise; 0 for no such score.
    portion: how many seeds are trained side by side.
    Returns one row for each seed with the columns seed, val_accuracy and ce_loss (as the original prints them) and, if
    n_samples is above 0, test_accuracy and test_ce (nats).
    """
    task, tables = RoutingTask(N_AREAS, hp.d, hp.seq_len), []
    for i in range(0, len(seeds), portion):
        group = list(seeds[i : i + portion])
        losses, accuracies, model = run_seeds(hp, group, n_steps, device)
        fresh = score(model, task, "test", n_samples) if n_samples else {}
        scores = [published_score(losses[:, r], accuracies[:, r]) for r in range(len(group))]
        table = pd.DataFrame(scores, columns=["val_accuracy", "ce_loss"])
        table.insert(0, "seed", group)
        tables.append(table.assign(**{name: fresh[name] for name in ("test_accuracy", "test_ce") if fresh}))
    return pd.concat(tables, ignore_index=True)


def accuracy_by_step(
    hp: Hyperparameters, seeds: Sequence[int], steps: Sequence[int], device: str = "cpu", n_samples: int = 8192
) -> pd.DataFrame:
    """Continue the original's training beyond its five steps, and score it without noise on fresh samples.

    steps: the steps (from 1) after which the networks are scored.
    Returns one row for each step and seed, with the columns step, seed and test_accuracy.
    """
    task, tables = RoutingTask(N_AREAS, hp.d, hp.seq_len), []

    def add_scores(step: int, model: CTBPRN) -> None:
        if step in steps:
            accuracies = score(model, task, "test", n_samples)["test_accuracy"]
            tables.append(pd.DataFrame({"step": step, "seed": list(seeds), "test_accuracy": accuracies}))

    run_seeds(hp, seeds, max(steps), device, add_scores)
    return pd.concat(tables, ignore_index=True)


def read_or_make(path: Path, make: Callable[[], pd.DataFrame], **settings: object) -> pd.DataFrame:
    """Read the table that an earlier call wrote to path, or make it and write it there.

    make: returns the table. settings: plain values that the table depends on. The file holds them, the versions of
    torch and of this library, and a SHA-256 of the table in columns of its own.
    The table is made again if the file is damaged, or if it was made with other settings or versions.
    """
    settings |= {"torch": torch.__version__, "ctbprn": __version__}
    with suppress(InputError):
        content = files.table(path, text=[*settings, "sha256"])
        table = content.drop(columns=[*settings, "sha256"])
        expected = settings | {"sha256": _sha256(table)}
        if len(table) and all((content[name] == str(value)).all() for name, value in expected.items()):
            return table
    path.parent.mkdir(parents=True, exist_ok=True)
    table = make()
    with files.whole(path) as new:
        table.assign(**settings, sha256=_sha256(table)).to_csv(new, index=False)
    return table


def add_minutes(folder: Path, minutes: float) -> str:
    """Add the minutes of this run to those of earlier runs, whose sum is in folder.

    Earlier runs count because their tables in folder are used again. A file that cannot be read counts as 0 minutes.
    Returns the sum as text, which says if earlier runs are in it.
    """
    path, earlier = folder / "minutes.txt", 0.0
    with suppress(OSError, ValueError):
        earlier = float(path.read_text())
    with files.whole(path) as new:
        new.write_text(f"{earlier + minutes:.2f}\n")
    text = f"{earlier + minutes:.0f} minutes"
    return f"{text} (with those of earlier runs, whose tables were there)" if earlier > 0 else text


def _sha256(table: pd.DataFrame) -> str:
    return hashlib.sha256(table.to_csv(index=False).encode()).hexdigest()


def _build(model: CTBPRN, r: int, seed: int, device: str) -> torch.Generator:
    """Draw the initial values of replica r, and return a generator that goes on as the original's global one did.

    The original builds the network on the CPU. That changes the state of the CPU's generator, but not that of a GPU's.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.draw_initial_values(r)
        state = torch.get_rng_state()
    if torch.device(device).type == "cpu":
        return torch.Generator().set_state(state)
    return torch.Generator(device).manual_seed(seed)


def _draw_for_all(
    streams: Iterable[torch.Generator], B: int, T: int, d: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The next batch of each stream, stacked: x (R,B,K,T,d), y (R,B), gumbel (R,L,B,K)."""
    x, y, gumbel = zip(*(_draw(stream, B, T, d) for stream in streams), strict=True)
    return torch.stack(x), torch.stack(y), torch.stack(gumbel)


def _draw(stream: torch.Generator, B: int, T: int, d: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A batch and the noise of the layers, in the original's order of draws: x (B,K,T,d), y (B,), gumbel (L,B,K)."""
    device, q = stream.device, d // 4
    x = torch.stack([torch.randn(B, T, d, generator=stream, device=device) * 0.7 for _ in range(N_AREAS)], 1)
    target = torch.randint(0, N_AREAS, (B,), generator=stream, device=device)
    v = torch.stack([torch.randn(q, generator=stream, device=device) * 0.5 for _ in range(B)])  # (B,q)
    sample = torch.arange(B, device=device)
    x[sample, target, :, :q] += v[:, None]
    y = (x[sample, target, :, :q].sum((1, 2)) > 0).long()
    gumbel = [
        -torch.empty(B, N_AREAS, device=device).exponential_(generator=stream).log()  # (B,K)
        for _ in range(N_LAYERS)
    ]
    return x, y, torch.stack(gumbel)
