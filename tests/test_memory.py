"""Memory: the rule finds what made the numbers, and the largest batch is one that was tried."""

import numpy as np
import pandas as pd
import pytest
import torch

from ctbprn_lib import InputError, memory, search, verdicts
from ctbprn_lib.train import Budget, Hyperparameters, fit

TASK = {"n_areas": 2, "n_features": 64, "n_tokens": 128}


def some_sizes(n=40, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [Hyperparameters(d=int(rng.choice([32, 64, 96])), batch_size=int(rng.choice([8, 16, 32])),
                              seq_len=int(rng.choice([32, 64, 128]))) for _ in range(n)]  # fmt: skip
    return np.array([memory.terms(hp, TASK, 4, 40 * hp.d**2) for hp in shapes])


def test_the_rule_finds_the_coefficients_that_made_the_numbers():
    sizes = some_sizes()
    exact = memory.fit_rule(sizes, sizes @ [20, 5, 3] + 12)
    assert exact[:4] == pytest.approx((20, 5, 3, 12), rel=1e-3) and exact.error < 1e-6
    np.testing.assert_allclose(exact.predict(sizes), sizes @ [20, 5, 3] + 12, rtol=1e-6)
    noisy = memory.fit_rule(sizes, (sizes @ [20, 5, 3] + 12) * np.random.default_rng(1).normal(1, 0.05, len(sizes)))
    assert 0.01 < noisy.error < 0.1 and min(noisy[:4]) >= 0


def test_the_error_is_that_of_shapes_left_out_not_of_their_twins():
    sizes, rng = some_sizes(8), np.random.default_rng(2)
    mib = (sizes @ [20, 5, 3] + 12) * rng.normal(1, 0.2, len(sizes))  # no rule fits
    once, twins = memory.fit_rule(sizes, mib), memory.fit_rule(np.repeat(sizes, 5, 0), np.repeat(mib, 5))
    assert twins.error == pytest.approx(once.error, rel=1e-6)


def test_too_few_measurements_are_refused():
    with pytest.raises(InputError, match="at least six measurements, got 5"):
        memory.fit_rule(some_sizes(5), np.ones(5))


def test_claims_about_gpu_memory_are_decided_on_a_gpu_alone():
    largest = {"batch_size": 512, "free_mib": 8000, "tried_twice": True}
    growing, level = memory.MemoryRule(1, 1, 1, 0, 0), memory.MemoryRule(0, 0, 0, 50, 0)

    def words(rule, on_gpu=True, **found):
        said = memory.claims(rule, TASK, largest | found, on_gpu)
        assert "81 shapes" in said[verdicts.LITTLE_MEMORY][1]
        return [said[claim][0] for claim in (verdicts.LITTLE_MEMORY, verdicts.LARGER_BATCH)]

    assert words(growing) == [verdicts.REFUTED, verdicts.SUPPORTED]
    assert words(level, batch_size=32) == [verdicts.SUPPORTED, verdicts.REFUTED]
    assert words(growing, on_gpu=False) == [verdicts.UNDECIDED] * 2


def test_a_report_says_what_was_measured_and_how_far_the_rule_misses():
    done = pd.DataFrame({"peak_mem_mib": [80.4, 348.0], "device": ["CPU, 1 thread"] * 2})
    assert "from 80 to 348 MiB" in memory.peak(done, 4) and "process's peak" in memory.peak(done, 4)
    assert "process" not in memory.peak(done.assign(device="NVIDIA H100"), 4)
    table = pd.DataFrame({"n_replicas": 4, "d": 64, "rank": 16, "batch_size": 32, "seq_len": [32, 64, 64],
                          "measured_mib": [100, 100, 200], "predicted_mib": [110, 80, 100]})  # fmt: skip
    rule, largest = memory.MemoryRule(1, 1, 1, 0, 0.17), {"batch_size": 64, "free_mib": 9, "tried_twice": False}
    said = " ".join(memory.considerations(rule, table, "trial 3", largest))
    assert "3 measured runs of 2 shapes" in said and "by 20 % (median) and 50 % (worst)" in said and "by 17 %" in said
    assert memory.considerations(None, table, "trial 3", None) == []


def test_what_a_training_took_becomes_a_row(small_task):
    hp = Hyperparameters(d=8, rank=2, batch_size=4, seq_len=8)
    result = fit(hp, small_task, Budget(2, 3, n_evals=1, n_validation=16))
    row = search.trial_record(result) | {name: getattr(hp, name) for name in search.HYPERPARAMETERS}
    table = memory.measured(pd.DataFrame([row | {"peak_mem_mib": 1.5}]), 3, small_task.description)
    activations, parameters, inputs = table[memory.SIZES].iloc[0]
    assert activations == 4 * 3 * 4 * 2 * 8 * 8 * 2 / 2**20 and inputs == 4 * 3 * 4 * 2 * 8 * 8 / 2**20
    assert parameters == 4 * sum(p.numel() for p in result.model.parameters()) / 2**20
    assert table.loc[0, "measured_mib"] == 1.5


def test_the_largest_batch_fits_and_twice_as_much_does_not(small_task, monkeypatch):
    hp, tried = Hyperparameters(d=8, rank=2, batch_size=32, seq_len=8), []

    def fits(hp, task, device, free):
        tried.append(hp.batch_size)
        return hp.batch_size <= 700

    monkeypatch.setattr(memory, "fits", fits)
    found = memory.largest_batch(hp, small_task, "cpu")
    assert found["batch_size"] == 512 and found["tried_twice"] and tried[-1] == 1024
    monkeypatch.setattr(memory, "fits", lambda *_: True)
    found = memory.largest_batch(hp, small_task, "cpu")
    assert found["batch_size"] == memory.MOST >= 65_536 and not found["tried_twice"]


def test_a_step_that_needs_more_than_is_free_is_found_out_in_a_process_of_its_own(small_task):
    torch.set_num_threads(1)
    hp = Hyperparameters(d=8, rank=2, batch_size=8, seq_len=8)
    assert memory.fits(hp, small_task, "cpu", 8000)
    assert not memory.fits(Hyperparameters(d=64, batch_size=1 << 20, seq_len=8), small_task, "cpu", 1500)
