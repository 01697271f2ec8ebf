"""The ``trainer.parallelism`` block of a training configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Union, cast

from credit_mesh._check import integer
from credit_mesh.layout import RankLayout

DATA_MODES = ("fsdp2", "ddp", "none")
PARTITION_METHODS = ("auto", "modules", "graph")

ParallelismConf = Union["ParallelismConfig", Mapping[str, Any]]
"""A parallelism block: a mapping, or the :class:`ParallelismConfig` made from one."""


@dataclass(frozen=True)
class ParallelismConfig:
    """A validated parallelism block.

    Attributes:
        data: How replicas are kept in step: ``"fsdp2"``, ``"ddp"`` or ``"none"``.
        tensor: Tensor-parallel degree, the size of the ``tp`` axis.
        domain: Number of ranks that share the latitude rows of a sample, the size of the ``domain`` axis.
        partition: How a model is made to work on rows: ``"modules"`` converts its modules, ``"graph"`` partitions it
            operation by operation, and ``"auto"`` does the second where the first is not exact.

    Raises:
        ValueError: For an unknown data mode or partition, or a degree that is no positive integer (booleans are none).
    """

    data: str = "none"
    tensor: int = 1
    domain: int = 1
    partition: str = "auto"

    def __post_init__(self) -> None:
        if not isinstance(self.data, str) or self.data not in DATA_MODES:
            accepted = ", ".join(repr(mode) for mode in DATA_MODES)
            raise ValueError(f"parallelism.data must be one of {accepted}; got {self.data!r}")
        if self.partition not in PARTITION_METHODS:
            accepted = ", ".join(map(repr, PARTITION_METHODS))
            raise ValueError(f"parallelism.partition must be one of {accepted}; got {self.partition!r}")
        for key in ("tensor", "domain"):
            object.__setattr__(self, key, integer(f"parallelism.{key}", getattr(self, key), least=1))

    @classmethod
    def from_block(cls, block: ParallelismConf) -> ParallelismConfig:
        """Validate a parallelism block; keys that are left out take their defaults.

        Raises:
            ValueError: If the block is no mapping, has an unknown key, or holds a bad value.
        """
        if isinstance(block, ParallelismConfig):
            return block
        if not isinstance(block, Mapping):
            raise ValueError(
                "the parallelism block must be a mapping such as "
                f"{{'data': 'fsdp2', 'tensor': 1, 'domain': 2}}; got {block!r} ({type(block).__name__})"
            )
        known = list(cls.__dataclass_fields__)
        unknown = [key for key in block if key not in known]
        if unknown:
            values = ", ".join(f"{key!r}: {block[key]!r}" for key in unknown)
            raise ValueError(f"unknown key in the parallelism block: {values}; the keys are {', '.join(known)}")
        return cls(**block)

    def to_dict(self) -> dict[str, Any]:
        """Return the block as a plain dict with every key present, but for ``partition`` if it is ``"auto"``."""
        block = asdict(self)
        if self.partition == "auto":
            del block["partition"]
        return block

    def layout(self, world_size: int) -> RankLayout:
        """Arrange ``world_size`` ranks over (dp, tp, domain).

        Raises:
            ValueError: If ``world_size`` is not divisible by ``tensor * domain``.
        """
        return RankLayout.from_world(world_size, tensor=self.tensor, domain=self.domain)


def parse_parallelism_conf(conf: Mapping[str, Any]) -> dict[str, Any]:
    """Extract and validate the parallelism block of a training configuration.

    Args:
        conf: The whole configuration (with a ``trainer`` section) or the ``trainer`` section itself; either way the
            block is found under the key ``parallelism``.

    Returns:
        A new dict with the keys ``data``, ``tensor`` and ``domain``, defaults filled in (``"none"``, 1, 1), and
        ``partition``, if it is not ``"auto"``.

    Raises:
        ValueError: If the block is missing, has an unknown key, or holds a bad value; the message names the key, the
            value, and what would be accepted.
    """
    return config_of(conf).to_dict()


def dp_world_size(parallelism_conf: ParallelismConf, world_size: int) -> int:
    """Number of data-parallel replicas in a world: ``world_size / (tensor * domain)``.

    Args:
        parallelism_conf: The parallelism block itself, as :func:`parse_parallelism_conf` returns it.
        world_size: Number of ranks.

    Raises:
        ValueError: If the block is bad, or ``world_size`` is not divisible by ``tensor * domain``; then the message
            says which degrees fit.
    """
    return ParallelismConfig.from_block(parallelism_conf).layout(world_size).dp


def config_of(conf: Mapping[str, Any]) -> ParallelismConfig:
    """Find the block in a whole configuration or its trainer section, and validate it."""
    if not isinstance(conf, Mapping):
        raise ValueError(f"conf must be a mapping; got {conf!r} ({type(conf).__name__})")
    path = "trainer.parallelism" if "trainer" in conf else "parallelism"
    section = conf.get("trainer", conf)
    if not isinstance(section, Mapping) or "parallelism" not in section:
        hint = "add one such as trainer: {parallelism: {data: fsdp2, tensor: 1, domain: 2}}"
        if set(conf) and set(conf) <= set(ParallelismConfig.__dataclass_fields__):
            hint = "this looks like the block itself; pass it as {'parallelism': {...}}"
        raise ValueError(f"conf has no {path} block: {hint}")
    return ParallelismConfig.from_block(cast("ParallelismConf", section["parallelism"]))
