"""``python -m credit_parallel``: the command line."""

import logging
import os
import sys

from credit_parallel.app.cli.launch import is_rank
from credit_parallel.app.cli.main import main

status = main()
if is_rank():
    # All is written and closed, and the process groups are gone. What is left of their threads can abort a process that
    # takes the usual way out ("terminate called without an active exception"), and with it a job that has succeeded.
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
raise SystemExit(status)
