"""What one process of a plan can use: as configured, or as measured here."""

from dataclasses import dataclass

import torch

from longctx.errors import ConfigError
from longctx.machine import MachineConfig
from longctx.training.peak import measure_peak_flops, measure_read_speed, read_machine_memory
from parallel.option import parse_size


@dataclass(frozen=True, slots=True)
class MachineLimits:
    """Of one process."""

    device_type: str  # cpu or cuda
    memory_bytes: int
    peak_flops: float
    bytes_per_s: float


def find_device_type(device_name: str) -> str:
    """``cpu`` or ``cuda``, of a ``model.device`` that may be ``auto``."""
    return "cuda" if device_name == "cuda" or (device_name == "auto" and torch.cuda.is_available()) else "cpu"


def find_limits(machine: MachineConfig, *, device_name: str, dtype: str, num_processes: int) -> MachineLimits:
    """What is not configured is measured here.

    Args:
        machine: what is known.
        device_name: ``auto``, ``cpu`` or ``cuda``, as in ``model.device``.
        dtype: of matrix products.
        num_processes: over all nodes.

    Raises:
        ConfigError: if a GPU is planned for where there is none, and its numbers are missing.
    """
    has_gpu = torch.cuda.is_available()
    device_type = find_device_type(device_name)
    if device_type == "cuda" and not has_gpu:
        for key, example in (("memory", "80GiB"), ("peak_flops", "8e14"), ("bytes_per_s", "3e12")):
            if getattr(machine, key) is None:
                raise ConfigError(
                    f"machine.{key}=null is not allowed with model.device=cuda: torch sees no GPU here to measure; "
                    f"for example machine.{key}={example}"
                )
    device = torch.device(device_type if has_gpu else "cpu")
    processes_here = max(1, num_processes // machine.num_nodes)
    if device_type == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // processes_here))
    memory = machine.memory
    return MachineLimits(
        device_type,
        parse_size(memory) if memory is not None else read_machine_memory(device, num_ranks=processes_here),
        machine.peak_flops or measure_peak_flops(device, getattr(torch, dtype)),
        machine.bytes_per_s or measure_read_speed(device),
    )
