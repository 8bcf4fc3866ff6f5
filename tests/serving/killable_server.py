"""`deploy serve` whose job store kills the process at a point of its writes.

    python -m tests.serving.killable_server POINT COUNT [arguments of serve]
"""

from __future__ import annotations

import functools
import sys
from unittest import mock

from deploy.cli.commands import main
from runtimes.serving.state.job_store import JobStore
from tests.serving.kill_worker import killing

if __name__ == "__main__":
    point, count, *arguments = sys.argv[1:]
    opened = functools.partialmethod(JobStore.__init__, checkpoint=killing(point, int(count)))
    sys.argv = ["deploy", "serve", *arguments]
    with mock.patch.object(JobStore, "__init__", opened):
        main()
