"""What packages that build on credit-halo need of it beyond :mod:`credit_halo`, and users do not.

These names keep their meaning within a minor version, as those of :mod:`credit_halo` do. Everything else in this
package may change with any release.

Agreement: :func:`agree` before ranks do something together for the first time, :func:`has_agreed`.

Partition: :data:`learner` asks the other ranks how many rows they hold, once; :func:`learn_while_tracing` does so while
torch.compile traces.

Operators of one's own: :func:`group_by_name`, :func:`keep_order` and :func:`prepare_inductor` for what torch.compile
traces; :func:`marked`, :func:`reach` for activation checkpoints; :func:`break_group`, :func:`refuse_broken` around what
ranks send; :data:`debug` for ``CREDIT_HALO_DEBUG``.

Exchanges as parts of them: :data:`ops`, :data:`plans`, :func:`misfit`, :func:`empty_rows`, :func:`memory_format`. The
operators ``torch.ops.credit_halo.sum(x, group, compiled)`` and ``broadcast(x, src, group, compiled)`` take the name of
a group, as compiled code must.

What torch may take away: :func:`gone`, the error where a private name of torch is not there.

What changes the process outside of these packages: :func:`share_cores`, :func:`allow_recompilations`,
:func:`end_process`; each can be switched off by the environment.
"""

from credit_halo import debug, ops
from credit_halo._torch_private import gone, keep_order, prepare_inductor
from credit_halo.agreement import agree, has_agreed
from credit_halo.bounded import Bounded
from credit_halo.faults import break_group, refuse_broken
from credit_halo.fit import misfit
from credit_halo.groups import group_by_name
from credit_halo.halo_exchange import _HaloExchangeFunction as HaloExchangeFunction
from credit_halo.learning import PartitionLearner, learn_while_tracing, learner
from credit_halo.plan import plans, repartition_needs
from credit_halo.process_wide import allow_recompilations, end_process, share_cores
from credit_halo.recompute import marked, reach
from credit_halo.rows import empty_rows, memory_format
from credit_halo.transport import as_bytes

__all__ = [
    "Bounded",
    "HaloExchangeFunction",
    "PartitionLearner",
    "agree",
    "allow_recompilations",
    "as_bytes",
    "break_group",
    "debug",
    "empty_rows",
    "end_process",
    "gone",
    "group_by_name",
    "has_agreed",
    "keep_order",
    "learn_while_tracing",
    "learner",
    "marked",
    "memory_format",
    "misfit",
    "ops",
    "plans",
    "prepare_inductor",
    "reach",
    "refuse_broken",
    "repartition_needs",
    "share_cores",
]
