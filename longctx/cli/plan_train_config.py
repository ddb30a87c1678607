"""What ``longctx plan train`` takes: all that ``longctx train`` does, and the machine. No torch here."""

from dataclasses import dataclass, field

from longctx.machine import MachineConfig
from longctx.training.config import TrainConfig
from parallel.links import LinkModel


@dataclass(frozen=True, slots=True)
class PlanTrainConfig(TrainConfig):
    """Everything ``longctx plan train`` takes."""

    machine: MachineConfig = field(default_factory=MachineConfig)
    links: LinkModel = field(default_factory=LinkModel)
