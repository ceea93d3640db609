"""The routing task's distribution, own arrays, and files from outside."""

import numpy as np
import pytest
import torch

from ctbprn_lib import InputError
from ctbprn_lib.tasks import ArrayTask, RoutingTask, load_task


def draw(task, n=4000, seed=0, **kw):
    return task.draw(2, n // 2, torch.Generator().manual_seed(seed), **kw)


def test_moments_of_the_routing_task():
    """x is 0.7 N(0,1) everywhere, plus a vector that is constant over tokens on a quarter of one area's features."""
    task = RoutingTask(n_areas=3, n_features=16, n_tokens=20)
    x, y, mask, area = draw(task, 6000)
    assert x.shape == (2, 3000, 3, 20, 16) and mask is None
    carries = torch.nn.functional.one_hot(area, 3).bool()
    with_signal, without = x[carries], x[~carries]
    assert with_signal[..., 4:].std() == pytest.approx(0.7, abs=0.003)
    assert without.std() == pytest.approx(0.7, abs=0.003)
    means = with_signal[..., :4].mean(1)  # (N,4): v plus noise of variance 0.49 / 20
    assert means.var() == pytest.approx(0.25 + 0.49 / 20, rel=0.04)
    assert means.mean() == pytest.approx(0, abs=0.02)
    assert (with_signal[..., :4] - means[:, None]).std() == pytest.approx(0.7 * (19 / 20) ** 0.5, abs=0.003)
    assert y.float().mean() == pytest.approx(0.5, abs=0.03)
    assert torch.bincount(area.flatten()).float().div(6000).tolist() == pytest.approx([1 / 3] * 3, abs=0.03)
    assert torch.equal(y[carries.any(-1)], (x[carries][..., :4].sum((1, 2)) > 0).long())


@pytest.mark.parametrize(("n_tokens", "linear"), [(32, 0.928), (64, 0.952), (128, 0.958)])
def test_what_simple_rules_reach(n_tokens, linear):
    rules = RoutingTask(n_tokens=n_tokens).baselines()
    assert rules["linear rule"] == pytest.approx(linear, abs=0.01)
    assert rules["ceiling"] > 0.998
    assert rules["majority class"] == pytest.approx(0.5, abs=0.02)


def test_the_label_comes_from_all_tokens_though_few_are_seen():
    """With 4 of 32 tokens drawn, the seen sum agrees with the label exactly as often as when all are drawn and cut."""
    task = RoutingTask(n_tokens=32, n_features=8)

    def agreement(x, y, area, n=4):
        sums = x[..., :n, :2].sum((-2, -1)).gather(-1, area[..., None])[..., 0]
        return ((sums > 0).long() == y).double().mean().item()

    short, full = draw(task, 40000, 1, seq_len=4), draw(task, 40000, 2)
    assert short.x.shape[3] == 4
    assert agreement(short.x, short.y, short.area) == pytest.approx(agreement(full.x, full.y, full.area), abs=0.01)
    assert agreement(short.x, short.y, short.area) < 0.95


def test_held_out_sets_are_the_same_for_every_length_and_size_and_differ_from_each_other():
    task, again = RoutingTask(n_features=8, n_tokens=16), RoutingTask(n_features=8, n_tokens=16)
    whole = torch.cat([b.x for b in task.fixed("validation", 600)], 1)
    short = torch.cat([b.x for b in again.fixed("validation", 300, seq_len=4)], 1)
    assert whole.shape[1] == 600 and torch.equal(whole[:, :300, :, :4], short)
    labels = {name: torch.cat([b.y for b in task.fixed(name, 600)], 1) for name in ("validation", "test")}
    assert not torch.equal(labels["validation"], labels["test"])


def test_impossible_routing_tasks_are_refused():
    with pytest.raises(InputError, match="n_features of at least 4"):
        RoutingTask(n_features=3)


def arrays(n=60, t=5, f=4):
    rng = np.random.default_rng(0)
    return rng.normal(3, 2, (n, t, f)).astype(np.float32), np.arange(n) % 3


def test_features_are_grouped_by_area_and_standardised_with_training_samples_alone():
    x, y = arrays()
    split = np.repeat(["train", "validation", "test"], 20)
    task = ArrayTask(x, y, areas=["left", "right", "left", "left"], split=split)
    assert (task.area_names, task.n_areas, task.n_features, task.n_classes) == (("left", "right"), 2, 3, 3)
    assert task.n_samples == {"train": 20, "validation": 20, "test": 20}
    held_out = next(task.fixed("test")).x[0]  # (N,K,T,F)
    expected = (x[40:] - x[:20].mean((0, 1))) / x[:20].std((0, 1))
    np.testing.assert_allclose(held_out[:, 0], expected[..., [0, 2, 3]], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(held_out[:, 1, :, 0], expected[..., 1], rtol=1e-4, atol=1e-5)
    assert (held_out[:, 1, :, 1:] == 0).all()
    changed = x.copy()
    changed[20:] *= 100  # held-out samples cannot change how the training samples look
    other = ArrayTask(changed, y, areas=["left", "right", "left", "left"], split=split)
    generator = torch.Generator().manual_seed(0)
    first = task.draw(2, 8, generator)
    assert torch.equal(first.x, other.draw(2, 8, generator.manual_seed(0)).x)


def test_without_a_split_every_part_has_every_class_and_no_sample_twice(array_task):
    parts = {name: next(array_task.fixed(name)) for name in ("validation", "test")}
    assert array_task.n_samples == {"train": 54, "validation": 18, "test": 18}
    for part in parts.values():
        assert torch.bincount(part.y[0]).tolist() == [6, 6, 6]
    rows = torch.cat([p.x[0].flatten(1) for p in parts.values()])
    assert len(rows.unique(dim=0)) == 36


def test_without_validation_a_third_of_training_is_set_aside():
    x, y = arrays()
    task = ArrayTask(x, y, areas=list("aabb"), split=np.repeat(["train", "test"], [45, 15]))
    assert task.n_samples == {"train": 30, "validation": 15, "test": 15}


def test_the_linear_rule_reads_means(array_task):
    rules = array_task.baselines()
    assert rules["linear rule"] > 0.9 and rules["majority class"] == pytest.approx(1 / 3, abs=0.01)


def test_unequal_lengths_are_masked_and_padding_does_not_count():
    x, y = arrays()
    lengths = np.where(np.arange(60) % 2, 5, 2)
    x[np.arange(5) >= lengths[:, None]] = np.nan  # what does not exist may hold anything
    task = ArrayTask(x, y, areas=list("aabb"), lengths=lengths)
    batch = task.draw(1, 30, torch.Generator().manual_seed(0))
    assert set(batch.mask.sum(-1).unique().tolist()) == {2, 5}
    assert batch.x.isfinite().all()
    assert (batch.x.transpose(2, 3)[~batch.mask] == 0).all()


def test_features_need_the_area_of_each():
    x, y = arrays()
    with pytest.raises(InputError, match="needs areas"):
        ArrayTask(x, y)


def test_missing_values_are_refused_with_the_count_and_the_first_place():
    x, y = arrays()
    x[7, 3, 2] = np.nan
    x[8, 0, 0] = np.inf
    with pytest.raises(InputError, match="2 missing or infinite values, the first at sample 7, b, token 3, feature 0"):
        ArrayTask(x, y, areas=list("aabb"))


def test_a_npz_is_read_and_another_name_refused(tmp_path):
    x, y = arrays()
    np.savez(tmp_path / "mine.npz", x=x, y=y, areas=list("aabb"))
    assert load_task(str(tmp_path / "mine.npz")).n_samples["train"] == 36
    with pytest.raises(InputError, match='expected "routing"'):
        load_task("routnig")


def test_basic_motions_has_two_real_areas():
    task = load_task("uea:BasicMotions")
    assert task.area_names == ("accelerometer", "gyroscope")
    assert (task.n_features, task.n_tokens, task.n_classes) == (3, 100, 4)
    assert task.n_samples == {"train": 28, "validation": 12, "test": 40}


def test_japanese_vowels_have_unequal_lengths():
    task = load_task("uea:JapaneseVowels")
    batch = next(task.fixed("test"))
    assert (task.n_areas, task.n_features, task.n_classes, task.n_samples["test"]) == (2, 6, 9, 370)
    assert batch.mask.sum(-1).min() < batch.mask.sum(-1).max() == task.n_tokens == 29
