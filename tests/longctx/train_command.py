"""The ``longctx`` command, whose ranks run ``tests/longctx/gang_body.py`` in place of the trainer."""

import sys
from functools import partial

from longctx.cli.main import main
from longctx.training import launch
from tests.longctx.gang_body import BODY

if __name__ == "__main__":
    launch.launch_locally = partial(launch.launch_locally, body=BODY)
    sys.exit(main())
