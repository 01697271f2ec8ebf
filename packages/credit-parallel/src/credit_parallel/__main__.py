"""``python -m credit_parallel``: the command line."""

from credit_parallel.cli.main import main

raise SystemExit(main())
