"""Running a model whole and sharded, and comparing all that comes out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from credit_domain.casts import cast_module, cast_tensor
from credit_domain.convert import Converter, convert_to_domain_parallel, free_windows, refusals
from credit_domain.model.granularity import granularity_of
from credit_domain.model.trace import is_shape, plain_copy
from credit_domain.sharding import shard_tensor
from credit_domain.verification.compare import compare, compare_whole, sharded_dim
from credit_domain.verification.events import Events, Run, unlike_shapes
from credit_domain.verification.record import FIXED_NOISE, Recorder, tensors_in, without_dropout
from credit_domain.verification.report import Difference, VerificationReport
from credit_halo.testing import RankError, run_threads
from credit_mesh import DomainParallelManager, RowPartition, initialize_domain_parallel

_ROUNDING = 1e-2
"""Errors up to this may be those of half or single precision."""


def verify_domain_parallel(
    model: nn.Module | Callable[[], nn.Module],
    inputs: Any,
    ranks: int = 3,
    *,
    shard_dim: int = -2,
    custom_converters: Mapping[Any, Converter] | None = None,
    local: Iterable[Any] = (),
    convert: Callable[[nn.Module, DomainParallelManager], nn.Module] | None = None,
    partition: RowPartition | None = None,
    tolerance: float = 1e-9,
    seed: int = 0,
    timeout: float = 300.0,
) -> VerificationReport:
    """Prove that a model gives the numbers of one rank when its rows are sharded, or say where it does not.

    Runs the model whole, converts a copy of it for each rank, runs these on threads of this process, each on its rows,
    and compares outputs, input gradients and every parameter gradient, in float64 (complex128), with a random weighting
    of the outputs as loss. Needs no launcher, no GPU and no process group; the model that is passed is not touched. Use
    a small input: rows that exceed a few windows or total strides for each rank show all that large ones would.

    .. code-block:: python

        report = verify_domain_parallel(MyUNet(), (1, 8, 41, 64), ranks=3)
        print(report)

    Args:
        model: The plain model, or a function that makes it.
        inputs: Shape of its input; or a tuple of arguments or a dict of keyword arguments, each a shape (filled with
            random numbers), a tensor, or anything else that ``forward`` takes. Floating-point and complex tensors of
            three or more dims that have as many rows as the first one are sharded.
        ranks: Number of domain ranks; with fewer than 3 no rank has two neighbours.
        shard_dim: The sharded dim.
        custom_converters: As for :func:`credit_domain.convert.convert_to_domain_parallel`, like ``local``.
        local: See ``custom_converters``.
        convert: Converts the model in place of :func:`credit_domain.convert.convert_to_domain_parallel`.
        partition: How to divide the rows; None takes what ``manager.declare`` would.
        tolerance: The largest error, relative to the largest value of what is compared, that counts as rounding.
        seed: Of the random inputs and of the loss.
        timeout: Seconds after which ranks that wait for each other give up.

    Returns:
        A report that prints as a short table, is true if everything agrees, and otherwise names the first module whose
        result differs.

    Raises:
        ValueError: If the inputs have no rows to shard, the conversion refuses modules, or torch.distributed is
            initialised (verify before that: the ranks run as threads of this process).

    Dropout is set to 0 and whatever is drawn at random is a constant, in both runs; the report says so.
    """
    if dist.is_initialized():
        raise ValueError("verify_domain_parallel starts ranks of its own: call it before init_process_group")
    plain = model if isinstance(model, nn.Module) else model()
    plain = cast_module(plain_copy(plain), torch.float64)
    notes = [f"dropout of {', '.join(names)} set to 0"] if (names := without_dropout(plain)) else []
    arguments = _arguments(inputs, seed)
    rows = _rows_of(arguments, shard_dim)
    local = list(local)
    if convert is None and (refused := refusals(plain, shard_dim, custom_converters, local)):
        raise ValueError(refused)
    granularity = _granularity(plain, arguments, shard_dim, free_windows(plain, custom_converters, shard_dim))

    def converted(manager: DomainParallelManager) -> nn.Module:
        twin = plain_copy(plain)
        if convert is not None:
            return convert(twin, manager)
        return convert_to_domain_parallel(twin, manager, shard_dim, custom_converters, local=local, check=False)

    whole = Run()
    reference = plain_copy(plain)
    _forward(reference, _leaves(arguments), whole)
    assert whole.recorder is not None
    for kind, count in sorted(whole.recorder.noise.items()):
        notes.append(
            f"{kind} held fixed ({count} calls)" if kind == "dropout" else f"{kind} gives {FIXED_NOISE} ({count} calls)"
        )
    for dtype, where in whole.recorder.narrow.items():
        notes.append(f"{where} computes in {dtype}, whose rounding may exceed the tolerance")
    factors = _factors(whole.outputs, seed)
    _backward(reference, whole, factors)

    runs = [Run() for _ in range(ranks)]
    shapes: dict[int, dict[str, tuple[int, ...]]] = {}
    divided: list[RowPartition] = []

    def rank_main(rank: int) -> None:
        manager = initialize_domain_parallel(ranks, ranks, shard_dim)
        twin = converted(manager)
        if granularity is not None:
            manager.granularity = granularity
        own = manager.declare(rows if partition is None else partition)
        if rank == 0:
            divided.append(own)
        mine = {
            path: shard_tensor(value, shard_dim, manager) if _has_rows(value, rows, shard_dim) else value
            for path, value in arguments.items()
        }
        run = runs[rank]
        _forward(twin, _leaves(mine), run)
        shapes[rank] = {path: tuple(out.shape) for path, out in run.outputs.items()}
        dist.barrier()
        try:
            own_factors = _own_factors(factors, shapes, rank, ranks, shard_dim)
        except LookupError:
            return  # compared, and reported, below; on all ranks alike
        _backward(twin, run, own_factors)

    error: RankError | None = None
    try:
        run_threads(rank_main, ranks, timeout=timeout)
    except RankError as failure:
        error = failure
        unfit = next((e for e in failure.errors.values() if isinstance(e, ValueError)), None)
        if unfit is not None and all(run.recorder is None for run in runs):
            raise ValueError(str(unfit)) from failure  # the conversion refused, or the rows do not divide
    return _report(whole, runs, error, divided[0] if divided else partition, shard_dim, tolerance, notes, rows)


# The two runs


def _arguments(inputs: Any, seed: int) -> dict[str, Any]:
    """Arguments by name, or by position as text; shapes become random numbers."""
    generator = torch.Generator().manual_seed(seed)

    def value(given: Any) -> Any:
        if isinstance(given, Tensor):
            return cast_tensor(given.detach(), torch.float64)
        return torch.randn(tuple(given), dtype=torch.float64, generator=generator) if is_shape(given) else given

    if isinstance(inputs, Mapping):
        return {name: value(given) for name, given in inputs.items()}
    listed = (inputs,) if isinstance(inputs, Tensor) or is_shape(inputs) else tuple(inputs)
    return {str(i): value(given) for i, given in enumerate(listed)}


def _granularity(model: nn.Module, arguments: Mapping[str, Any], shard_dim: int, free: Collection[str]) -> int | None:
    """The model's total stride at these inputs; None where it cannot be run for its shapes."""
    positional = [value for name, value in arguments.items() if name.isdigit()]
    try:
        return granularity_of(model, shard_dim, input_shape=tuple(positional) if positional else arguments, free=free)
    except ValueError:
        return None


def _rows_of(arguments: Mapping[str, Any], shard_dim: int) -> int:
    for value in arguments.values():
        if isinstance(value, Tensor) and value.ndim >= 3 and _is_number(value):
            return int(value.shape[shard_dim])
    raise ValueError("no input has rows to shard: expected a floating-point or complex tensor of three or more dims")


def _is_number(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def _has_rows(value: Any, rows: int, shard_dim: int) -> bool:
    if not isinstance(value, Tensor) or value.ndim < 3 or not _is_number(value):
        return False
    return value.shape[shard_dim] == rows


def _leaves(arguments: Mapping[str, Any]) -> dict[str, Any]:
    def leaf(value: Any) -> Any:
        if isinstance(value, Tensor) and _is_number(value):
            return value.detach().clone().requires_grad_()
        return value

    return {name: leaf(value) for name, value in arguments.items()}


def _forward(model: nn.Module, arguments: dict[str, Any], run: Run) -> None:
    run.recorder = Recorder(model)
    run.inputs = {name: value for name, value in arguments.items() if isinstance(value, Tensor) and value.requires_grad}
    positional = [value for name, value in arguments.items() if name.isdigit()]
    named = {name: value for name, value in arguments.items() if not name.isdigit()}
    try:
        with run.recorder.recording():
            out = model(*positional, **named)
    except Exception:
        run.failed_in = run.recorder.stack[-1] if run.recorder.stack else ""
        raise
    found = {path or "output": value for path, value in tensors_in(out)}
    run.outputs = {path: value for path, value in found.items() if _is_number(value)}


def _factors(outputs: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed + 1)
    return {path: torch.randn(out.shape, dtype=out.dtype, generator=generator) for path, out in outputs.items()}


def _own_factors(
    factors: Mapping[str, Tensor], shapes: Mapping[int, dict[str, tuple[int, ...]]], rank: int, ranks: int, dim: int
) -> dict[str, Tensor]:
    """This rank's part of the loss; of an output that all ranks hold, its share."""
    mine = {}
    for path, factor in factors.items():
        parts = [shapes[r].get(path, ()) for r in range(ranks)]
        along = sharded_dim(factor.shape, parts, dim)
        if along is None:
            mine[path] = factor / ranks
        else:
            start = sum(part[along] for part in parts[:rank])
            mine[path] = factor.narrow(along, start, parts[rank][along])
    return mine


def _backward(model: nn.Module, run: Run, factors: Mapping[str, Tensor]) -> None:
    terms = [(out * factors[path]).sum() for path, out in run.outputs.items() if out.requires_grad]
    if terms:
        total = sum(terms[1:], terms[0])
        (total.real if total.is_complex() else total).backward()  # type: ignore[no-untyped-call]
    run.parameters = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


# What they say


def _report(
    whole: Run,
    runs: list[Run],
    error: RankError | None,
    partition: RowPartition | None,
    shard_dim: int,
    tolerance: float,
    notes: list[str],
    rows: int,
) -> VerificationReport:
    def report(difference: Difference | None, **errors: dict[str, float]) -> VerificationReport:
        narrow = {} if whole.recorder is None else whole.recorder.narrow
        if difference is not None and narrow and difference.error <= _ROUNDING:
            where = ", ".join(f"{name} in {dtype}" for dtype, name in narrow.items())
            advice = f"this may be rounding, since not all is computed in double precision ({where}): do so to find out"
            difference = replace(difference, advice=advice)
        found = {kind: errors.get(kind, {}) for kind in ("outputs", "input_gradients", "parameter_gradients")}
        return VerificationReport(
            ok=difference is None,
            ranks=len(runs),
            partition=partition,
            **found,
            tolerance=tolerance,
            difference=difference,
            notes=tuple(notes),
        )

    comparison = Events(whole, runs, shard_dim, tolerance)
    if error is not None:
        return report(comparison.first_difference() or _failure(whole, runs, error, comparison))
    outputs = {}
    for path, out in whole.outputs.items():
        parts = [run.outputs.get(path) for run in runs]
        try:
            outputs[path] = compare(
                out.detach(), [p.detach() for p in parts if p is not None], shard_dim, tolerance
            ).error
        except LookupError:
            outputs[path] = float("nan")
    if any(not value <= tolerance for value in outputs.values()):
        return report(comparison.first_difference() or unlike_shapes(whole, runs), outputs=outputs)

    inputs = {}
    for name, value in whole.inputs.items():
        if value.grad is None:
            continue
        grads = [run.inputs[name].grad for run in runs]
        found = [torch.zeros_like(run.inputs[name]) if g is None else g for run, g in zip(runs, grads, strict=True)]
        if _has_rows(value, rows, shard_dim):
            inputs[name] = compare(value.grad, found, shard_dim, tolerance).error
        else:  # all ranks hold it, and each has its share of the gradient
            inputs[name] = compare_whole(value.grad, torch.stack(found).sum(0))
    parameters = {}
    largest = max((float(g.abs().max()) for g in whole.parameters.values() if g is not None and g.numel()), default=0.0)
    for name, grad in whole.parameters.items():
        shares = [share for run in runs if (share := run.parameters.get(name)) is not None]
        if grad is not None or shares:
            expected = torch.zeros_like(shares[0]) if grad is None else grad
            parameters[name] = compare_whole(expected, sum(shares, torch.zeros_like(expected)), 1e-4 * largest)
    wrong = any(not value <= tolerance for value in (*inputs.values(), *parameters.values()))
    difference = comparison.first_backward_difference(parameters) if wrong else None
    return report(difference, outputs=outputs, input_gradients=inputs, parameter_gradients=parameters)


def _failure(whole: Run, runs: list[Run], error: RankError, events: Events) -> Difference:
    """Which module raised, on the rank that raised for a reason of its own."""
    own = {rank: e for rank, e in error.errors.items() if not _only_told(e)} or dict(error.errors)
    rank, raised = next(iter(sorted(own.items())), (0, error))
    name = runs[rank].failed_in
    return Difference(
        "failed",
        name,
        events.kind_of(name),
        f"raised on rank {rank}: {type(raised).__name__}: {raised}",
        advice="up to there all ranks agree with the whole: what its forward expects of shapes holds for the whole "
        "only, or rows of one height lie on different ranks (see granularity)",
    )


def _only_told(error: BaseException) -> bool:
    """Whether a rank failed because another one did."""
    text = str(error)
    return isinstance(error, SystemExit) or ("failed" in text and "rank" in text) or "timed out" in text
