"""The ``longctx`` command, whose ranks run ``tests/longctx/gang_body.py`` in place of the trainer."""

import sys
from functools import partial

from cluster import train_launch
from longctx.cli.main import main
from longctx.training import launch
from tests.longctx.gang_body import BODY

if __name__ == "__main__":
    launch.launch_locally = partial(launch.launch_locally, body=BODY)
    train_launch.launch_on_ray = partial(train_launch.launch_on_ray, body=BODY)
    sys.exit(main())
