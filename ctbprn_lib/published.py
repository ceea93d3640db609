"""The original protocol, draw for draw, and the original table: kept to reproduce and explain, not because it is sound.

A trial is one seed: five steps, each followed by a fresh batch of at most 32 samples scored with the gate's noise on.
"Val Acc" is the best of those five accuracies, "CE Loss" the mean of the five training losses (MODEL section 4).
"""

import hashlib
import io
from contextlib import suppress

import numpy as np
import optuna
import pandas as pd
import torch
import torch._dynamo  # torch.optim imports it on first use: a second of import, not of the protocol

from ctbprn_lib import InputError, __version__, files
from ctbprn_lib.model import CTBPRN, draw_initial_values
from ctbprn_lib.scoring import cross_entropy, score
from ctbprn_lib.tasks import RoutingTask
from ctbprn_lib.train import Hyperparameters

COLUMNS = ["trial", "val_accuracy", "ce_loss", "lr", "d", "rank", "temperature", "batch_size", "seq_len"]
# The ten rows of the published report, as printed there.
TABLE = pd.read_csv(
    io.StringIO("""trial,val_accuracy,ce_loss,lr,d,rank,temperature,batch_size,seq_len
0,0.7500,0.7030,0.00056,32,4,1.80,16,32
1,0.6250,0.6470,0.00023,96,16,0.71,32,32
2,0.7813,0.6495,0.00153,64,16,1.71,32,128
3,0.6250,0.6715,0.00012,32,16,0.78,8,128
4,0.6875,0.6556,0.00015,96,16,1.04,16,128
5,0.6563,0.6520,0.00596,64,8,1.71,32,64
6,0.6875,0.6975,0.00318,64,4,1.47,32,128
7,0.6875,0.7184,0.00126,64,8,1.37,8,64
8,0.7813,0.6498,0.00149,64,16,2.00,32,128
9,0.6563,0.6612,0.00050,64,16,1.13,32,128
""")
)
DIGITS = {"val_accuracy": 4, "ce_loss": 4, "lr": 5, "d": 0, "rank": 0, "temperature": 2, "batch_size": 0, "seq_len": 0}
N_AREAS, N_LAYERS, N_STEPS = 2, 2, 5


def run_study(n_trials=10, tpe_seed=42, data_seed=42, device="cpu"):
    """The whole original study: a DataFrame with one row a trial and the columns COLUMNS."""
    study = optuna.create_study(
        direction="maximize", sampler=optuna.samplers.TPESampler(n_startup_trials=5, seed=tpe_seed)
    )
    rows = []

    def objective(trial):
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
        except torch.OutOfMemoryError:  # the original scored it 0.0
            losses, accuracies = np.full((1, 1), np.nan), np.zeros((1, 1))
        score, ce_loss = published_score(losses[:, 0], accuracies[:, 0])
        rows.append([trial.number, score, ce_loss, *(trial.params[name] for name in COLUMNS[3:])])
        return score

    study.optimize(objective, n_trials=n_trials)
    return pd.DataFrame(rows, columns=COLUMNS)


def published_score(losses, accuracies):
    """The original's "Val Acc" and "CE Loss" of one seed from its losses and accuracies (one a round).

    It stopped once three rounds were done and no accuracy had reached 0.4.
    """
    best = np.maximum.accumulate(accuracies)
    hopeless = np.flatnonzero((best < 0.4) & (np.arange(len(best)) >= 2))
    rounds = hopeless[0] + 1 if len(hopeless) else len(best)
    return float(best[rounds - 1]), float(np.mean(losses[:rounds]))


def run_seeds(hp, seeds, n_steps=N_STEPS, device="cpu", on_step=None):
    """The original's training loop for several seeds side by side; each seed's random draws are its own, in its order.

    hp: Hyperparameters.  Returns training losses and noisy accuracies, both (n_steps, R), and the trained model.
    on_step(step, model) is called after each step.
    """
    d, B, T = hp.d, hp.batch_size, hp.seq_len
    R, n_scored = len(seeds), min(32, 2 * B)
    model = CTBPRN(d, d, hp.rank, N_AREAS, N_LAYERS, 2, hp.temperature, R, stem=False, seed=seeds)
    streams = [_stream_after_building(model.config, seed, device) for seed in seeds]
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=hp.lr)
    losses, accuracies = [], []
    for step in range(1, n_steps + 1):
        x, y, gumbel = _draw_all(streams, B, T, d)
        loss = cross_entropy(model(x, gumbel)[0], y).mean(1)
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
        losses.append(loss.detach())
        x, y, gumbel = _draw_all(streams, n_scored, T, d)
        with torch.no_grad():
            accuracies.append((model(x, gumbel)[0].argmax(-1) == y).float().mean(1))
        if on_step:
            on_step(step, model)
    return torch.stack(losses).double().cpu().numpy(), torch.stack(accuracies).double().cpu().numpy(), model


def coin_scores(n_studies, seed=0):
    """(n_studies, 10) published-style scores of the ten published trials if every answer is the throw of a coin."""
    rng = np.random.default_rng(seed)
    n = np.minimum(32, 2 * TABLE["batch_size"].to_numpy())
    hits = rng.binomial(n, 0.5, size=(n_studies, N_STEPS, len(n))) / n
    rounds = np.maximum.accumulate(hits, 1)
    for i in range(2, N_STEPS - 1):  # stopped after a round: the later ones never happened
        rounds[:, i + 1 :] = np.where(rounds[:, i : i + 1] < 0.4, rounds[:, i : i + 1], rounds[:, i + 1 :])
    return rounds[:, -1]


def reproduced(table):
    """Which published numbers a run of the protocol shows again, rounded as published: Boolean, one row a trial."""
    ours = table.set_index("trial").reindex(TABLE["trial"])
    theirs = TABLE.set_index("trial")
    return pd.DataFrame({name: (ours[name] - theirs[name]).abs() < 0.5001 * 10.0**-n for name, n in DIGITS.items()})


def answer(cpu, gpu=None):
    """Whether this is the published system, as far as reproduced(...) of a CPU's and of a GPU's run can say."""
    settings, scores = list(cpu.columns[2:]), list(cpu.columns[:2])
    drawn, n = cpu.loc[:4, settings].to_numpy(), cpu[scores].size
    said = (
        f"**The search is {'' if drawn.all() else 'not '}the published one**: {drawn.sum()} of the {drawn.size} "
        "hyperparameters that it draws before it looks at a score are the same. "
        f"**Of the {n} scores {cpu[scores].to_numpy().sum()} are the same on a CPU**, whose random numbers are others "
        "than those of the original's CUDA GPU"
    )
    if gpu is None:
        return f"{said}; whether the scores come back can be seen on such a GPU alone, which this run had not."
    return f"{said}; on the CUDA GPU of this run {gpu[scores].to_numpy().sum()} of {n} come back."


def hyperparameters(number):
    """The Hyperparameters of a published trial, as printed in the report."""
    row = TABLE.loc[number]
    whole = {name: int(row[name]) for name in ("d", "rank", "batch_size", "seq_len")}
    return Hyperparameters(lr=float(row["lr"]), temperature=float(row["temperature"]), **whole)


def seed_scores(hp, seeds, device="cpu", n_samples=0, n_steps=N_STEPS, portion=8):
    """One row a seed: what the protocol prints and, for n_samples > 0, what the same network scores on fresh samples.

    Columns: seed, val_accuracy, ce_loss (as published), test_accuracy, test_ce (noise-free, n_samples fresh samples).
    portion: seeds trained side by side.
    """
    task, rows = RoutingTask(N_AREAS, hp.d, hp.seq_len), []
    for i in range(0, len(seeds), portion):
        some = list(seeds[i : i + portion])
        losses, accuracies, model = run_seeds(hp, some, n_steps, device)
        fresh = score(model, task, "test", n_samples) if n_samples else {}
        for r, seed in enumerate(some):
            accuracy, ce_loss = published_score(losses[:, r], accuracies[:, r])
            row = {"seed": seed, "val_accuracy": accuracy, "ce_loss": ce_loss}
            rows.append(row | {name: fresh[name][r] for name in ("test_accuracy", "test_ce") if fresh})
    return pd.DataFrame(rows)


def grown(hp, seeds, marks, device="cpu", n_samples=8192):
    """The original's training simply continued: one row a step in marks and a seed, scored on fresh samples.

    Columns: step, seed, test_accuracy.
    """
    task, rows = RoutingTask(N_AREAS, hp.d, hp.seq_len), []

    def keep(step, model):
        if step in marks:
            scores = score(model, task, "test", n_samples)["test_accuracy"]
            rows.extend({"step": step, "seed": s, "test_accuracy": x} for s, x in zip(seeds, scores, strict=True))

    run_seeds(hp, seeds, max(marks), device, keep)
    return pd.DataFrame(rows)


def once(path, run, **asked):
    """The table that run() makes, or the one that an earlier call left at path for the same asked and versions.

    asked: what the table depends on, as plain values; they become columns of the file, not of the table.
    A file that is damaged or of something else is made again.
    """
    asked |= {"torch": torch.__version__, "ctbprn": __version__}
    with suppress(InputError):
        table = files.table(path, text=[*asked, "sha256"])
        kept = table.drop(columns=[*asked, "sha256"])
        same = asked | {"sha256": _sha256(kept)}
        if len(kept) and all((table[name] == str(value)).all() for name, value in same.items()):
            return kept
    path.parent.mkdir(parents=True, exist_ok=True)
    table = run()
    with files.whole(path) as new:
        table.assign(**asked, sha256=_sha256(table)).to_csv(new, index=False)
    return table


def minutes(folder, spent):
    """The minutes of a run, in words, and of the earlier ones that left tables in folder, where their sum is kept."""
    path, before = folder / "minutes.txt", 0.0
    with suppress(OSError, ValueError):
        before = float(path.read_text())
    with files.whole(path) as new:
        new.write_text(f"{before + spent:.2f}\n")
    return f"{before + spent:.0f} minutes" + " (with those of earlier runs, whose tables were there)" * (before > 0)


def scores_of_seeds(path):
    """The test_accuracy and test_ce of the seeds that have them, from a CSV file of seed_scores.

    Raises InputError for fewer than two.
    """
    table = files.table(path, numbers={"test_accuracy": 1, "test_ce": 1000}).dropna()  # largest values
    if len(table) < 2:
        raise InputError(f"{path}: expected at least two seeds with test_accuracy and test_ce, got {len(table)}")
    return table


def _sha256(table):
    return hashlib.sha256(table.to_csv(index=False).encode()).hexdigest()


def tally(same):
    """How many of the published numbers reproduced(...) found again, in a sentence."""
    settings, scores = same.columns[2:], same.columns[:2]
    parts = {
        "hyperparameters of trials 0 to 4": same.loc[:4, settings],
        "hyperparameters of trials 5 to 9": same.loc[5:, settings],
        "scores": same[scores],
    }
    counted = ", ".join(f"{int(part.to_numpy().sum())} of {part.size} {name}" for name, part in parts.items())
    return f"Of the {same.size} published numbers {int(same.to_numpy().sum())} appear again: {counted}."


def _stream_after_building(config, seed, device):
    """The generator that the original's global one is once the network has been built on the CPU."""
    if torch.device(device).type != "cpu":
        return torch.Generator(device).manual_seed(
            seed
        )  # building draws on the CPU and leaves the device's state alone
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        draw_initial_values(config)
        return torch.Generator().set_state(torch.get_rng_state())


def _draw_all(streams, B, T, d):
    """Each stream's next batch, stacked: x (R,B,K,T,d), y (R,B), gumbel (R,L,B,K)."""
    return (torch.stack(parts) for parts in zip(*(_draw(g, B, T, d) for g in streams), strict=True))


def _draw(g, B, T, d):
    """A batch and the noise of the layers, in the original's order of draws."""
    kw, q = {"generator": g, "device": g.device}, d // 4
    x = torch.stack([torch.randn(B, T, d, **kw) * 0.7 for _ in range(N_AREAS)], 1)  # (B,K,T,d)
    target = torch.randint(0, N_AREAS, (B,), **kw)
    v = torch.stack([torch.randn(q, **kw) * 0.5 for _ in range(B)])
    sample = torch.arange(B, device=g.device)
    x[sample, target, :, :q] += v[:, None]
    y = (x[sample, target, :, :q].sum((1, 2)) > 0).long()
    gumbel = [-torch.empty(B, N_AREAS, device=g.device).exponential_(generator=g).log() for _ in range(N_LAYERS)]
    return x, y, torch.stack(gumbel)
