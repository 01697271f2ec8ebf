"""What packages that build on credit-domain need of it beyond its public modules, and users do not.

These names keep their meaning within a minor version, as those of :mod:`credit_domain` do.

Who takes part and who holds which rows: :class:`Domain`, :func:`domain_of`, :func:`sizes_of`, :func:`new_layer`.
Running a model for its shapes: :func:`trace`, :func:`meta_copy`, :func:`plain_copy`, :func:`real_dtype_of`. The names
of the model that was converted, in a state dict: :func:`plain_names`, :func:`with_plain_names`.
"""

from credit_domain.casts import real_dtype_of
from credit_domain.engine.ranks import ALONE, Domain, domain_of, new_layer, sizes_of
from credit_domain.model.saved_names import plain_names, with_plain_names
from credit_domain.model.trace import LayerCall, meta_copy, plain_copy, trace

__all__ = [
    "ALONE",
    "Domain",
    "LayerCall",
    "domain_of",
    "meta_copy",
    "new_layer",
    "plain_copy",
    "plain_names",
    "real_dtype_of",
    "sizes_of",
    "trace",
    "with_plain_names",
]
