"""What tests of measurements share."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def one_thread_and_seed():
    """One thread, as ranks on a CPU have, and one seed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
