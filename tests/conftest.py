"""What several tests share: one thread a process, and studies that live in a temporary folder."""

import numpy as np
import pytest
import torch

from ctbprn_lib import search, tasks

torch.set_num_threads(1)


@pytest.fixture
def reports(tmp_path, monkeypatch):
    """An empty folder in the place of reports/, and no storage named by the environment."""
    monkeypatch.setattr(search, "REPORTS", tmp_path)
    monkeypatch.delenv("CTBPRN_STORAGE", raising=False)
    return tmp_path


@pytest.fixture(scope="session")
def small_task():
    """A routing task that trains in milliseconds."""
    return tasks.RoutingTask(n_areas=2, n_features=8, n_tokens=8)


@pytest.fixture(scope="session")
def array_task():
    """90 samples of three classes that the means of two features, one in each area, tell apart."""
    rng = np.random.default_rng(0)
    y = np.repeat(["a", "b", "c"], 30)
    x = rng.normal(size=(90, 2, 6, 3)).astype(np.float32)
    x[y == "a", 0, :, 0] += 2
    x[y == "b", 1, :, 1] += 2
    return tasks.ArrayTask(x, y, source="three classes")
