"""Training: determinism, scoring, divergence, cost; and that it learns."""

import dataclasses
import functools
import subprocess
import sys

import numpy as np
import pytest
import torch

from ctbprn_lib import InputError, scoring, tasks, train
from ctbprn_lib.model import CTBPRN
from ctbprn_lib.tasks import Batch
from ctbprn_lib.train import Budget, Hyperparameters, fit

HP = Hyperparameters(lr=5e-3, d=8, rank=2, temperature=1.0, batch_size=8, seq_len=8)


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(small_task):
    runs = [fit(HP, small_task, Budget(20, 3, n_validation=64), seed) for seed in (5, 5, 6)]
    states = [run.model.state_dict() for run in runs]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    for name, curve in runs[0].curves.items():
        np.testing.assert_array_equal(curve, runs[1].curves[name])
    assert not torch.equal(states[0]["head_weight"], states[2]["head_weight"])
    assert len({tuple(w.flatten().tolist()) for w in states[0]["head_weight"]}) == 3  # replicas differ


@pytest.mark.slow
def test_it_learns_and_records_what_it_cost(small_task):
    result = fit(HP, small_task, Budget(200, 2, n_evals=4, n_validation=512), 0)
    assert result.steps == [50, 100, 150, 200]
    routed = ("route_accuracy", "route_accuracy_1", "route_accuracy_2")
    assert {name: c.shape for name, c in result.curves.items()} == dict.fromkeys(
        ("train_ce", "val_ce", "val_accuracy", "val_balanced_accuracy", *routed), (4, 2)
    )
    best, *layers = (result.curves[name] for name in routed)
    np.testing.assert_array_equal(best, np.maximum(*layers))
    assert (result.val_accuracy > 0.75).all() and (result.val_ce < 0.55).all()
    assert result.curves["val_ce"][0].mean() > result.val_ce.mean()
    assert result.samples_seen == 1600 and result.step_time_ms > 0
    assert result.n_parameters == sum(p.numel() for p in train.untrained(HP, small_task, 1)[0].parameters())
    assert result.diverged_at == [None, None]


@pytest.mark.slow
def test_real_arrays_with_unequal_lengths_are_learnt(array_task):
    result = fit(dataclasses.replace(HP, seq_len=6), array_task, Budget(150, 2), 0)
    assert (result.val_accuracy > 0.8).all()
    assert "route_accuracy" not in result.curves
    scores = scoring.score(result.model, array_task, "test", None)
    assert set(scores) == {"test_ce", "test_accuracy", "test_balanced_accuracy"}
    np.testing.assert_allclose(scores["test_balanced_accuracy"], scores["test_accuracy"])  # six samples of each class
    assert (scores["test_accuracy"] > 0.8).all()


@pytest.mark.parametrize("schedule", train.SCHEDULES)
@pytest.mark.parametrize("n_steps", [1, 2, 3, 7])
def test_the_shortest_trainings_work(small_task, schedule, n_steps):
    result = fit(HP, small_task, Budget(n_steps, 2, schedule=schedule, n_validation=16), 0)
    assert result.steps[-1] == n_steps and np.isfinite(result.val_ce).all()


def test_scores_are_noise_free_and_do_not_depend_on_the_portion(small_task, monkeypatch):
    result = fit(HP, small_task, Budget(5, 3, n_validation=300, precision="fp32"), 0)
    first = scoring.score(result.model, small_task, "validation", 300)
    monkeypatch.setitem(scoring.SCORING_BYTES, "cpu", 2000)
    second = scoring.score(result.model, small_task, "validation", 300)
    for name in first:
        np.testing.assert_allclose(first[name], second[name], rtol=1e-6)
    np.testing.assert_array_equal(first["val_ce"], result.val_ce)


def test_scores_are_what_counting_by_hand_gives(small_task):
    model = train.untrained(HP, small_task, 2)[0]
    hits, ce, n, routed, of_class = np.zeros(2), np.zeros(2), 0, np.zeros((2, 2)), [[], []]
    for batch in small_task.fixed("test", 100):
        for i in range(batch.y.shape[1]):
            logits, route = model(batch.x[:, i : i + 1].expand(2, -1, -1, -1, -1))
            hit = (logits[:, 0].argmax(-1) == batch.y[0, i]).numpy()
            hits += hit
            of_class[batch.y[0, i]].append(hit)
            ce -= logits[:, 0].double().log_softmax(-1)[:, batch.y[0, i]].detach().numpy()
            routed += (route[:, :, 0].argmax(-1) == batch.area[0, i]).numpy()
            n += 1
    scores = scoring.score(model, small_task, "test", 100)
    np.testing.assert_allclose(scores["test_accuracy"], hits / n)
    np.testing.assert_allclose(scores["test_ce"], ce / n, rtol=1e-5)
    recall = np.mean([np.mean(hit, axis=0) for hit in of_class], axis=0)
    np.testing.assert_allclose(scores["test_balanced_accuracy"], recall)
    np.testing.assert_allclose([scores["route_accuracy_1"], scores["route_accuracy_2"]], routed.T / n)


def test_the_layer_that_routes_best_is_chosen_on_validation_samples_and_scored_on_others():
    """Each replica has a best layer of its own: the first of replica 0, the second of replica 1."""
    validation = {"route_accuracy_1": np.array([0.9, 0.4]), "route_accuracy_2": np.array([0.8, 0.5])}
    test = {"route_accuracy_1": np.array([0.6, 0.7]), "route_accuracy_2": np.array([0.7, 0.3])}
    assert scoring.route_accuracy(test, validation)["route_accuracy"].tolist() == [0.6, 0.3]
    assert scoring.route_accuracy({}, {}) == {}


@pytest.fixture
def like_a_gpu(monkeypatch):
    """What a GPU does to a training: a warm-up that changes all of its state, and one Training for all of a shape."""

    def captured(work, generator):
        for _ in range(3):
            work()
        return work

    monkeypatch.setattr(train, "captured", captured)
    monkeypatch.setattr(train, "Training", functools.lru_cache(train.Training))


def test_a_training_that_is_used_again_begins_anew(small_task, like_a_gpu, monkeypatch):
    budget = Budget(6, 2, n_evals=2, n_validation=32)
    settings = [dataclasses.replace(HP, lr=lr, temperature=t) for lr, t in ((5e-3, 1.0), (1e-2, 0.5), (5e-3, 1.0))]
    again = [(fit(hp, small_task, budget, seed, "cpu"), seed) for seed, hp in enumerate(settings)]
    assert train.Training.cache_info().misses == 1
    monkeypatch.undo()
    for (used, seed), hp in zip(again, settings, strict=True):
        fresh = fit(hp, small_task, budget, seed, "cpu")
        for name, curve in fresh.curves.items():
            np.testing.assert_array_equal(used.curves[name], curve)
    fit(HP, small_task, Budget(1, 1, n_validation=16), 0, "cpu")  # fewer steps than the warm-up has


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_graph_and_eager_steps_give_the_same_losses(monkeypatch):
    task, budget = tasks.RoutingTask(), Budget(50, 3, n_evals=50, n_validation=256, precision="fp32")
    hp = Hyperparameters(seq_len=64)
    graph = fit(hp, task, budget, 0, "cuda")
    train._captured_once.cache_clear()
    monkeypatch.setattr(train, "captured", lambda work, generator: work)
    eager = fit(hp, task, budget, 0, "cuda")
    train._captured_once.cache_clear()
    for name in ("train_ce", "val_ce"):
        np.testing.assert_allclose(graph.curves[name], eager.curves[name], rtol=1e-5)


@pytest.mark.parametrize("n_steps", [1, 3, 4, 5, 40])
def test_rates_are_those_of_one_cycle(n_steps):
    values = train.rates("one_cycle", 0.01, n_steps).double().numpy()
    assert len(values) == n_steps and values[0] == pytest.approx(0.01 / 25) and values.max() <= 0.01 * 1.000001
    up = 0.3 * max(n_steps, 4) - 1  # steps of the rise; both parts are half a cosine
    for i, rate in enumerate(values):
        share = i / up if i <= up else (i - up) / (max(n_steps, 4) - 1 - up)
        ends = (0.01 / 25, 0.01) if i <= up else (0.01, 0.01 / 25e4)
        assert rate == pytest.approx(ends[1] + (ends[0] - ends[1]) * (1 + np.cos(np.pi * share)) / 2, rel=1e-4)


class PoisonedTask:
    """The small task, whose batches for replica 1 hold NaN from the third draw on."""

    def __init__(self, task):
        self.task, self.draws = task, 0

    def __getattr__(self, name):
        return getattr(self.task, name)

    def draw(self, *args):
        batch = self.task.draw(*args)
        self.draws += 1
        if self.draws >= 3:
            batch.x[1] = float("nan")
        return batch


def test_a_diverged_replica_is_recorded_with_its_step_and_harms_no_neighbour(small_task):
    budget = Budget(10, 3, n_evals=5, n_validation=64)
    clean = fit(HP, small_task, budget, 0, "cpu")  # a GPU would replay the first draw
    poisoned = fit(HP, PoisonedTask(small_task), budget, 0, "cpu")
    assert poisoned.diverged_at == [None, 3, None]
    assert np.isnan(poisoned.curves["val_ce"][:, 1]).tolist() == [False, True, True, True, True]
    np.testing.assert_allclose(poisoned.val_ce[[0, 2]], clean.val_ce[[0, 2]], rtol=1e-5)


def test_a_last_update_that_breaks_a_replica_is_seen_in_its_score(small_task, monkeypatch):
    """One step: its loss is finite, and the weights that it leaves are not."""
    monkeypatch.setattr(train, "rates", lambda schedule, lr, n_steps: torch.full((n_steps,), 3e38))
    broken = fit(HP, small_task, Budget(1, 2, n_evals=3, n_validation=16), 0)
    assert broken.steps == [1] and broken.diverged_at == [1, 1]
    assert np.isfinite(broken.curves["train_ce"]).sum() == 0 == np.isfinite(broken.val_ce).sum()


def test_each_replica_is_clipped_by_its_own_norm():
    a, b = (torch.nn.Parameter(torch.zeros(2, n)) for n in (3, 4))
    a.grad, b.grad = torch.tensor([[3.0] * 3, [0.1] * 3]), torch.tensor([[3.0] * 4, [0.1] * 4])
    train.clip_gradients([a, b], 1.0)
    norms = torch.cat([a.grad, b.grad], 1).norm(dim=1)
    torch.testing.assert_close(norms, torch.tensor([1.0, 0.1 * 7**0.5]))


def test_the_noise_is_gumbel():
    g = train.gumbel_noise((200_000,), torch.Generator().manual_seed(0)).double()
    assert g.isfinite().all()
    assert g.mean() == pytest.approx(0.5772, abs=0.01) and g.var() == pytest.approx(np.pi**2 / 6, abs=0.03)


def test_on_eval_sees_each_scoring_and_may_stop_the_training(small_task):
    seen = []

    def stop_at_second(result):
        seen.append(result.steps[-1])
        if len(seen) == 2:
            raise StopIteration

    with pytest.raises(StopIteration):
        fit(HP, small_task, Budget(10, 2, n_evals=5, n_validation=16), 0, on_eval=stop_at_second)
    assert seen == [2, 4]


@pytest.mark.slow
def test_bf16_gives_nearly_the_same_score(small_task):
    full, half = (fit(HP, small_task, Budget(100, 4, precision=p, n_validation=512), 0) for p in ("fp32", "bf16"))
    assert half.val_accuracy.mean() == pytest.approx(full.val_accuracy.mean(), abs=0.06)


def test_peak_memory_grows_with_the_batch(small_task):
    small, large = (
        fit(dataclasses.replace(HP, batch_size=n), small_task, Budget(2, 2, n_validation=16), 0).peak_mem_mib
        for n in (8, 8000)
    )
    assert 0 <= small < large > 50


def test_route_shares_are_rows_of_shares(small_task, array_task):
    model = train.untrained(HP, small_task, 2)[0]
    shares, rows = scoring.route_shares(model, small_task, 300)
    assert rows == small_task.area_names and shares.sum(-1).ravel() == pytest.approx([1] * 4)
    with torch.no_grad():
        model.layers[0].b2[:, 0], model.layers[-1].b2[:, 1] = 1e6, 1e6
    assert scoring.route_shares(model, small_task, 300)[0].tolist() == [[[1, 0], [1, 0]], [[0, 1], [0, 1]]]
    hp = dataclasses.replace(HP, seq_len=6)
    shares, rows = scoring.route_shares(train.untrained(hp, array_task, 2)[0], array_task)
    assert rows == ("a", "b", "c") and shares.sum(-1).ravel() == pytest.approx([1] * 6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda t: Hyperparameters(lr=0), "lr must be"),
        (lambda t: Hyperparameters(d=8.0), "d must be a whole number"),
        (lambda t: Budget(n_steps=True), "n_steps must be"),
        (lambda t: Budget(n_evals=2.5), "n_evals must be a whole number"),
        (lambda t: Budget(schedule="cosine"), "one_cycle, constant"),
        (lambda t: fit(dataclasses.replace(HP, seq_len=9), t, Budget(1, 1)), "at most the task's 8 tokens"),
        (lambda t: fit(HP, t, Budget(1, 1), device="tpu"), '"auto", "cpu" or "cuda"'),
        (lambda t: fit(HP, t, Budget(1, 1, precision="tf32"), device="cpu"), "tf32 needs a CUDA GPU"),
    ],
)
def test_values_that_cannot_be_are_refused(small_task, make, message):
    with pytest.raises(InputError, match=message):
        make(small_task)


@pytest.mark.slow
def test_model_tasks_and_train_need_torch_and_numpy_alone():
    """Some GPU machines have nothing else: with every other package of ours missing, a training still runs."""
    script = """
import sys
for name in ("optuna", "pandas", "matplotlib", "aeon", "scipy", "safetensors", "yaml", "tqdm", "IPython", "papermill"):
    sys.modules[name] = None
from ctbprn_lib import model, tasks, train
task = tasks.RoutingTask(n_features=4, n_tokens=4)
hp = train.Hyperparameters(d=4, rank=1, batch_size=2, seq_len=4)
print(train.fit(hp, task, train.Budget(2, 2, n_validation=8)).steps)
"""
    done = subprocess.run((sys.executable, "-c", script), capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[1, 2]\n", "")


def test_noise_shifts_and_dropout_change_a_training_and_nothing_where_they_are_0(small_task):
    usual = train.Hyperparameters(d=8, rank=2, batch_size=4, seq_len=4)
    budget = train.Budget(3, 2, n_validation=32)
    plain = train.fit(usual, small_task, budget, 0)
    for name, value in (("dropout", 0.5), ("input_noise", 0.5), ("time_shift", 2)):
        assert getattr(usual, name) == 0 and name not in usual.identity()
        other = train.fit(dataclasses.replace(usual, **{name: value}), small_task, budget, 0)
        assert not np.array_equal(plain.val_ce, other.val_ce), name
    quiet = train.fit(dataclasses.replace(usual, gate_noise=0.0), small_task, budget, 0)
    half = train.fit(dataclasses.replace(usual, gate_noise=0.5), small_task, budget, 0)
    assert usual.gate_noise == 1 and "gate_noise" not in usual.identity()
    assert np.array_equal(quiet.val_ce, train.fit(usual, small_task, budget, 0, without="noise").val_ce)
    assert not np.array_equal(half.val_ce, quiet.val_ce) and not np.array_equal(half.val_ce, plain.val_ce)
    for bad in ({"dropout": 1.0}, {"input_noise": -0.1}, {"time_shift": 0.5}):
        with pytest.raises(InputError, match=next(iter(bad))):
            dataclasses.replace(usual, **bad)


def test_a_shift_moves_each_sample_within_the_tokens_that_exist():
    R, B, T = 2, 50, 6
    x = torch.arange(T).float().expand(R, B, 1, T)[..., None]
    mask = torch.ones(R, B, T, dtype=torch.bool)
    mask[:, ::2, 4:] = False
    hp = train.Hyperparameters(time_shift=2)
    for there in (None, mask):
        moved = train.augmented(Batch(x, torch.zeros(R, B), there), hp, torch.Generator().manual_seed(0))[..., 0, :, 0]
        last = torch.full((R, B), T - 1) if there is None else there.sum(2) - 1
        shifts = set()
        for r in range(R):
            for b in range(B):
                n = int(last[r, b]) + 1
                row = moved[r, b].tolist()
                fits = [s for s in range(-2, 3) if row[:n] == [min(max(t + s, 0), n - 1) for t in range(n)]]
                assert len(fits) == 1 and not any(row[n:])
                shifts.add(fits[0])
        assert shifts == {-2, -1, 0, 1, 2}


def test_noise_and_dropout_have_the_size_that_is_asked_for():
    generator = torch.Generator().manual_seed(0)
    hp = train.Hyperparameters(input_noise=0.5, dropout=0.25, batch_size=100, d=16)
    x = torch.zeros(2, 100, 2, 8, 5)
    noisy = train.augmented(Batch(x, torch.zeros(2, 100)), hp, generator)
    assert noisy.std().item() == pytest.approx(0.5, rel=0.02)
    model = CTBPRN(5, 16, 2, 2, n_replicas=2)
    keep = train.dropped(model, hp, generator)
    assert keep.shape == (2, 100, 32) and keep.mean().item() == pytest.approx(1, abs=0.03)
    assert (keep == 0).double().mean().item() == pytest.approx(0.25, abs=0.03)
    assert train.dropped(model, train.Hyperparameters(), generator) is None
