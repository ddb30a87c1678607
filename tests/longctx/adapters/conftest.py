"""One thread: the models are tiny, and threads that wait for each other take longer than they do."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)
