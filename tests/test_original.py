"""The original protocol against the reference table, the plain loop, and simulation."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import reference
import torch

from ctbprn_lib import published
from ctbprn_lib.audit import original
from ctbprn_lib.train import Hyperparameters

GOLDEN = Path(__file__).parent / "golden"
HP = Hyperparameters(lr=3e-3, d=8, rank=2, temperature=1.2, batch_size=4, seq_len=6)


@pytest.fixture(scope="module")
def study():
    return original.run_study()


def test_all_ten_trials_equal_the_reference_table(study):
    golden = pd.read_csv(GOLDEN / "published_protocol_cpu.csv", float_precision="round_trip")
    assert list(study.columns) == list(golden.columns)
    for name in ("trial", "lr", "d", "rank", "temperature", "batch_size", "seq_len", "val_accuracy"):
        assert (study[name] == golden[name]).all(), name
    assert (study["ce_loss"] - golden["ce_loss"]).abs().max() < 1e-4


def test_the_first_five_trials_have_the_published_hyperparameters(study):
    same = original.reproduced(study)
    assert same.iloc[:5, 2:].all(axis=None)
    assert not same.iloc[5:, 2:].all(axis=None)
    assert original.tally(same).startswith(
        f"Of the 80 published numbers {same.to_numpy().sum()} appear again: 30 of 30"
    )


def test_other_seeds_give_other_studies(study):
    other = original.run_study(n_trials=2, data_seed=7)
    assert (other["lr"] == study["lr"][:2]).all() and (other["ce_loss"] != study["ce_loss"][:2]).all()
    assert (original.run_study(n_trials=2, tpe_seed=7)["lr"] != study["lr"][:2]).all()


@pytest.mark.parametrize("seed", [0, 42])
def test_a_seed_equals_the_plain_loop_drawing_from_the_global_state(seed):
    """The second implementation, with torch's one global generator as the original had it, for each of three seeds."""
    before = torch.get_rng_state()
    losses, accuracies, _ = original.run_seeds(HP, [seed, 5, seed + 1])
    assert torch.equal(before, torch.get_rng_state())
    expected = reference.train(lr=3e-3, d=8, rank=2, temperature=1.2, batch_size=4, seq_len=6, n_steps=5, seed=seed)
    np.testing.assert_allclose(losses[:, 0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(accuracies[:, 0], expected[1])


@pytest.mark.parametrize(
    ("accuracies", "rounds"),
    [([0.3, 0.3, 0.3, 0.9, 0.9], 3), ([0.3, 0.4, 0.3, 0.2, 0.9], 5), ([0.1, 0.2, 0.39, 1, 1], 3)],
)
def test_a_trial_stops_when_three_rounds_have_not_reached_two_fifths(accuracies, rounds):
    losses = np.arange(5.0)
    score, ce = original.published_score(losses, np.array(accuracies))
    assert score == max(accuracies[:rounds]) and ce == losses[:rounds].mean()


def test_a_coin_scores_as_the_trial_by_trial_simulation_says():
    coins = original.coin_scores(4000, 0)
    rng = np.random.default_rng(1)
    n = [min(32, 2 * b) for b in published.TABLE["batch_size"]]
    plain = [max(original.published_score(np.zeros(5), rng.binomial(k, 0.5, 5) / k)[0] for k in n) for _ in range(2000)]
    assert coins.max(1).mean() == pytest.approx(0.723, abs=0.004) == pytest.approx(np.mean(plain), abs=0.006)
    assert (coins.max(1) >= 25 / 32).mean() == pytest.approx(0.14, abs=0.02)


def test_seed_scores_add_fresh_samples_for_the_same_networks():
    scores = original.seed_scores(HP, range(5), n_samples=64, portion=2)
    again = original.seed_scores(HP, range(5), portion=5)
    assert scores["seed"].tolist() == list(range(5))
    np.testing.assert_allclose(scores["ce_loss"], again["ce_loss"], rtol=1e-6)
    assert scores["test_accuracy"].between(0, 1).all() and "test_ce" not in again


def test_every_published_number_is_in_the_report():
    report = (GOLDEN / "published_report.md").read_text()
    for row in published.TABLE.to_dict("records"):
        assert (
            f"| {row['trial']} | {row['val_accuracy']:.4f} | {row['ce_loss']:.4f} | {row['lr']:.5f} | {row['d']} | "
            f"{row['rank']} | {row['temperature']:.2f} | {row['batch_size']} | {row['seq_len']} |"
        ) in report


def test_training_goes_on_from_where_the_protocol_stops():
    grown = original.accuracy_by_step(HP, range(3), (5, 7), n_samples=64)
    assert grown["step"].tolist() == [5] * 3 + [7] * 3 and grown["seed"].tolist() == [0, 1, 2] * 2
    five = original.seed_scores(HP, range(3), n_samples=64, portion=3)
    assert grown["test_accuracy"][:3].tolist() == five["test_accuracy"].tolist()


def test_what_the_page_answers_is_what_its_numbers_say(study):
    same = original.reproduced(study)
    n = same[["val_accuracy", "ce_loss"]].to_numpy().sum()
    said = original.answer(same)
    assert "The search is the published one**: 30 of the 30 hyperparameters" in said
    assert f"Of the 20 scores {n} are the same on a CPU" in said and "which this run had not" in said
    gpu = same | True
    assert "on the CUDA GPU of this run 20 of 20 come back" in original.answer(same, gpu)
    assert "is not the published one**: 0 of the 30" in original.answer(same & False)


def test_minutes_are_those_of_all_runs_whose_tables_are_there(tmp_path):
    assert original.add_minutes(tmp_path, 3) == "3 minutes"
    assert original.add_minutes(tmp_path, 2) == "5 minutes (with those of earlier runs, whose tables were there)"
    (tmp_path / "minutes.txt").write_text("damaged")
    assert original.add_minutes(tmp_path, 2) == "2 minutes"
