"""Turning a model for one rank into one for sharded rows, with nothing passed over in silence."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch.distributed as dist
from torch import nn

from credit_domain._torch_private import children_of
from credit_domain.engine.layer import Fate
from credit_domain.model.fates import (
    ConvertedModule,
    Converter,
    ConverterKey,
    Method,
    fates_of,
    is_converted,
    spatial_only,
)
from credit_domain.model.granularity import granularity_of, window_sizes_of
from credit_domain.model.saved_names import rename_loaded
from credit_domain.ops.conv.conv_layers import needs_halo
from credit_domain.ops.conv.sharing import tell_lone_readers
from credit_domain.partitioner.partition_report import PartitionReport
from credit_domain.partitioner.partitioning import partition_model, partition_report
from credit_mesh import DomainParallelManager

__all__ = [
    "ConversionReport",
    "ConvertedModule",
    "Converter",
    "ConverterKey",
    "conversion_report",
    "convert_to_domain_parallel",
    "validate_sharding_constraints",
]

logger = logging.getLogger(__name__)


class UntriedError(ValueError):
    """A model with code of its own could not be tried."""


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did; prints as a table.

    Attributes:
        modules: Each module once, in the order of ``model.named_modules()``; those inside a module that a custom
            converter replaced are left out. Empty where the model was partitioned.
        granularity: Rows in a block of the partition of the model's input: the model's total stride, times declared
            windows.
        program: What the model sends, if it was partitioned operation by operation.
        why: Why it was.
    """

    modules: tuple[ConvertedModule, ...]
    granularity: int = 1
    program: PartitionReport | None = None
    why: str = ""

    def of(self, fate: Fate) -> tuple[ConvertedModule, ...]:
        """The modules with this fate."""
        return tuple(module for module in self.modules if module.fate == fate)

    def __str__(self) -> str:
        if self.program is not None:
            return "\n".join(filter(None, ("partitioned operation by operation", self.why, str(self.program))))
        lines = [
            f"{len(self.of('converted'))} modules converted, {len(self.of('local'))} local, "
            f"{len(self.of('own code'))} with code of their own; rows come in blocks of {self.granularity}"
        ]
        for fate in ("converted", "own code"):
            for module in self.of(fate):
                lines.append(f"  {fate:9}  {module.name or '(model)'}: {module.kind}, {module.reason}")
        return "\n".join(lines)


def convert_to_domain_parallel(
    model: nn.Module,
    manager: Any,
    shard_dim: int = -2,
    custom_converters: Mapping[Any, Converter] | None = None,
    *,
    local: Iterable[Any] = (),
    input_shape: Any = None,
    window_sizes: Sequence[int] | None = None,
    known: bool = True,
    check: bool = True,
    method: Method = "auto",
) -> nn.Module:
    """Convert a model, in place, so that it works on sharded rows with the numbers of one rank.

    Layers of torch.nn that mix rows are wrapped (:mod:`credit_domain.layers`); those that do not are left alone; any
    that could and has no rule is refused before anything is changed. Modules of the known families
    (:mod:`credit_domain.adapters`) are converted as well. Parameters stay the same objects under the same names.

    What the ``forward`` of your own modules does with rows (``F.pad``, ``torch.roll``, a mean over rows) cannot be seen
    from outside. A model with such modules is therefore tried once (``credit_domain.verification.trial``): a copy
    with random weights runs whole and sharded on a few random rows, and the first module that gives other numbers is
    refused by name. The trial takes place here if the shape of the input is given, else at the first call of the model.
    It takes seconds. :func:`credit_domain.verification.verify_domain_parallel` is the full proof.

    If the shape of the input is given, a model that has such a module, or a module without a rule, is partitioned
    operation by operation instead (:func:`credit_domain.partitioner.partitioning.partition_model`). The log says why.

    Args:
        model: The model. Modules that are used in several places stay shared.
        manager: The domain-parallel manager. With a single domain rank nothing is converted.
        shard_dim: The sharded dim; -2 is latitude in (B, C, H, W) and (B, C, T, H, W).
        custom_converters: What to do with modules that no rule knows: a mapping from a type (subclasses too, unless
            they have an entry), a class path (``"package.module.Class"``) or a predicate on the module to a function
            that takes the module and returns its replacement (see ``Converter``). They come before all rules, and
            children of what they replace are skipped, but for those of an :class:`credit_domain.adapters.Adapter`.
            They also come before the known families.
        local: Modules that mix no rows though it may look so: types, class paths, qualified names or the modules. They
            and their children are left alone.
        input_shape: Global shape of the model's input, or its arguments (a tuple or a dict of shapes, tensors and other
            values): for the trial, for a model that is partitioned, and for models whose total stride cannot be seen
            otherwise; see :func:`credit_domain.model.granularity.granularity_of`. A granularity that the manager has
            already is kept: the boundaries become multiples of both.
        window_sizes: Rows in the windows of each level, for models that do not declare them.
        known: False leaves modules of the known families to the rules.
        check: False skips the trial. Code of your own that mixes rows then trains on wrong numbers without an error,
            unless you have verified the model yourself.
        method: ``"modules"`` converts modules alone, and refuses what their rules do not cover. ``"graph"``
            partitions the model operation by operation, and needs ``input_shape``. ``"auto"`` does the second where
            the first is refused, if ``input_shape`` is given, and neither ``custom_converters`` nor ``local``.

    Returns:
        The model; the replacement, where the model itself is a layer that is converted.

    Raises:
        ValueError: If modules are refused: all of them, by name, with what to do. If ``shard_dim`` is no spatial dim,
            or the declared partition does not fit the model's total stride. If the trial finds a module whose numbers
            differ, on all domain ranks alike. Where the model cannot be partitioned either, the message has both
            reasons. Nothing is changed then.

    Collectives:
        Those of the trial and of :func:`credit_domain.partitioner.partitioning.partition_model`, in which every domain
        rank takes part; none without them. The converted model carries its manager (``_domain_parallel_manager``) and a
        :class:`ConversionReport` (``_domain_parallel_report``), which is logged at INFO.
    """
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {', '.join(get_args(Method))}; got {method!r}")
    if manager is None or not isinstance(getattr(manager, "domain_parallel_size", None), int):
        raise ValueError(f"manager must have a domain_parallel_size, as a DomainParallelManager has; got {manager!r}")
    if getattr(model, "_domain_parallel_report", None) is not None:
        logger.info("the model is converted already")
        return model
    if method == "graph" and (input_shape is None or custom_converters):
        raise ValueError('method="graph" needs input_shape=, and takes no custom_converters')
    shard_dim = spatial_only(shard_dim)
    if manager.domain_parallel_size == 1:
        return _finish(model, manager, ConversionReport(()))
    if method == "graph":
        return _by_operations(model, manager, shard_dim, input_shape, "")
    local = list(local)
    given = custom_converters, local, known, input_shape, window_sizes, check
    if method == "modules" or input_shape is None or custom_converters or local or not _can_agree(manager):
        return _by_modules(model, manager, shard_dim, *given)
    try:
        return _by_modules(model, manager, shard_dim, *given, sure=True)
    except ValueError as error:
        reason = error
    try:
        return _by_operations(model, manager, shard_dim, input_shape, str(reason))
    except ValueError as error:
        if isinstance(reason, UntriedError):
            logger.info("%s: %s", type(model).__name__, error)
            return _by_modules(model, manager, shard_dim, *given)
        raise ValueError(f"{reason}\nIt cannot be partitioned operation by operation either: {error}") from reason


def _by_modules(
    model: nn.Module,
    manager: Any,
    shard_dim: int,
    custom_converters: Mapping[Any, Converter] | None,
    local: Iterable[Any],
    known: bool,
    input_shape: Any,
    window_sizes: Sequence[int] | None,
    check: bool,
    sure: bool = False,
) -> nn.Module:
    """Convert modules; if ``sure``, a model that ought to be tried and cannot be is refused."""
    fates = fates_of(model, shard_dim, custom_converters, local, known)
    fates.raise_refused()
    granularity = granularity_of(model, shard_dim, input_shape=input_shape, window_sizes=window_sizes, free=fates.free)
    made = {key: make(fates.names[key]) for key, make in fates.replace.items()}  # any of which may still refuse
    before = getattr(manager, "granularity", 1)
    if hasattr(manager, "granularity"):
        granularity = _set_granularity(manager, granularity)
    report = ConversionReport(tuple(fates.lines), granularity)
    needed = check and isinstance(manager, DomainParallelManager) and _has_own_code(model, report)
    trial = _trial_of(model, manager, shard_dim, report) if needed else None
    if needed and trial is None and sure:
        raise UntriedError("the model cannot be copied, and so not be tried")
    originals = {id(made[id(module)]): module for module in model.modules() if id(module) in made}
    model = _apply(model, made)
    _settle(model, manager)
    tell_lone_readers(model)
    if trial is not None:
        try:
            if not trial.begin(model, input_shape) and sure:
                raise UntriedError("the model could not be tried")
        except BaseException:
            _apply(model, originals)
            manager.granularity = before
            raise
    return _finish(model, manager, report)


def _by_operations(model: nn.Module, manager: Any, shard_dim: int, input_shape: Any, why: str) -> nn.Module:
    """Partition the model; ``why`` its modules could not be converted."""
    partition_model(model, input_shape, manager, shard_dim=shard_dim)
    program = partition_report(model)
    return _finish(model, manager, ConversionReport((), manager.granularity, program, why))


def _can_agree(manager: Any) -> bool:
    """Whether there are ranks that answer."""
    return isinstance(manager, DomainParallelManager) and dist.get_backend(manager.domain_group) != "fake"


def _has_own_code(model: nn.Module, report: ConversionReport) -> bool:
    """Whether the forward of a module may do with rows what no rule sees."""
    patched = any("forward" in vars(part) for part in model.modules())
    reshaped = any(line.reason == "reshapes" for line in report.modules)  # rows may be anywhere then
    return bool(report.of("own code")) or patched or reshaped


def _trial_of(model: nn.Module, manager: Any, shard_dim: int, report: ConversionReport) -> Any:
    """The trial of a model; None if no rank answers, or the model cannot be copied."""
    from credit_domain.verification.trial import Trial  # which converts models itself

    return Trial.of(model, manager, shard_dim, {line.name: line.reason for line in report.modules})


def _apply(model: nn.Module, made: Mapping[int, nn.Module]) -> nn.Module:
    """Put every replacement wherever the module that it replaces stands."""
    for module in list(model.modules()):
        for name, child in list(children_of(module).items()):
            if child is not None and id(child) in made:
                _replace_module(module, name, child, made[id(child)])
    return made.get(id(model), model)


def _replace_module(parent: nn.Module, name: str, old_module: nn.Module, new_module: nn.Module) -> None:
    """Put a module in the place of a child of that name."""
    if children_of(parent).get(name) is not old_module:
        raise ValueError(f"{type(parent).__name__} has no child {name!r} that is the module to be replaced")
    children_of(parent)[name] = new_module


def _settle(model: nn.Module, manager: Any) -> None:
    """Tell what custom converters made whose manager is theirs, and what they are called."""
    for name, module in model.named_modules():
        if is_converted(module):
            if module.manager is None and isinstance(manager, DomainParallelManager):
                module.__dict__["manager"] = manager
            if module.label == type(module).__name__ and name:
                module.__dict__["label"] = name


def _set_granularity(manager: Any, granularity: int) -> int:
    """Make boundaries multiples of what this model needs and of what was asked for before, as for another model."""
    both = math.lcm(granularity, manager.granularity)
    try:
        manager.granularity = both
    except ValueError as error:
        raise ValueError(f"the model needs rows in blocks of {both}: {error}") from None
    return both


def _finish(model: nn.Module, manager: Any, report: ConversionReport) -> nn.Module:
    model.__dict__["_domain_parallel_manager"] = manager
    model.__dict__["_domain_parallel_report"] = report
    model.register_load_state_dict_pre_hook(rename_loaded)  # type: ignore[no-untyped-call, unused-ignore]
    logger.info("%s", report)
    return model


def conversion_report(model: nn.Module) -> ConversionReport:
    """What the conversion of a model did.

    Raises:
        ValueError: If the model is not converted.
    """
    report = getattr(model, "_domain_parallel_report", None)
    if not isinstance(report, ConversionReport):
        raise ValueError(f"{type(model).__name__} is not converted: call convert_to_domain_parallel first")
    return report


# The names that programs know it by.
_needs_halo_conv2d = _needs_halo_conv3d = _needs_halo_conv_transpose2d = _needs_halo_conv_transpose3d = needs_halo


def validate_sharding_constraints(
    model: nn.Module, local_h: int, window_sizes: Sequence[int] | None = None
) -> list[str]:
    """Check that the rows of a rank fit the model's windows at each level, after its strides.

    The converted layers take any number of rows. Code of your own that cuts a rank's rows into windows does not.

    Args:
        model: The model to validate against.
        local_h: Rows of each rank.
        window_sizes: Rows in the windows of each level; None takes what the model's modules declare.

    Returns:
        What does not fit, in words; empty if everything does.

    Raises:
        ValueError: If ``local_h`` is not positive.
    """
    if local_h < 1:
        raise ValueError(f"local_h must be at least 1; got {local_h}")
    warnings: list[str] = []
    strides: set[int] = set()
    for level in window_sizes_of(model, window_sizes):
        rows, left = divmod(local_h, level.stride)
        if left and level.stride in strides:
            continue  # said already
        strides.add(level.stride)
        if left:
            warnings.append(f"{level.where}: {local_h} rows are no multiple of the total stride {level.stride}")
        elif level.window and rows % level.window:
            warnings.append(
                f"{level.where}: {local_h} rows are {rows} after a total stride of {level.stride}, no multiple of the "
                f"window of {level.window} rows"
            )
    return warnings
