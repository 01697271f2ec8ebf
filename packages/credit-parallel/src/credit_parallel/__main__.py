"""``python -m credit_parallel``: the command line."""

from credit_parallel.app.cli.launch import is_rank
from credit_parallel.app.cli.main import main

status = main()
if is_rank():
    from credit_halo.extend import end_process

    end_process(status)
raise SystemExit(status)
