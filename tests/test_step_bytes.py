"""The counted bytes of a training step are the peak of a process, and what follows from the sizes by hand."""

import gc
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing.context import SpawnContext

import numpy as np
import pytest
import torch

from ctbprn_lib import InputError, device, memory, published
from ctbprn_lib.memory import LiveBytes, cards, largest_batch, step_bytes
from ctbprn_lib.tasks import ArrayTask, RoutingTask
from ctbprn_lib.train import Budget, Hyperparameters, Training

# Options of glibc's mallopt, as malloc.h numbers them, with which each tensor of 64 KiB or more has pages of its own.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -2, -3, -4
OWN_PAGES = {M_TRIM_THRESHOLD: 2**16, M_TOP_PAD: 0, M_MMAP_THRESHOLD: 2**16, M_MMAP_MAX: 2**16}
SMALL = Hyperparameters(d=16, rank=4, batch_size=8, seq_len=8)


def test_views_and_changes_in_place_add_nothing_and_what_is_freed_leaves():
    with LiveBytes() as live:
        x = torch.zeros(256)  # 1,024 bytes
        rows = x.view(16, 16)[1:].mT
        rows.add_(1)
        y = x[:64] * 2  # 256 bytes
        del x
        z = y + 1  # x lives on in rows
        del rows
        y = z.double()  # 512 bytes; the old y is freed when the new one is there
        z = z + 1
    assert live.after[0] == 1024 and max(live.after[:4]) == 1024
    assert live.after[-5:] == [1024, 1280, 1536, 1024, 1024]


def peaks_of_this_process(shapes):
    """How far the process's peak memory grows, in bytes, in a training step of each (hp, n_replicas, precision).

    It belongs into a new process, whose heap has no holes that tensors fit into.
    """
    for option, value in OWN_PAGES.items():
        device.LIBC.mallopt(option, value)
    torch.set_num_threads(1)
    peaks = []
    for hp, n_replicas, precision in shapes:
        for _ in range(2):  # in the first, libraries take workspaces that they keep
            training = None
            gc.collect()
            budget = Budget(n_replicas=n_replicas, n_steps=1)
            training = Training(hp, RoutingTask(), budget, torch.device("cpu"), precision)
            training.step()
        peaks.append(training.peak_mem_mib() * 2**20)
    return peaks


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(device.LIBC, "mallopt"), reason="a peak follows the tensors with glibc alone")
def test_the_count_is_the_peak_of_a_process_within_two_percent():
    trial_2 = replace(published.hyperparameters(2), batch_size=64)
    shapes = [
        (trial_2, 1, "fp32"),
        (trial_2, 1, "bf16"),
        (Hyperparameters(d=32, rank=16, batch_size=128), 1, "fp32"),
        (Hyperparameters(d=96, rank=4, batch_size=32, seq_len=64), 2, "fp32"),
        (Hyperparameters(d=256, rank=8, batch_size=8, seq_len=16), 4, "bf16"),  # weights are most of it
    ]
    counted = [step_bytes(hp, RoutingTask(), *more).peak for hp, *more in shapes]
    assert min(counted) > 60 * 2**20  # else pages and libraries would matter
    with ProcessPoolExecutor(1, SpawnContext()) as process:
        assert process.submit(peaks_of_this_process, shapes).result() == pytest.approx(counted, rel=0.02)


def test_weights_moments_and_gradients_are_those_of_the_network_by_hand():
    F, K, d, r, C = 4, 1, 64, 4, 2
    task, hp = RoutingTask(n_areas=K, n_features=F, n_tokens=1), Hyperparameters(d=d, rank=r, n_layers=1, seq_len=1)
    column = 4 * d * d + (2 * d * d + d) + 2 * d  # W_b, W_a, W_m1, W_m2; W_g and its bias; the norm's gain and bias
    controller = (d * d + d) + 2 * K * d + (2 * d * K * d + 2 * d) + (K * 2 * d + K)  # P; the norm; H1; H2
    head = 2 * K * d + K * d * C + C
    floats = K * (d * F + d) + K * column + 2 * K * d * r + controller + head  # a stem comes first, U and V are d r
    found = step_bytes(replace(hp, batch_size=2), task)
    assert (found.weights, found.moments) == (4 * floats, 8 * floats)
    largest = 4 * 2 * d * K * d  # H1, or W_g
    # with two tokens in the batch, the peak is where the last gradients are made, beside one more that is on its way
    assert 16 * floats <= found.peak < 16 * floats + largest
    three = step_bytes(replace(hp, batch_size=2), task, n_replicas=3)
    assert (three.weights, three.moments) == (12 * floats, 24 * floats)


def test_a_sample_adds_its_numbers_and_the_activations_that_backward_needs():
    hp, task = published.hyperparameters(2), RoutingTask()
    found, narrow = step_bytes(hp, task), step_bytes(hp, RoutingTask(n_features=32))
    activation = 4 * task.n_areas * hp.seq_len * hp.d
    assert found.per_sample > 10 * hp.n_layers * activation  # x, b, a, gate, n and what is inside them, of each layer
    assert found.per_sample - narrow.per_sample == pytest.approx(4 * 2 * 128 * 32, rel=0.05)  # 32 features fewer


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_batches_tell_what_any_batch_takes(precision, array_task, monkeypatch):
    lengths = np.random.default_rng(0).integers(2, 6, 90)
    x, y = np.random.default_rng(1).normal(size=(90, 2, 6, 3)), np.repeat([0, 1, 2], 30)
    masked = ArrayTask(x, y, lengths=lengths, source="unequal")
    drawn, wide = RoutingTask(), replace(SMALL, d=96)
    shapes = [(SMALL, drawn, 2), (wide, drawn, 1), (SMALL, array_task, 2), (SMALL, masked, 1)]
    few = [step_bytes(*shape, precision) for shape in shapes]
    monkeypatch.setattr(memory, "BATCHES", (37, 128))
    memory._count.cache_clear()
    assert [step_bytes(*shape, precision) for shape in shapes] == few
    memory._count.cache_clear()


def test_a_batch_of_one_takes_a_little_less_than_is_returned():
    task, hp = RoutingTask(), replace(published.hyperparameters(2), batch_size=1)
    with LiveBytes() as live:
        Training(hp, task, Budget(n_replicas=1, n_steps=1), torch.device("cpu"), "fp32").step()
    assert 0.97 < max(live.after) / step_bytes(hp, task).peak <= 1


def test_bytes_grow_linearly_with_replicas_and_never_shrink_with_a_size(small_task):
    two, three, five = (step_bytes(SMALL, small_task, R).peak for R in (2, 3, 5))
    assert five - three == 2 * (three - two) > 0
    assert step_bytes(SMALL, small_task, 1).peak <= three - (three - two) * 2
    sizes = {"d": (8, 16, 32, 64), "seq_len": (2, 4, 8), "n_layers": (1, 2, 3), "batch_size": (2, 9)}
    for name, values in sizes.items():
        peaks = [step_bytes(replace(SMALL, **{name: value}), small_task).peak for value in values]
        assert peaks == sorted(set(peaks))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_largest_batch_fits_and_one_more_does_not(small_task, precision):
    def peak(batch_size):
        return step_bytes(replace(SMALL, batch_size=batch_size), small_task, 2, precision).peak

    for limit in (2**19, 2**20 + 1, 8 * 2**30):
        n = largest_batch(SMALL, small_task, limit, 2, precision)
        assert n >= 1 and peak(n) <= limit < peak(n + 1)
    assert largest_batch(SMALL, small_task, 1000) == 0
    assert largest_batch(replace(SMALL, batch_size=99), small_task, 2**20) == largest_batch(SMALL, small_task, 2**20)


def test_what_trial_2_takes_of_cards():
    hp, task = published.hyperparameters(2), RoutingTask()
    peak, found = step_bytes(hp, task).peak, cards(hp, task)
    assert [card.gib for card in found] == list(memory.CARDS_GIB)
    assert [card.share * card.gib * 2**30 for card in found] == pytest.approx([peak] * 3)
    assert found[0].share < 0.01 and 32 < found[0].largest_batch < found[1].largest_batch < found[2].largest_batch
    in_bf16 = cards(hp, task, precision="bf16")
    assert all(half.largest_batch > full.largest_batch for half, full in zip(in_bf16, found, strict=True))


def test_a_sequence_stops_at_the_tasks_tokens_and_bad_input_is_refused(small_task):
    assert step_bytes(replace(SMALL, seq_len=128), small_task) == step_bytes(SMALL, small_task)
    assert step_bytes(SMALL, small_task, precision="tf32") == step_bytes(SMALL, small_task)
    with pytest.raises(InputError, match=r"precision must be .* got 'auto'"):
        step_bytes(SMALL, small_task, precision="auto")
    with pytest.raises(InputError, match="n_replicas must be a whole number above 0, got 0"):
        step_bytes(SMALL, small_task, 0)
