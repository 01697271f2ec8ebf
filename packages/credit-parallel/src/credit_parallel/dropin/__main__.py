"""``python -m credit_parallel.dropin script.py ...`` and ``-m module ...``: run a program with the drop-in."""

from __future__ import annotations

import sys

from credit_parallel.dropin.program import main

if __name__ == "__main__":
    main(sys.argv[1:])
