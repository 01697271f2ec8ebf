"""Run a function on many ranks of this machine, in tests.

Two kinds of ranks, one interface:

- :func:`run_threads`: ranks are threads of this process. Sixteen of them take a tenth of a second, so this is for
  breadth. They share the interpreter, and torch's one CPU random generator: draw before, or from a
  :class:`torch.Generator` of the rank's own. To seed, or fork, the common one in a rank is a race.
- :func:`run_processes`: ranks are processes on gloo, as in training. About a second for the first call, a few tenths
  of one after that, so this is for truth.

Both return what each rank returned, by rank, and raise :class:`RankError` with the traceback of each rank that failed.
Neither needs torchrun, a network or a free port.
"""

from credit_halo.testing._errors import RankError
from credit_halo.testing._processes import run_processes
from credit_halo.testing._thread_group import ThreadGroup
from credit_halo.testing._threads import run_threads
from credit_halo.testing._transpose import dot_test, matrix_of

__all__ = ["RankError", "ThreadGroup", "dot_test", "matrix_of", "run_processes", "run_threads"]
