"""What a report says of memory, from counted bytes; tests/test_step_bytes.py tests the counts."""

import pandas as pd
import pytest

from ctbprn_lib import memory, published, report
from ctbprn_lib.evidence import REFUTED, SUPPORTED
from ctbprn_lib.report import facts
from ctbprn_lib.tasks import RoutingTask


@pytest.fixture(scope="module")
def trial_2():
    return memory.of_published_trial()


def test_the_two_claims_are_decided_by_counting(trial_2):
    decisions = facts.memory_decisions(trial_2)
    assert [decision.verdict for decision in decisions.values()] == [REFUTED, SUPPORTED]
    detail = report.render(None, "claim_detail", decisions["least_memory"])
    assert "81 shapes" in detail and "little, but not the least" in detail
    largest = report.render(None, "claim_detail", decisions["largest_batch"])
    for card in memory.cards(published.hyperparameters(2), RoutingTask()):
        assert f"{card.largest_batch:,} fits {card.gib} GiB" in largest
    least = facts.memory_decisions(trial_2 | {"share_less": 0.0})
    assert least["least_memory"].verdict == SUPPORTED
    small = facts.memory_decisions(trial_2 | {"batch_size": 10**9})
    assert small["largest_batch"].verdict == REFUTED


def test_trial_2_needs_more_than_all_but_the_largest_shapes(trial_2):
    step = memory.step_bytes(published.hyperparameters(2), RoutingTask())
    assert trial_2["mib"] == step.peak / 2**20 > 20 * trial_2["least_mib"]
    assert trial_2["n_shapes"] == 81 and 0.9 < trial_2["share_less"] < 1


def test_a_report_says_what_was_measured_and_what_was_counted(trial_2):
    done = pd.DataFrame({"peak_mem_mib": [80.4, 348.0], "device": ["CPU, 1 thread"] * 2})
    on_cpu = report.render(None, "memory", done, 4)
    assert "from 80 to 348 MiB" in on_cpu and "process's peak" in on_cpu
    assert "process" not in report.render(None, "memory", done.assign(device="NVIDIA H100"), 4)
    about = {"recommended": "trial 3: n_steps 40", "memory": trial_2, "memory_of_trial_2": trial_2}
    printed = report.render(None, "counted_memory", facts_with(about))
    row = next(line for line in printed.splitlines() if line.startswith("| trial 3, trained for 40 steps |"))
    assert f"| {trial_2['mib']:.0f} |" in row and "derived, not run" in printed
    for card in trial_2["cards"]:
        assert f"Largest batch on {card['gib']} GiB" in printed
        assert f"| {card['largest_batch']:,} ({100 * card['share']:.2f} %) |" in row
    assert "published trial 2" not in printed  # it would say the same again
    assert report.render(None, "counted_memory", facts_with({})) == ""


def facts_with(about):
    return type("Confirmed", (), {"about": about})()
