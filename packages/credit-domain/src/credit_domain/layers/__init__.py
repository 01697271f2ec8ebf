"""Layers on sharded rows: each wraps torch's module of the same name, and gives the numbers of one rank."""

from credit_domain.layers.base import DomainParallelLayer
from credit_domain.layers.conv import (
    DomainParallelConv1d,
    DomainParallelConv2d,
    DomainParallelConv3d,
    DomainParallelConvTranspose1d,
    DomainParallelConvTranspose2d,
    DomainParallelConvTranspose3d,
    DomainParallelPeriodicConv2d,
)

__all__ = [
    "DomainParallelConv1d",
    "DomainParallelConv2d",
    "DomainParallelConv3d",
    "DomainParallelConvTranspose1d",
    "DomainParallelConvTranspose2d",
    "DomainParallelConvTranspose3d",
    "DomainParallelLayer",
    "DomainParallelPeriodicConv2d",
]
