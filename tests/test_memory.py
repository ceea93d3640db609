"""Memory: the rule finds what made the numbers, and the largest batch is one that was tried."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from ctbprn_lib import InputError, confirm, report
from ctbprn_lib.evidence import REFUTED, SUPPORTED, UNDECIDED
from ctbprn_lib.report import facts
from ctbprn_lib.train import Hyperparameters

TASK = {"n_areas": 2, "n_features": 64, "n_tokens": 128}


def some_sizes(n=40, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [Hyperparameters(d=int(rng.choice([32, 64, 96])), batch_size=int(rng.choice([8, 16, 32])),
                              seq_len=int(rng.choice([32, 64, 128]))) for _ in range(n)]  # fmt: skip
    return np.array([facts.memory_sizes(hp, TASK, 4, 40 * hp.d**2) for hp in shapes])


def test_the_rule_finds_the_coefficients_that_made_the_numbers():
    sizes = some_sizes()
    exact = facts.fit_memory_rule(sizes, sizes @ [20, 5, 3] + 12)
    assert dataclasses.astuple(exact)[:4] == pytest.approx((20, 5, 3, 12), rel=1e-3) and exact.error < 1e-6
    np.testing.assert_allclose(exact.predict(sizes), sizes @ [20, 5, 3] + 12, rtol=1e-6)
    noise = np.random.default_rng(1).normal(1, 0.05, len(sizes))
    noisy = facts.fit_memory_rule(sizes, (sizes @ [20, 5, 3] + 12) * noise)
    assert 0.01 < noisy.error < 0.1 and min(dataclasses.astuple(noisy)) >= 0


def test_the_error_is_that_of_shapes_left_out_not_of_their_twins():
    sizes, rng = some_sizes(8), np.random.default_rng(2)
    mib = (sizes @ [20, 5, 3] + 12) * rng.normal(1, 0.2, len(sizes))  # no rule fits
    once, twins = facts.fit_memory_rule(sizes, mib), facts.fit_memory_rule(np.repeat(sizes, 5, 0), np.repeat(mib, 5))
    assert twins.error == pytest.approx(once.error, rel=1e-6)


def test_too_few_measurements_are_refused():
    with pytest.raises(InputError, match="at least six measurements, got 5"):
        facts.fit_memory_rule(some_sizes(5), np.ones(5))


def test_claims_about_gpu_memory_are_decided_on_a_gpu_alone():
    largest = {"batch_size": 512, "free_mib": 8000, "tried_twice": True}
    growing, level = facts.MemoryRule(1, 1, 1, 0, 0), facts.MemoryRule(0, 0, 0, 50, 0)

    def words(rule, on_gpu=True, **found):
        decisions = facts.memory_decisions(rule, TASK, largest | found, on_gpu)
        assert "81 shapes" in report.render(None, "claim_detail", decisions["least_memory"])
        return [decision.verdict for decision in decisions.values()]

    assert words(growing) == [REFUTED, SUPPORTED]
    assert words(level, batch_size=32) == [SUPPORTED, REFUTED]
    assert words(growing, on_gpu=False) == [UNDECIDED] * 2


def test_a_report_says_what_was_measured_and_how_far_the_rule_misses():
    done = pd.DataFrame({"peak_mem_mib": [80.4, 348.0], "device": ["CPU, 1 thread"] * 2})
    on_cpu = report.render(None, "memory", done, 4)
    assert "from 80 to 348 MiB" in on_cpu and "process's peak" in on_cpu
    assert "process" not in report.render(None, "memory", done.assign(device="NVIDIA H100"), 4)
    table = pd.DataFrame({"n_replicas": 4, "d": 64, "rank": 16, "batch_size": 32, "seq_len": [32, 64, 64],
                          "measured_mib": [100, 100, 200], "predicted_mib": [110, 80, 100]})  # fmt: skip
    rule, largest = facts.MemoryRule(1, 1, 1, 0, 0.17), {"batch_size": 64, "free_mib": 9, "tried_twice": False}
    c = SimpleNamespace(memory_rule=rule, memory_table=table, about={"largest_batch": largest}, best={"ce": "trial 3"})
    said = report.render(None, "memory_rule", c)
    assert "3 measured runs of 2 shapes" in said and "by 20 % (median) and 50 % (worst)" in said and "by 17 %" in said
    nothing = SimpleNamespace(memory_rule=None, memory_table=table, about={"largest_batch": None})
    assert report.render(None, "memory_rule", nothing) == ""


def test_what_a_training_took_becomes_a_row():
    row = dict(d=8, rank=2, batch_size=4, seq_len=8, n_parameters=1234, peak_mem_mib=1.5)
    table = facts.measured_memory(pd.DataFrame([row, row | {"peak_mem_mib": 0}]), 3, TASK)
    assert len(table) == 1 and table.loc[0, "measured_mib"] == 1.5
    activations, inputs = 4 * 3 * 4 * 2 * 8 * 8 * 2 / 2**20, 4 * 3 * 4 * 2 * 8 * 64 / 2**20
    assert table.loc[0, facts.SIZES].tolist() == [activations, 4 * 3 * 1234 / 2**20, inputs]


def test_the_largest_batch_fits_and_twice_as_much_does_not(small_task, monkeypatch):
    hp, tried = Hyperparameters(d=8, rank=2, batch_size=32, seq_len=8), []

    def fits(hp, task, device, free):
        tried.append(hp.batch_size)
        return hp.batch_size <= 700

    monkeypatch.setattr(confirm, "fits", fits)
    found = confirm.largest_batch(hp, small_task, "cpu")
    assert found["batch_size"] == 512 and found["tried_twice"] and tried[-1] == 1024
    monkeypatch.setattr(confirm, "fits", lambda *_: True)
    found = confirm.largest_batch(hp, small_task, "cpu")
    assert found["batch_size"] == confirm.LARGEST_BATCH >= 65_536 and not found["tried_twice"]


def test_a_step_that_needs_more_than_is_free_is_found_out_in_a_process_of_its_own(small_task):
    torch.set_num_threads(1)
    hp = Hyperparameters(d=8, rank=2, batch_size=8, seq_len=8)
    assert confirm.fits(hp, small_task, "cpu", 8000)
    assert not confirm.fits(Hyperparameters(d=64, batch_size=1 << 20, seq_len=8), small_task, "cpu", 1500)
