"""Data x tensor x domain parallel training on one device mesh, composed from public PyTorch parts.

Many functions take these arguments, which mean the same in all of them:

- ``model``: the model, wrapped or not.
- ``target``: a :class:`~credit_parallel.context.ParallelContext`, or the model.
- ``manager``: the domain-parallel manager; None takes the present one, or a single rank where there is none.
- ``where``: what says where this rank is; see :func:`credit_parallel.contract.place_of`.
- ``group``: the ranks that take part; None means the whole world, or nobody else where torch.distributed is not
  initialised.
- ``partition``: the rows of each domain rank; where None, the ranks ask each other.
- ``dim``: the sharded dim; latitude, -2, unless a function says otherwise.
- ``conf``: the whole configuration, or its ``trainer`` section. Of it ``trainer.fsdp2_blocks`` may list more blocks.
- ``label``: what errors call the call; the same on every rank.

What sends messages raises an ``ExchangeError`` if a rank has ended, or did not answer within the timeout of the group.
Every rank of the group must call it.
"""

from credit_mesh import build_device_mesh
from credit_parallel._version import __version__
from credit_parallel.collectives import all_reduce_avg, allreduce_grads_avg, clip_grad_norm_, total_grad_norm
from credit_parallel.context import ParallelContext, parallelize
from credit_parallel.contract import check_batch, check_finite
from credit_parallel.ddp import apply_ddp
from credit_parallel.domain import (
    apply_domain_parallel,
    gather_spatial,
    get_domain_manager,
    get_raw_model,
    shard_lat_weights,
    shard_spatial,
    sync_domain_gradients,
    unpad_shard_interp,
)
from credit_parallel.fsdp2 import apply_fsdp2
from credit_parallel.losses import cos_latitude_weights, domain_mean, domain_value, latitude_weights
from credit_parallel.mesh import fold_domain
from credit_parallel.metrics import ACC, MAE, RMSE, Bias, ZonalSpectrum
from credit_parallel.sampler import data_parallel_sampler
from credit_parallel.seeds import global_noise, noise_like, seed_ranks
from credit_parallel.tensor_parallel import (
    apply_native_tensor_parallel,
    apply_tensor_parallel,
    supports_native_tp,
    sync_replicated_gradients,
)

__all__ = [
    "ACC",
    "MAE",
    "RMSE",
    "Bias",
    "ParallelContext",
    "ZonalSpectrum",
    "__version__",
    "all_reduce_avg",
    "allreduce_grads_avg",
    "apply_ddp",
    "apply_domain_parallel",
    "apply_fsdp2",
    "apply_native_tensor_parallel",
    "apply_tensor_parallel",
    "build_device_mesh",
    "check_batch",
    "check_finite",
    "clip_grad_norm_",
    "cos_latitude_weights",
    "data_parallel_sampler",
    "domain_mean",
    "domain_value",
    "fold_domain",
    "gather_spatial",
    "get_domain_manager",
    "get_raw_model",
    "global_noise",
    "latitude_weights",
    "noise_like",
    "parallelize",
    "seed_ranks",
    "shard_lat_weights",
    "shard_spatial",
    "supports_native_tp",
    "sync_domain_gradients",
    "sync_replicated_gradients",
    "total_grad_norm",
    "unpad_shard_interp",
]
