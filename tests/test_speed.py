"""What the benchmark counts and compares; times themselves are never asserted."""

import importlib.util
import itertools
import sys

import numpy as np
import pytest
import torch

from ctbprn_lib import tasks
from ctbprn_lib.audit import speed
from ctbprn_lib.train import Hyperparameters

HP = Hyperparameters(d=8, rank=2, batch_size=4, seq_len=6)


@pytest.fixture(autouse=True)
def short_runs(monkeypatch):
    monkeypatch.setattr(speed, "SECONDS", 1e-3)


@pytest.mark.parametrize(("K", "r", "layers"), [(2, 2, 1), (3, 2, 2), (3, 4, 2)])
def test_the_operations_of_a_step_are_those_of_its_products(K, r, layers):
    hp = Hyperparameters(d=8, rank=r, batch_size=4, seq_len=6, n_layers=layers)
    B, T, F, d, C = 4, 6, 12, 8, 2
    N = B * K * T
    stem, head = N * F * d, B * K * d * C
    controller = B * K * d * d + B * K * d * 2 * d + B * 2 * d * K
    narrow = 2 * N * K * r * d + K * 2 * d * d * K * r  # without M
    router = N * d * r + (narrow if K * r < d else B * T * K * r * d + 2 * N * d * d)
    products = stem + layers * (controller + router + 4 * N * d * d) + head
    flop, moved = speed.count_work(hp, tasks.RoutingTask(K, F, T), "fp32")
    assert flop == 2 * (3 * products - stem)  # the input needs no gradient
    assert moved > 4 * 2 * layers * 10 * N * d


def test_fewer_bytes_are_moved_in_bf16():
    task = tasks.RoutingTask(2, 64, 32)
    hp = Hyperparameters(d=64, rank=4, batch_size=8, seq_len=32)
    (flop, full), (same, half) = (speed.count_work(hp, task, precision) for precision in ("fp32", "bf16"))
    assert flop == same and half < 0.65 * full
    assert speed.count_work(hp, task, "tf32") == (flop, full)  # a GPU's, counted here


def test_bytes_are_counted_where_they_move():
    a, few = torch.zeros(3, 4), torch.zeros(4)
    for operation, moved in [
        (lambda: torch.empty(3, 4), 0),
        (lambda: a.view(12), 0),
        (lambda: a.transpose(0, 1), 0),
        (lambda: a + a, 4 * 3 * 12),
        (lambda: a.neg(), 4 * 2 * 12),
        (lambda: a + few.expand(3, 4), 4 * (2 * 12 + 4)),
        (lambda: a.add_(1), 4 * 2 * 12),
    ]:
        with speed._Counter() as counted:
            operation()
        assert counted.n_bytes == moved


def test_a_step_s_time_is_shared_out_among_its_operations(monkeypatch):
    training = speed._training(HP, tasks.RoutingTask(3, 8, 6), 2, torch.device("cpu"), "fp32")
    with torch.profiler.profile() as profile:
        training.step()
    called = {event.key.removeprefix("aten::"): event.count for event in profile.key_averages()}
    ticks = itertools.count()
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(ticks))  # each operation takes one tick
    row = speed.where_time_goes((HP, 3, 2), "fp32")
    assert [row[name] for name in speed.SHAPE_COLUMNS] == [8, 2, 3, 6, 4, 2]
    assert sum(row[kind] for kind in (*speed.KINDS, speed.REST)) == pytest.approx(1)
    for kind, names in [
        ("Products", ("mm", "bmm", "baddbmm")),
        ("GELU, sigmoid", ("gelu", "gelu_backward", "sigmoid", "sigmoid_backward")),
        ("Random numbers", ("rand", "randn", "randint")),
    ]:
        assert row[kind] * row["operations"] == pytest.approx(sum(called.get(name, 0) for name in names)), kind


@pytest.mark.slow
def test_ours_is_compared_with_the_original_in_turns(monkeypatch):
    taken, seconds = [], speed._seconds

    def kept(function, n, device=None):
        took = seconds(function, n, device)
        taken.append((device, took / n))
        return took

    monkeypatch.setattr(speed, "_seconds", kept)
    small, row = speed.against_the_original([(HP, 3, 1), (HP, 2, 3)], n_runs=3, device="cpu", precision="fp32")
    assert (row["d"], row["n_areas"], row["n_replicas"], small["n_areas"]) == (8, 2, 3, 3)
    assert [device is None for device, _ in taken[-6:]] == 3 * [True, False]  # the original's, ours, and so on
    original, ours = (1000 * np.array([step for _, step in taken[start::2]]) for start in (-6, -5))
    ratios = original / (ours / 3)
    assert (row["baseline_ms"], row["ours_ms"]) == pytest.approx((np.median(original), np.median(ours) / 3))
    found = [row[name] for name in ("ratio_low", "ratio", "ratio_high")]
    assert found == pytest.approx([min(ratios), np.median(ratios), max(ratios)])
    for one in (small, row):
        assert 0 < one["ratio_low"] <= one["ratio"] <= one["ratio_high"] and min(list(one.values())[1:]) > 0
        flop, moved = speed.count_work(HP, tasks.RoutingTask(one["n_areas"], 8, 6), "fp32")
        assert (1e9 * one["gflop"], 1e6 * one["mbyte"]) == pytest.approx((flop, moved))
    for share, amount in (("arithmetic_share", "gflop"), ("memory_share", "mbyte")):  # of the same machine's best
        best = [one[amount] / one[share] / one["ours_ms"] for one in (small, row)]
        assert best[0] == pytest.approx(best[1])
    assert row["gflop"] < small["gflop"]


def test_throughput_is_measured_for_every_size_that_fits(monkeypatch):
    rows = speed.scaling("n_replicas", (1, 2, 3), (HP, 2, 1), 1, "cpu", "fp32")
    assert [row["n_replicas"] for row in rows] == [1, 2, 3] and all(row["replica_steps_per_s"] > 0 for row in rows)
    make = speed.Training

    def too_large(hp, *rest):
        if hp.seq_len > 4:
            raise torch.OutOfMemoryError
        return make(hp, *rest)

    monkeypatch.setattr(speed, "Training", too_large)
    rows = speed.scaling("seq_len", (2, 4, 8, 3), (HP, 2, 1), 1, "cpu", "fp32")
    assert [row["seq_len"] for row in rows] == [2, 4]


def test_it_prints_its_table_with_torch_and_numpy_alone(monkeypatch, capsys):
    """The modules that it imports need no more either: tests/test_train.py."""
    for name in ("optuna", "pandas", "matplotlib", "aeon", "scipy", "safetensors", "yaml", "tqdm", "IPython"):
        monkeypatch.setitem(sys.modules, name, None)
    spec = importlib.util.spec_from_file_location("fresh_speed", speed.__file__)
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    fresh.SECONDS, fresh.measure_limits = 1e-3, lambda *_: {"flop_per_s": 1e12, "byte_per_s": 1e11}
    hp = Hyperparameters(d=4, rank=1, batch_size=2, seq_len=4)
    fresh.main("cpu", [(hp, 2, 2)], {"n_replicas": [1, 2], "d": [4]})
    text = capsys.readouterr().out
    assert "| fp32 | 4 | 1 | 2 | 4 | 2 | 2 |" in text
    assert "| 4 | 1 | 2 | 4 | 2 | 2 |" in text.split("Operations a step")[1]
    assert text.count("replica-steps a second") == 3


def test_workers_gain_what_threads_do_not_share():
    assert speed.derived_gains(2.0, 2) == {4: 1, 8: 1, 16: 1}  # threads that share all their work
    assert speed.derived_gains(1.0, 2) == {4: 4, 8: 8, 16: 16}  # and none of it
    assert speed.derived_gains(1.5, 2, [2])[2] == pytest.approx(2 / 1.5)
    assert speed.derived_gains(1.0, 1) == {}


def test_the_gain_of_threads_leaves_their_number_as_it_was(monkeypatch):
    monkeypatch.setattr(speed, "SHAPES", [(Hyperparameters(d=4, rank=1, batch_size=2, seq_len=4), 2, 2)] * 3)
    monkeypatch.setattr(speed, "SECONDS", 0.01)
    before = torch.get_num_threads()
    assert speed.thread_gain(1) > 0 and torch.get_num_threads() == before
