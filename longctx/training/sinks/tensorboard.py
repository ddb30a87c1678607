"""TensorBoard files in ``output/tensorboard``. The one module that knows TensorBoard."""

from torch.utils.tensorboard import SummaryWriter

from longctx.training.record import StepRecord
from longctx.training.sinks.scalars import list_scalars
from longctx.training.sinks.sink import LoggedRun, Sink

FOLDER_NAME = "tensorboard"


class TensorBoardFiles(Sink):
    """A scalar of each kind for every step."""

    def __init__(self, run: LoggedRun) -> None:
        # What an earlier start wrote of steps that are computed again disappears from the curves.
        self._writer = SummaryWriter(str(run.output / FOLDER_NAME), purge_step=run.start_step + 1)

    def write(self, record: StepRecord, eta_s: float) -> None:
        for name, value in list_scalars(record).items():
            self._writer.add_scalar(name, value, record.step)

    def close(self) -> None:
        self._writer.close()
