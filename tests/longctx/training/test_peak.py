"""What a rank can do and has held, measured."""

import sys
from pathlib import Path

import pytest
import torch

from longctx.training.peak import measure_peak_flops, read_peak_memory, warn_of_slow_products

CPU = torch.device("cpu")


def test_the_peak_is_that_of_a_processor():
    assert 1e8 < measure_peak_flops(CPU, torch.float32) < 1e15


@pytest.mark.parametrize("has_bf16", [True, False])
def test_slow_products_are_told(monkeypatch, caplog, has_bf16):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has_bf16)
    warn_of_slow_products(CPU, torch.float32)
    warn_of_slow_products(torch.device("cuda"), torch.bfloat16)
    assert not caplog.messages
    warn_of_slow_products(CPU, torch.bfloat16)
    assert ["model.dtype=float32" in message for message in caplog.messages] == [True] * (not has_bf16)


def test_memory_that_was_held_counts():
    before = read_peak_memory(CPU)
    held = torch.ones(before // 4 + 2**26)  # more than was ever held
    assert read_peak_memory(CPU) >= held.nbytes
    del held
    assert read_peak_memory(CPU) >= before


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux counts")
def test_libraries_do_not_count_and_mapped_weights_do(tmp_path):
    status = Path("/proc/self/status").read_text()
    resident = 1024 * int(status.split("VmHWM:")[1].split()[0])
    before = read_peak_memory(CPU)
    assert before < resident - 2**24  # torch's alone are more
    (tmp_path / "weights").write_bytes(bytes(before + 2**26))
    mapped = torch.from_file(str(tmp_path / "weights"), shared=False, size=before + 2**26, dtype=torch.uint8)
    assert mapped[::4096].sum() == 0  # every page is read
    assert read_peak_memory(CPU) >= mapped.nbytes
