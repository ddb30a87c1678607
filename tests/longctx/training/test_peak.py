"""What a rank can do and has held, measured."""

import torch

from longctx.training.peak import measure_peak_flops, read_peak_memory

CPU = torch.device("cpu")


def test_the_peak_is_that_of_a_processor():
    assert 1e8 < measure_peak_flops(CPU, torch.float32) < 1e15


def test_memory_that_was_held_counts():
    before = read_peak_memory(CPU)
    held = torch.ones(before // 4 + 2**26)  # more than was ever held
    assert read_peak_memory(CPU) >= held.nbytes
    del held
    assert read_peak_memory(CPU) >= before
