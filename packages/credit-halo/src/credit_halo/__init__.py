"""One exact, differentiable exchange of rows.

Any rank can ask for any rows of a tensor whose rows are sharded over ranks, and the gradient finds its way home. A
*plan* (integers only) says who sends what to whom; the *exchange* carries it out.
"""

import credit_mesh.torch_floor  # noqa: F401 - an old torch is refused before anything else is imported
from credit_halo._version import __version__
from credit_halo.collectives import all_mean, all_sum, broadcast, gather_rows, scatter_rows
from credit_halo.edges import EdgeRule, Span, constant, pole_crossing
from credit_halo.exchange import PendingRows, exchange_rows, post_rows, repartition_rows, take_rows
from credit_halo.faults import ExchangeError, naming_missing_ranks
from credit_halo.halo_exchange import HaloExchange
from credit_halo.plan import ExchangePlan, Message, Need, Placement, plan_halo, plan_repartition, plan_rows
from credit_halo.roll_call import answer_roll_calls
from credit_halo.timeouts import as_timeout, set_timeouts
from credit_halo.transpose import transpose_rows

__all__ = [
    "EdgeRule",
    "ExchangeError",
    "ExchangePlan",
    "HaloExchange",
    "Message",
    "Need",
    "PendingRows",
    "Placement",
    "Span",
    "__version__",
    "all_mean",
    "all_sum",
    "answer_roll_calls",
    "as_timeout",
    "broadcast",
    "constant",
    "exchange_rows",
    "gather_rows",
    "naming_missing_ranks",
    "plan_halo",
    "plan_repartition",
    "plan_rows",
    "pole_crossing",
    "post_rows",
    "repartition_rows",
    "scatter_rows",
    "set_timeouts",
    "take_rows",
    "transpose_rows",
]
