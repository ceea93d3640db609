"""Other people's recordings: any unit, files as they are written, honest splits, rules to beat, raw data to labels."""

import json
import pickle
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_report import made_up

from ctbprn_lib import InputError, confirm, evidence, files, report, scoring, search, tasks
from ctbprn_lib import recordings as checks
from ctbprn_lib.model import CTBPRN, Classifier
from ctbprn_lib.report.text import RULES
from ctbprn_lib.tasks import ArrayTask, load_task
from ctbprn_lib.train import Budget, Hyperparameters, fit

HP = Hyperparameters(lr=1e-2, d=4, rank=2, batch_size=8, seq_len=6)


def recordings(n=120, seed=0):
    """x (n,6,4) whose last two channels tell two classes apart, and y."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 2, n)
    x = rng.normal(size=(n, 6, 4))
    x[y == 1, :, 2:] += 1
    return x, y


def task_of(x, y, **more):
    return ArrayTask(x, y, areas=["a", "a", "b", "b"], **more)


# ---- any unit, any offset


UNITS = [(scale, 0) for scale in (1e-13, 1e-200, 1e250, 1e6, -3)]
UNITS += [(1, 1e8), (1e-3, 1e5), (np.array([1e-9, 1, 1e3, 1e9]), np.array([7, -7e6, 0, 7e12]))]


@pytest.mark.parametrize(("scale", "offset"), UNITS)
def test_the_unit_of_a_recording_changes_no_score(scale, offset):
    x, y = recordings()
    plain, other = task_of(x, y), task_of(x * scale + offset, y)
    assert other.baselines() == plain.baselines() and other.facts["constant"] == 0
    seen, again = (next(task.fixed("test")).x for task in (plain, other))
    if np.ndim(scale) == 0 and scale < 0:
        again = -again
    else:
        a, b = (fit(HP, task, Budget(20, 2, precision="fp32"), 0).val_ce for task in (plain, other))
        np.testing.assert_allclose(a, b, rtol=1e-3)
    np.testing.assert_allclose(seen, again, atol=1e-3 if np.any(offset) else 1e-5)


def test_whole_numbers_of_any_size_are_read():
    """Nanoseconds since 1970, a pressure in pascal, a counter that has run over 2^53."""
    x, y = recordings()
    for numbers in ((1e9 * x).astype(np.int64) + 1_700_000_000_000_000_000, (50 * x + 101_325).astype(np.uint32),
                    (1e6 * x).astype(np.int64) + 2**60):  # fmt: skip
        assert task_of(numbers, y).baselines()["linear rule"] == task_of(x, y).baselines()["linear rule"]


def test_a_feature_is_constant_by_the_rounding_of_its_own_size():
    x, y = recordings()
    for constant in (0, 0.1, 1e-13, 1e8 + np.arange(6)[:, None] % 2 * 1.5e-8, 1e300):
        x[..., 0:1] = constant
        task = task_of(x, y)
        assert task.facts["constant"] == 1, constant
        assert all((next(task.fixed(split)).x[0, :, 0, :, 0] == 0).all() for split in ("validation", "test"))
    x[..., 0] = 1e8 + 1e-5 * recordings(seed=1)[0][..., 0]  # a thousand roundings
    assert task_of(x, y).facts["constant"] == 0
    assert task_of(x.astype(np.float32), y).facts["constant"] == 1  # float32 has nothing left of it


def test_what_is_constant_in_training_says_nothing_elsewhere():
    """Its unit is not known, so a network that has only seen 0 there is shown 0."""
    x, y = recordings()
    split = np.repeat(["train", "validation", "test"], 40)
    x[:, :, 0] = np.where(split == "test", 1e9, 5.0)[:, None]
    task = task_of(x, y, split=split)
    assert (next(task.fixed("test")).x[0, :, 0, :, 0] == 0).all() and task.facts["constant"] == 1


# ---- .ts files


def write_ts(folder, rows, classes="up down", **header):
    """FOLDER/NAME_TRAIN.ts and _TEST.ts with these rows; header: lines that are not the usual ones."""
    folder.mkdir(exist_ok=True)
    lines = {"problemName": folder.name, "timeStamps": "false", "missing": "false", "univariate": "true",
             "equalLength": "true", "classLabel": f"true {classes}"} | header  # fmt: skip
    text = "\n".join([*(f"@{key} {value}" for key, value in lines.items() if value), "@data", *rows, ""])
    for part in ("TRAIN", "TEST"):
        (folder / f"{folder.name}_{part}.ts").write_text(text, encoding="utf-8")
        text = text.replace(".5,", ".75,")  # or the test series would be copies
    return f"uea:{folder}"


@pytest.mark.parametrize(("one", "other"), [("up", "UP"), ("Straße", "STRASSE"), ("İ", "i"), ("μ", "Μ"), ("1", "1.0")])
def test_labels_are_taken_letter_by_letter(tmp_path, one, other):
    rows = [f"{i}.5,-2.5,{i}e-3:{one if i % 2 else other}" for i in range(12)]
    task = load_task(write_ts(tmp_path / "Words", rows, f"{one} {other}"))
    assert sorted(task.class_names) == sorted([one, other])
    with pytest.raises(InputError, match=rf"Words_TRAIN.ts: line 8: the class '{other}', which @classLabel does not"):
        load_task(write_ts(tmp_path / "Words", rows, f"{one} another"))


def test_signs_and_values_are_those_of_the_file(tmp_path):
    write_ts(tmp_path / "S", [f"-{i}.25, +2.5 ,1E1:-1,?,-0:up" for i in range(3)], missing="true", univariate="false")
    series, labels = files.ts(tmp_path / "S" / "S_TRAIN.ts")
    np.testing.assert_array_equal(series[2], [[-2.25, -1], [2.5, np.nan], [10, 0]])
    assert labels == ["up"] * 3


@pytest.mark.parametrize(
    ("rows", "header", "said"),
    [
        (["(0.0,-1.25),(1.0,2.5):up"] * 6, {"timeStamps": "true"}, "time stamps"),
        (["(2020-01-01 00:00:00,-1.25),(2020-01-01 00:00:01,2.5):up"] * 6, {"timeStamps": "TRUE"}, "time stamps"),
        (["(0,-1.25),(1,2.5):up"] * 6, {}, "time stamps"),
        (["1,2:0.5"] * 6, {"classLabel": "", "targetLabel": "true"}, "regression"),
        (["1,2"] * 6, {"classLabel": "false"}, "expected a line '@classLabel true'"),
        (["1,2:up", "1,2,3:4,5:up"], {}, "channels of equal length"),
        (["1,2:up", "1,2:3,4:up"], {}, "2 channels, where the first series has 1"),
        (["1_0,2:up"], {}, "could not convert"),
        (["1,2:up"], {"CLASSLABEL": "true up other"}, "line 7: @classlabel stands there twice"),
    ],
)
def test_ts_files_that_cannot_be_read_right_are_refused(tmp_path, rows, header, said):
    with pytest.raises(InputError, match=rf"Odd_TRAIN.ts: .*{said}"):
        load_task(write_ts(tmp_path / "Odd", rows, **header))


def test_ts_files_are_read_as_aeon_reads_them_but_for_the_case_of_labels():
    aeon = pytest.importorskip("aeon.datasets")
    for name in ("BasicMotions", "JapaneseVowels"):
        path = Path(aeon.__file__).parent / "data" / name / f"{name}_TEST.ts"
        series, labels = files.ts(path)
        theirs, theirs_too = aeon.load_from_ts_file(str(path))
        assert [label.lower() for label in labels] == [str(label) for label in theirs_too]
        assert all(np.array_equal(a, np.transpose(b)) for a, b in zip(series, theirs, strict=True))


# ---- splits


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 12), min_size=3, max_size=20), seed=st.integers(0, 99), fixed=st.booleans())
def test_a_group_is_never_on_two_sides(sizes, seed, fixed):
    rng = np.random.default_rng(seed)
    groups = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    y = rng.integers(0, 3, len(groups))
    split = np.where(np.isin(groups, [0]), "test", "train") if fixed else None

    made = checks.completed_split(split, y, groups)
    assert set(made) == {"train", "validation", "test"}
    assert all(len(set(made[groups == group])) == 1 for group in set(groups))
    assert not fixed or set(groups[made == "test"]) == {0}


def test_groups_keep_the_shares_and_the_classes_as_far_as_they_can():
    groups = np.repeat(np.arange(50), 8)
    y = np.tile([0, 0, 0, 1], 100)
    task = task_of(recordings(400)[0], y, groups=groups)
    assert task.n_samples == {"train": 240, "validation": 80, "test": 80} and task.facts["grouped"]
    assert all(torch.bincount(next(task.fixed(s)).y[0]).tolist() == [60, 20] for s in ("validation", "test"))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"groups": np.repeat(["one", "two", "three"], 40), "y": np.repeat([0, 1, 2], 40)}, "its groups are whole"),
        ({"split": np.repeat(["train", "validation", "test"], [80, 20, 20]), "y": np.repeat([0, 1], [50, 70])},
         "all validation samples are of one class, '1'"),
        ({"groups": np.arange(119)}, r"groups must be \(120,\)"),
        ({"groups": np.linspace(0, 1, 120)}, "groups must hold whole numbers or strings"),
        ({"groups": np.repeat(["x", "y"], 60)}, "2 cannot be divided among train, validation, test"),
        ({"groups": np.repeat([7, 8, 9, 10], 30), "split": np.repeat(["train", "validation", "test"], 40)},
         "group '8' has samples in train and in validation"),
        ({"groups": np.array(["s1", None] * 60, dtype=object)}, r"groups holds Python objects.*groups.astype\(str\)"),
    ],
)  # fmt: skip
def test_groups_that_cannot_be_kept_are_refused(more, said):
    x, y = recordings()
    with pytest.raises(InputError, match=said):
        task_of(**{"x": x, "y": y} | more)


def test_groups_of_one_class_each_are_spread_so_that_every_split_has_every_class():
    y = np.repeat([0, 1, 2, 3], 30)
    groups = np.repeat(np.arange(12), 10)
    task = task_of(recordings()[0], y, groups=groups)
    assert all(torch.bincount(next(task.fixed(s)).y[0]).tolist() == [10] * 4 for s in ("validation", "test"))


def test_all_recordings_of_a_split_are_scored_in_whatever_order_they_stand():
    """Sorted by class, the first of them would be of one class."""
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1], 6000)
    task = ArrayTask(rng.normal(size=(12000, 1, 4)).astype(np.float32), y, areas=list("aabb"))
    fitted = fit(Hyperparameters(d=2, rank=1, seq_len=1, batch_size=4), task, Budget(1, 1, n_validation=8), 0)
    np.testing.assert_allclose(fitted.curves["val_balanced_accuracy"][-1], fitted.val_accuracy)
    counts = [sum(torch.bincount(batch.y[0], minlength=2) for batch in task.fixed(split, 64)).tolist()
              for split in ("validation", "test")]  # fmt: skip
    assert counts == [[1200, 1200]] * 2


def test_copies_across_splits_are_counted_and_many_refused(tmp_path):
    x, y = recordings(500)
    split = np.repeat(["train", "validation", "test"], [300, 100, 100])
    x[3], x[300] = -0.0, 0.0
    task = task_of(x, y, split=split)
    assert task.facts["copies"] == {"train": 1, "validation": 1, "test": 0}
    x[401], x[402], x[10] = x[7], x[7], x[11]  # the last is no leak
    with pytest.raises(InputError, match=r"2 of the 100 test samples are exact copies .* 401 \(test\) and 7 \(train"):
        task_of(x, y, split=split)
    groups = np.where(np.isin(np.arange(500), [3, 300]), "silence", split)
    with pytest.raises(InputError, match="'silence' has samples in train and in validation"):
        task_of(x, y, split=split, groups=groups)
    assert task_of(x, y, split=split, groups=split).facts["copies"]["test"] == 2  # whoever groups knows the samples


def test_padding_does_not_hide_a_copy():
    x, y = recordings(60)
    lengths = np.full(60, 6)
    lengths[[5, 59]] = 3
    x[59, :3], split = x[5, :3], np.repeat(["train", "validation", "test"], 20)
    with pytest.raises(InputError, match=r"1 of the 20 \w+ samples are exact copies"):
        task_of(x, y, lengths=lengths, split=split)
    lengths[59] = 4
    assert task_of(x, y, lengths=lengths, split=split).facts["copies"] == dict.fromkeys(checks.SPLITS, 0)


def as_if(facts, n_classes=2):
    """The facts of an invented study whose samples have these facts."""
    copies = dict.fromkeys(checks.SPLITS, 0)
    usual = dict(copies=copies, grouped=False, untested={"validation": [], "test": []}, tested=n_classes, constant=0)
    usual |= dict(n_features=4, largest_share=0.5, given="mine.npz")
    plain = made_up("mine.npz")[0]
    return replace(plain, samples=usual | facts, task=plain.task | {"n_classes": n_classes})


def test_the_report_says_what_is_true_of_the_samples():
    claim = "that no training and no tuning has seen"
    clean = as_if({})
    assert report.render(clean, "unseen", "test", claim) == claim
    assert "Exact copies" not in report.render(clean, "measured")
    leaky = as_if({"copies": {"train": 1, "validation": 0, "test": 3}, "constant": 2, "grouped": True})
    assert report.render(leaky, "unseen", "test", claim) == "(3 of them are exact copies of samples in other splits)"
    assert report.render(leaky, "unseen", "validation", claim) == claim
    text = report.render(leaky, "measured")
    assert "Exact copies of samples in another split: 1 train, 3 test samples." in text
    assert "count as 0: 2 of 4." in text and "on one side of the split" in text
    older = replace(clean, samples={})
    assert report.render(older, "unseen", "test", claim) == ""


def test_classes_that_are_not_tested_are_named():
    y = np.concatenate([np.arange(40), np.arange(40), np.full(60, 40), np.full(60, 41)])
    facts = task_of(recordings(200)[0], y).facts
    assert facts["tested"] == 2 and facts["untested"]["validation"] == facts["untested"]["test"]
    assert len(facts["untested"]["test"]) == 40
    text = report.render(as_if(facts, 42), "measured")
    assert "42 classes; with test samples: 2." in text
    assert "Without a test sample, and so no part of test scores: “0”, “1”, “2” and 37 more." in text


# ---- imbalance, many features


def test_a_rule_that_names_the_largest_class_must_be_beaten_too():
    """Labels are noise, and 90 % of them are one class."""
    rng = np.random.default_rng(0)
    task = task_of(rng.normal(size=(300, 6, 4)), np.where(rng.random(300) < 0.1, "rare", "often"))
    rules = task.baselines()
    assert rules["majority class"] > 0.85 and task.facts["largest_share"] > 0.85
    fitted = fit(HP, task, Budget(60, 2), 0)
    assert fitted.val_accuracy.mean() > 0.7
    np.testing.assert_allclose(fitted.curves["val_balanced_accuracy"][-1], 0.5, atol=0.2)
    r = replace(as_if(task.facts), baselines=rules)
    assert r.rule.accuracy == max(rules.values()) and "linear rule" in r.rule.others
    assert RULES[r.rule.name] == "always naming the largest class"
    text = report.render(r, "key_findings")
    assert "**The best accuracy is not distinguishable from always naming the largest class**" in text
    assert report.render(r, "best_parameters").count("- **Balanced validation accuracy**: ") == 2
    assert "| Balanced (%) |" in report.render(r, "all_trials")
    assert "The largest class has 89 % of the samples" in report.render(r, "measured")


def test_the_linear_rule_is_ridge_regression_on_means_however_many_features():
    x, y = recordings()
    for n_features in (4, 2000):  # solved in one way and in another
        wide = np.concatenate([x, np.random.default_rng(0).normal(size=(120, 6, n_features - 4))], 2)
        task = ArrayTask(wide, y, areas=["a"] * (n_features // 2) + ["b"] * (n_features // 2))
        (a, t), (b, u) = (
            (part[0].mean(2).transpose(0, 1).flatten(1).double().numpy(), part[1].numpy())
            for part in (task._on("train", "cpu"), task._on("test", "cpu"))
        )
        center, sign = a.mean(0), 2 * t - 1
        dual = np.linalg.solve((a - center) @ (a - center).T + np.eye(len(a)), sign - sign.mean())
        guess = (b - center) @ (a - center).T @ dual + sign.mean() > 0
        assert task.baselines()["linear rule"] == pytest.approx((guess == u).mean())


# ---- from raw recordings to labels


FORMS = ["three channels and two", "unequal lengths", "areas apart", "bytes", "large numbers"]


def form(name):
    """(x, y, what else ArrayTask needs) of one form of recordings."""
    x, y = recordings()
    x = 1e-6 * x + 20
    if name == "areas apart":
        return x.reshape(120, 6, 2, 2).swapaxes(1, 2), np.where(y, 5, -7), {}
    if name == "large numbers":
        return x, np.where(y, np.uint64(2**63 + 5), np.uint64(7)), dict(areas=list("aabb"))
    if name == "unequal lengths":
        lengths = 2 + np.arange(120) % 5
        x[np.arange(6) >= lengths[:, None]] = np.nan
        return x, y.astype(bool), dict(areas=list("abba"), lengths=lengths)
    x = np.concatenate([x, np.full((120, 6, 1), 3.3)], 2)  # and a channel that is constant
    return x, np.where(y, b"walk" if name == "bytes" else "walk", b"run" if name == "bytes" else "run"), dict(
        areas=["hand", "foot", "hand", "foot", "hand"])  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_a_saved_classifier_labels_raw_recordings_as_the_network_was_scored(tmp_path, name):
    x, y, more = form(name)
    split = np.random.default_rng(0).permutation(np.repeat(["train", "validation", "test"], 40))
    task = ArrayTask(x, y, split=split, **more)
    network = fit(HP, task, Budget(30, 2, precision="fp32"), 0).model.replica(0)
    Classifier.of(network, task, 4).save(tmp_path / "c.safetensors")
    loaded = Classifier.load(tmp_path / "c.safetensors")
    test = split == "test"
    lengths = more.get("lengths", np.full(120, 6))[test]
    wanted = np.char.decode(y[test]) if y.dtype.kind == "S" else y[test]
    labels = loaded.predict(x[test], lengths=lengths)
    score = scoring.score(network, task, "test", None, 4)["test_accuracy"][0]
    assert (labels == wanted).mean() == score and loaded.classes_.tolist() == sorted(set(wanted.tolist()))
    probabilities = loaded.predict_proba(x[test], lengths=lengths)
    np.testing.assert_allclose(probabilities.sum(1), 1)
    ce = -np.log(probabilities[np.arange(40), np.searchsorted(loaded.classes_, wanted)]).mean()
    assert ce == pytest.approx(scoring.score(network, task, "test", None, 4)["test_ce"][0], rel=1e-4)
    alone = CTBPRN.load(tmp_path / "c.safetensors")
    assert all(
        torch.equal(a, b) for a, b in zip(alone.state_dict().values(), network.state_dict().values(), strict=True)
    )
    assert loaded.area_names == task.area_names


def test_recordings_that_are_longer_or_shorter_than_in_training_are_read_as_far_as_it_goes():
    x, y = recordings()
    task = task_of(x, y)
    classifier = Classifier.of(fit(HP, task, Budget(3, 1, precision="fp32"), 0).model, task, 4)
    plain = classifier.predict_proba(x[:5, :4])
    np.testing.assert_allclose(classifier.predict_proba(np.concatenate([x[:5], 1e9 + x[:5]], 1)), plain)
    padded = np.concatenate([x[:5, :3], np.full((5, 9, 4), np.nan)], 1)
    short = classifier.predict_proba(padded, lengths=[3] * 5)
    np.testing.assert_allclose(classifier.predict_proba(x[:5, :3]), short, rtol=1e-5)


@pytest.mark.parametrize(
    ("x", "more", "said"),
    [
        (np.zeros((3, 6, 5)), {}, r"x must be \(N, T, 4\) as in training, got shape \(3, 6, 5\)"),
        (np.zeros((3, 2, 6, 2)), {}, r"x must be \(N, T, 4\)"),
        (np.zeros((6, 4)), {}, r"x must be \(N,K,T,F\) or \(N,T,F\)"),
        (np.full((3, 6, 4), np.nan), {}, "missing or infinite values, the first at sample 0, a, token 0"),
        (np.full((3, 6, 4), 1e300), {}, "so far from the training samples"),
        (np.zeros((3, 6, 4)), {"lengths": [7, 1, 1]}, r"lengths must be \(3,\) whole numbers in 1..6"),
        (np.zeros((0, 6, 4)), {}, "x is empty"),
        (np.full((3, 6, 4), "a"), {}, "x must hold numbers"),
    ],
)
def test_recordings_that_do_not_fit_a_classifier_are_refused(x, more, said):
    task = task_of(*recordings())
    network = CTBPRN(2, 4, 2, 2, seed=0)
    with pytest.raises(InputError, match=rf"^recordings to classify: .*{said}"):
        Classifier.of(network, task, 4).predict(x, **more)


@pytest.mark.parametrize(
    ("name", "value"),
    [("kind", "float64"), ("classes", [0, 2**70]), ("classes", ["a"]),
     ("classes", [1.5, 2.5]), ("classes", "ab"), ("seq_len", 0), ("seq_len", "4"),
     ("columns", [[0, 1]]), ("columns", [[0, 1], [2, 9]]), ("columns", [[0, 1], [1, 2]]), ("columns", 5),
     ("area_names", ["a"]), ("area_names", [1, 2]), ("area_names", None)],
)  # fmt: skip
def test_a_classifier_that_does_not_fit_its_network_is_refused(tmp_path, name, value):
    path = tmp_path / "c.safetensors"
    Classifier.of(CTBPRN(2, 4, 2, 2, seed=0), task_of(*recordings()), 4).save(path)
    tensors, text = files.tensors(path)
    content = json.loads(text)
    content["classifier"][name] = value
    files.write_tensors(path, tensors, json.dumps(content))
    with pytest.raises(InputError, match="does not fit its network"):
        Classifier.load(path)


def test_a_network_alone_is_no_classifier(tmp_path):
    CTBPRN(2, 4, 2, 2, seed=0).save(tmp_path / "n.safetensors")
    with pytest.raises(InputError, match="without what a classifier needs"):
        Classifier.load(tmp_path / "n.safetensors")


@pytest.mark.slow
def test_confirm_saves_a_classifier_that_scores_on_raw_recordings_what_its_file_says(reports):
    x, y, more = form("unequal lengths")
    split = np.random.default_rng(1).permutation(np.repeat(["train", "validation", "test"], 40))
    task = ArrayTask(x, y, split=split, **more)
    space = {name: [getattr(HP, name)] for name in ("d", "rank", "temperature", "batch_size", "seq_len", "lr")}
    question = dict(task=task, space=space, budget=Budget(2, 2))
    study = search.open_study("mine", **question)
    search.run_trials(study, 1, **question, device="cpu")
    confirmation = confirm.Confirmation(study, task, evidence.Schedule((2,), (1.0,)), device="cpu")
    runs = confirm.candidates(search.records(study), task, 2, 1)[:1]
    confirmation.train(runs)
    confirmation.save("best_ce", runs[0])
    classifier = Classifier.load(reports / "mine" / "best_ce.safetensors")
    test, lengths = split == "test", more["lengths"]
    accuracy = (classifier.predict(x[test], lengths=lengths[test]) == y[test]).mean()
    assert accuracy == json.loads((reports / "mine" / "best_ce.json").read_text())["weights"]["test_accuracy"]


def test_a_task_goes_to_another_process_without_shared_memory():
    """/dev/shm is 64 MB in a container, so tensors may not travel through it."""
    x, y = recordings()
    task = task_of(x, y)
    sent = bytes(ForkingPickler.dumps(task))
    assert len(sent) > 4 * x.size
    again = pickle.loads(sent)
    for split in ("validation", "test"):
        a, b = next(task.fixed(split)), next(again.fixed(split))
        assert torch.equal(a.x, b.x) and torch.equal(a.y, b.y)
    routing = tasks.RoutingTask(n_features=8, n_tokens=8)
    first = next(routing.fixed("validation", 256))
    sent = bytes(ForkingPickler.dumps(routing))
    assert len(sent) < 4000 and torch.equal(next(pickle.loads(sent).fixed("validation", 256)).x, first.x)
