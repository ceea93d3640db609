"""Whether few validation samples prune the same trials as all do: the replay, on scores whose outcome is known."""

import numpy as np
import pandas as pd

from ctbprn_lib.audit import pruning
from ctbprn_lib.tasks import INTERIM_SAMPLES, RoutingTask
from ctbprn_lib.train import Budget


def curves(finals, noise=0.0, n_scorings=4):
    """Scores of trials that lie apart from the first scoring on; few samples add noise before the last one."""
    rng, rows = np.random.default_rng(0), []
    for trial, final in enumerate(finals):
        for scoring in range(1, n_scorings + 1):
            extra = noise * rng.normal() * (scoring < n_scorings)
            rows.append((trial, scoring, final + extra, final))
    return pd.DataFrame(rows, columns=["trial", "scoring", "few", "all"])


def test_without_noise_both_decide_alike_and_the_worse_half_is_pruned():
    found = pruning.agreement(curves(np.linspace(0.1, 0.6, 20)), n_orders=20)
    assert (found["same"], found["same_scoring"], found["best_kept"]) == (1, 1, 1)
    assert 0.25 < found["pruned"] < 0.5  # the first five trials are never pruned


def test_noise_as_large_as_the_differences_decides_otherwise():
    calm = pruning.agreement(curves(np.linspace(0.1, 0.6, 20), noise=0.001), n_orders=20)
    wild = pruning.agreement(curves(np.linspace(0.1, 0.6, 20), noise=0.5), n_orders=20)
    assert calm["same"] > 0.95 > 0.85 > wild["same"]


def test_a_trial_is_pruned_at_once_if_it_is_worse_than_the_median():
    scores = curves([0.1, 0.2, 0.3, 0.4, 0.5, 0.9, 0.05])
    assert pruning.outcomes(scores, "all", np.arange(7)) == {0: 0, 1: 0, 2: 0, 3: 0, 4: 0, 5: 1, 6: 0}


def test_trials_are_scored_on_few_samples_before_the_last_scoring_and_then_on_all():
    scores = pruning.score_twice(2, Budget(4, 2, n_evals=2, n_validation=2 * INTERIM_SAMPLES), RoutingTask(2, 8, 16))
    assert scores["scoring"].tolist() == [1, 2, 1, 2]
    last = scores["scoring"] == 2
    assert np.allclose(scores.loc[last, "few"], scores.loc[last, "all"], atol=1e-6)
    assert (scores.loc[~last, "few"] != scores.loc[~last, "all"]).all()


def test_the_share_of_scoring_is_a_part_of_the_whole():
    assert 0 < pruning.scoring_share(1, 20, 1, space={"d": [4], "rank": [1]}) < 1
