"""What packages that build on credit-domain need of it beyond its public modules, and users do not.

These names keep their meaning within a minor version, as those of :mod:`credit_domain` do.

Who takes part and who holds which rows: :class:`Domain`, :func:`domain_of`, :func:`sizes_of`, :func:`new_layer`; the
sum over those who take part: :func:`sum_over`. Running a model for its shapes: :func:`trace`, :func:`meta_copy`,
:func:`plain_copy`, :func:`real_dtype_of`. The names of the model that was converted, in a state dict:
:func:`plain_names`, :func:`with_plain_names`.

What becomes of the modules of a model: :func:`fates_of`. What a model that is partitioned may call: :func:`each_entry`
makes a function known to the partitioner. Plans for many numbers of ranks: :class:`ProgramPlanner`.

What only private names of torch tell: :func:`parameters_of`, :func:`buffers_of`, :func:`children_of` and
:func:`pre_hooks_of` a module, :func:`version_of` a tensor, and what :data:`COMPILED` modules add to names.
"""

from credit_domain._torch_private import COMPILED, buffers_of, children_of, parameters_of, pre_hooks_of, version_of
from credit_domain.casts import real_dtype_of
from credit_domain.engine.ranks import ALONE, Domain, domain_of, new_layer, sizes_of, sum_over
from credit_domain.model.fates import Method, fates_of
from credit_domain.model.saved_names import plain_names, with_plain_names
from credit_domain.model.trace import LayerCall, meta_copy, plain_copy, trace
from credit_domain.partitioner.program_plan import ProgramPlanner
from credit_domain.partitioner.rules.own_backward import each_entry

__all__ = [
    "ALONE",
    "COMPILED",
    "Domain",
    "LayerCall",
    "Method",
    "ProgramPlanner",
    "buffers_of",
    "children_of",
    "domain_of",
    "each_entry",
    "fates_of",
    "meta_copy",
    "new_layer",
    "parameters_of",
    "plain_copy",
    "plain_names",
    "pre_hooks_of",
    "real_dtype_of",
    "sizes_of",
    "sum_over",
    "trace",
    "version_of",
    "with_plain_names",
]
