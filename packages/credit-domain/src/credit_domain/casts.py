"""Casting a whole module, complex weights and all.

``module.to(dtype)`` casts complex weights to real ones, and ``module.double()`` leaves them in single precision.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from credit_domain._torch_private import apply_to_tensors

__all__ = ["cast_module", "cast_tensor", "complex_dtype", "real_dtype_of"]

Module = TypeVar("Module", bound=nn.Module)

_COMPLEX = {
    torch.float64: torch.complex128,
    torch.float32: torch.complex64,
    torch.bfloat16: torch.complex64,  # there is no complex dtype of two bytes that torch computes with
    torch.float16: torch.complex64,
}
_REAL = {torch.complex128: torch.float64, torch.complex64: torch.float32, torch.complex32: torch.float16}


def complex_dtype(dtype: torch.dtype) -> torch.dtype:
    """The complex dtype that belongs to a real one: complex64, or complex128 to float64.

    Raises:
        ValueError: If ``dtype`` is no floating-point dtype.
    """
    if dtype not in _COMPLEX:
        raise ValueError(f"expected float64, float32, float16 or bfloat16; got {dtype}")
    return _COMPLEX[dtype]


def cast_tensor(x: Tensor, dtype: torch.dtype, device: torch.device | str | None = None) -> Tensor:
    """A tensor in a real dtype, or the complex one that belongs to it; integers and bools keep theirs.

    Errors are those of :func:`complex_dtype`; without a ``device`` it stays where it is.
    """
    own = complex_dtype(dtype)
    return x.to(device=device, dtype=dtype if x.is_floating_point() else own if x.is_complex() else x.dtype)


def cast_module(module: Module, dtype: torch.dtype, device: torch.device | str | None = None) -> Module:
    """Cast all parameters and buffers of a module in place, as :func:`cast_tensor` does, and return the module.

    Parameters stay the same objects, as with ``module.to``.
    """
    complex_dtype(dtype)
    apply_to_tensors(module, lambda x: cast_tensor(x, dtype, device))
    return module


def real_dtype_of(module: nn.Module) -> torch.dtype:
    """The dtype of a module's real inputs: that of its first floating-point parameter, or of its first complex one."""
    real = next((p.dtype for p in module.parameters() if p.is_floating_point()), None)
    if real is not None:
        return real
    return next((_REAL[p.dtype] for p in module.parameters() if p.is_complex()), torch.get_default_dtype())
