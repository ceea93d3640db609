"""make report: sizes that follow from the machine, lines that say what happens, and one sentence where it fails."""

import nbformat
import pytest
import torch

from ctbprn_lib import report
from ctbprn_lib.report import make, publish, text

KERNEL = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}


@pytest.fixture
def two_workers(monkeypatch):
    monkeypatch.setattr(make.processes, "count", lambda device, mib: 2)


def test_a_slower_machine_gets_shorter_trainings_and_not_a_longer_wait(two_workers):
    seconds = [0.001 * 1.5**n for n in range(12)]
    steps = [make.plan("quick", 0, each)["tune"]["n_steps"] for each in seconds]
    assert steps == sorted(steps, reverse=True) and steps[0] > steps[-1]
    fewest, most = make.STEPS
    assert (steps[0], steps[-1]) == (most, fewest)
    for n_steps, each in zip(steps, seconds, strict=True):
        if fewest < n_steps < most:
            expected = make.expected_seconds(make.plan("quick", 0, each), each)
            assert expected == pytest.approx(60 * make.MINUTES, rel=0.2)


def test_minutes_are_shared_among_the_notebooks(two_workers):
    sizes = make.plan("quick", 30, 0.01)
    shares = sizes["tune"]["minutes"], sizes["confirm"]["minutes"]
    assert all(share > 5 for share in shares) and sum(shares) < 30
    assert "minutes" not in make.plan("quick", 0, 0.01)["tune"]
    assert make.expected_seconds(sizes, 10, minutes=30) == 30 * 60


def test_the_full_size_is_the_same_on_every_machine(two_workers):
    assert make.plan("full", 0, 0.001) == make.plan("full", 0, 10) == make.FULL


def test_the_speed_is_measured_on_one_thread_and_leaves_the_others_as_they_were():
    before = torch.get_num_threads()
    assert 0 < make.seconds_a_step(n_steps=1) < 10
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--size", "small"], "invalid choice: 'small'"),
        (["--minutes", "-1"], "--minutes must be a number of at least 0"),
        (["--minutes", "nan"], "--minutes must be a number of at least 0"),
        (["--study", "a/b"], "study_name must be"),
        (["--trials", "3"], "unrecognized arguments"),
    ],
)
def test_a_wrong_option_is_named(words, message, capsys):
    with pytest.raises(SystemExit):
        make.main(words)
    assert message in capsys.readouterr().err


def test_it_says_what_it_will_do_runs_the_notebooks_in_order_and_ends_with_the_verdict(
    two_workers, monkeypatch, tmp_path, capsys
):
    ran = []
    monkeypatch.setattr(make, "ROOT", tmp_path)
    monkeypatch.setattr(make, "seconds_a_step", lambda: 0.01)
    monkeypatch.setattr(make, "_run", ran.extend)
    monkeypatch.setattr(publish, "publish_notebook", lambda path, study: ran.append((path.name, study)))
    monkeypatch.setattr(report, "load", lambda study: study)
    monkeypatch.setattr(report, "render", lambda facts, section: f"the {section} of {facts}")
    make.main(["--study", "mine", "--n-trials", "3", "--n-steps", "40"])
    assert [list(chain) for chain in ran[:2]] == [["tune", "confirm"], ["explore", "reproduce"]]
    assert ran[0]["tune"].items() >= {"study_name": "mine", "n_trials": 3, "n_steps": 40}.items()
    assert ran[0]["confirm"]["study_name"] == "mine"
    assert ran[1]["reproduce"].items() >= {"study_name": "mine-reproduce", "tested_by": "ctbprn"}.items()
    assert ran[2] == ("reproduce.ipynb", "mine-reproduce")
    printed = capsys.readouterr().out
    assert "All of it takes about" in printed and "n_trials 3" in printed
    assert printed.endswith("the verdict of mine\n") and "reports/mine/report.html" in printed
    ran.clear()
    make.main(["--size", "full"])  # a GPU has the time for the front as well, after all else
    assert list(ran[-3]) == ["tune", "frontier"] and ran[-3]["tune"]["objective"] == "ce_cost"
    assert ran[-2] == ("frontier.ipynb", "flagship-frontier") and ran[-3]["frontier"]["study_name"] == ran[-2][1]


@pytest.mark.slow
def test_a_notebook_that_fails_ends_it_with_its_last_words(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(make, "ROOT", tmp_path)
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "runs").mkdir()
    for name, code in (("good", "print(n, repr(looks))"), ("bad", "raise ValueError('no such thing')")):
        cells = [nbformat.v4.new_code_cell("n = 1\nlooks = 'x'"), nbformat.v4.new_code_cell(code)]
        cells[0].metadata["tags"] = ["parameters"]
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=KERNEL), tmp_path / "notebooks" / f"{name}.ipynb")
    make._run([{"good": {"n": 7, "looks": "8"}}])
    assert "good begins" in (printed := capsys.readouterr().out) and "good ends after" in printed
    assert nbformat.read(tmp_path / "runs" / "good.ipynb", 4).cells[-1].outputs[0].text == "7 '8'\n"
    with pytest.raises(SystemExit, match="bad has failed: ValueError: no such thing"):
        make._run([{"good": {}}, {"bad": {}, "good": {}}])


def test_a_terminal_shows_no_marks_of_markdown():
    said = text.plain("- **Better**: [96.2, 97.6] (n = 3), `trial 4` of\n  [frontier](../frontier/report.md) is right.")
    assert said == "- Better: [96.2, 97.6] (n = 3), trial 4 of\n  frontier is right."
