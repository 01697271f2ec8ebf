"""Running a model whole and sharded, and comparing all that comes out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from credit_domain._torch_private import fake_mode
from credit_domain.casts import cast_module, cast_tensor
from credit_domain.containers import mapped, tensors_in
from credit_domain.convert import Converter, convert_to_domain_parallel
from credit_domain.model.fates import Method, fates_of
from credit_domain.model.granularity import granularity_of
from credit_domain.model.trace import arguments_of, is_shape, plain_copy, rows_of
from credit_domain.partitioner.partitioning import partition_model
from credit_domain.sharding import shard_tensor
from credit_domain.verification.compare import (
    compare,
    compare_whole,
    has_rows,
    is_number,
    own_factors,
    unlike_buffers,
)
from credit_domain.verification.events import Events, unlike_shapes
from credit_domain.verification.record import FIXED_NOISE, without_dropout
from credit_domain.verification.report import Difference, VerificationReport
from credit_domain.verification.running import Run
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
    method: Method = "auto",
    partition: RowPartition | None = None,
    tolerance: float = 1e-9,
    seed: int = 0,
    timeout: float = 300.0,
) -> VerificationReport:
    """Prove that a model gives the numbers of one rank when its rows are sharded, or say where it does not.

    Runs the model whole, converts a copy of it for each rank, runs these on threads of this process, each on its rows,
    and compares outputs, input gradients and every parameter gradient, in float64 (complex128), with a random weighting
    of the outputs as loss. The model that is passed is not touched. Use a small input: rows that exceed a few windows
    or total strides for each rank show all that large ones would.

    It needs no launcher and no GPU. It also runs in a notebook, for a model that is defined there, and in a program
    that has initialised torch.distributed; no other process is asked.

    .. code-block:: python

        report = verify_domain_parallel(MyUNet(), (1, 8, 41, 64), ranks=3)
        print(report)

    Args:
        model: The plain model, or a function that makes it.
        inputs: Shape of its input; or a tuple of arguments or a dict of keyword arguments, each a shape (filled with
            random numbers), a tensor, or anything else that ``forward`` takes. Floating-point and complex tensors of
            three or more dims that have as many rows as the first one are sharded, in containers too.
        ranks: Number of domain ranks; with fewer than 3 no rank has two neighbours.
        shard_dim: The sharded dim.
        custom_converters: As for :func:`credit_domain.convert.convert_to_domain_parallel`, like ``local``.
        local: See ``custom_converters``.
        convert: Converts the model in place of :func:`credit_domain.convert.convert_to_domain_parallel`.
        method: As for :func:`credit_domain.convert.convert_to_domain_parallel`. With ``"auto"``, a model whose modules
            cannot be converted exactly is verified as it is partitioned operation by operation; a note says so.
        partition: How to divide the rows; None takes what ``manager.declare`` would.
        tolerance: The largest error, relative to the largest value of what is compared, that counts as rounding.
        seed: Of the random inputs and of the loss.
        timeout: Seconds after which ranks that wait for each other give up.

    Returns:
        A report that prints as a short table, is true if everything agrees, and otherwise names the first module whose
        result differs.

    Raises:
        ValueError: If the inputs have no rows to shard, or the conversion refuses modules.

    Dropout is set to 0 and whatever is drawn at random is a constant, in both runs; the report says so.
    """
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {', '.join(get_args(Method))}; got {method!r}")
    plain = cast_module(plain_copy(model if isinstance(model, nn.Module) else model()), torch.float64)
    trial = _Verification(plain, inputs, ranks, shard_dim, partition, tolerance, seed, timeout)
    if convert is not None:
        return trial.of(convert)
    local, report, reason = list(local), None, ""
    method = "modules" if method == "auto" and (custom_converters or local) else method
    if method != "graph":
        fates = fates_of(plain, shard_dim, custom_converters, local)
        if method == "modules":
            fates.raise_refused()
        granularity = None  # where the model cannot be run for its shapes
        with suppress(ValueError):
            granularity = granularity_of(plain, shard_dim, input_shape=trial.args or trial.kwargs, free=fates.free)

        def by_modules(twin: nn.Module, manager: DomainParallelManager) -> nn.Module:
            made = convert_to_domain_parallel(twin, manager, shard_dim, custom_converters, local=local, check=False)
            if granularity is not None:
                manager.granularity = granularity
            return made

        try:
            fates.raise_refused()
            report = trial.of(by_modules)
        except ValueError as error:
            if method == "modules":
                raise
            reason = str(error)
        else:
            if report.ok or method == "modules":
                return report
            reason = str(report.difference).splitlines()[0]

    def by_operations(twin: nn.Module, manager: DomainParallelManager) -> nn.Module:
        return partition_model(twin, trial.args or trial.kwargs, manager, shard_dim=shard_dim)

    fake_mode()  # entered first by this thread, since those of the ranks end
    try:
        found = trial.of(by_operations)
    except ValueError as error:
        also = f"it cannot be partitioned operation by operation either: {error}"
        if report is None:
            raise ValueError("\n".join(filter(None, (reason, also)))) from error
        return replace(report, notes=(*report.notes, also))
    why = f"; by its modules: {' '.join(reason.split())}" if reason else ""
    note = f"partitioned operation by operation, as by convert_to_domain_parallel with input_shape{why}"
    return replace(found, notes=(note, *found.notes))


class _Verification:
    """A plain model and its inputs, against which converted ones are compared."""

    def __init__(
        self,
        plain: nn.Module,
        inputs: Any,
        ranks: int,
        shard_dim: int,
        partition: RowPartition | None,
        tolerance: float,
        seed: int,
        timeout: float,
    ) -> None:
        self.plain, self.ranks, self.shard_dim = plain, ranks, shard_dim
        self.partition, self.tolerance, self.timeout = partition, tolerance, timeout
        self.notes = [f"dropout of {', '.join(names)} set to 0"] if (names := without_dropout(plain)) else []
        self.args, self.kwargs = _arguments(inputs, seed)
        numbers = [x for _, x in tensors_in((self.args, self.kwargs)) if is_number(x)]
        self.rows = rows_of(numbers, shard_dim)
        if not self.rows:
            raise ValueError(
                "no input has rows to shard: expected a floating-point or complex tensor of three or more dims"
            )
        self.whole = Run(plain_copy(plain), self.args, self.kwargs)
        self.seed = seed

    def _run_whole(self) -> dict[str, Tensor]:
        """Run the plain model, once; the weights of its outputs in the loss."""
        whole, factors = self.whole, self.__dict__.get("_factors")
        if factors is None:
            whole.forward()
            for kind, count in sorted(whole.recorder.noise.items()):
                held = "held fixed" if kind == "dropout" else f"gives {FIXED_NOISE}"
                self.notes.append(f"{kind} {held} ({count} calls)")
            for dtype, where in whole.recorder.narrow.items():
                self.notes.append(f"{where} computes in {dtype}, whose rounding may exceed the tolerance")
            factors = self._factors = whole.factors(self.seed + 1)
            whole.backward(factors)
        return factors

    def of(self, convert: Callable[[nn.Module, DomainParallelManager], nn.Module]) -> VerificationReport:
        """Compare with what a conversion makes of a copy of the model.

        Raises:
            ValueError: If the conversion refuses it, or the rows do not divide.
        """
        factors, whole, ranks, shard_dim, rows = self._run_whole(), self.whole, self.ranks, self.shard_dim, self.rows
        runs: dict[int, Run] = {}
        divided: list[RowPartition] = []

        def rank_main(rank: int) -> None:
            manager = initialize_domain_parallel(ranks, ranks, shard_dim)
            twin = convert(plain_copy(self.plain), manager)
            own = manager.declare(rows if self.partition is None else self.partition)
            if rank == 0:
                divided.append(own)

            def mine(_: str, x: Tensor) -> Tensor:
                return shard_tensor(x, shard_dim, manager) if _sharded(x, rows, shard_dim) else x

            run = runs[rank] = Run(twin, *mapped((self.args, self.kwargs), mine))
            run.forward()
            dist.barrier()
            try:
                own_part = own_factors(factors, [runs[r].shapes for r in range(ranks)], rank, shard_dim)
            except LookupError:
                return  # compared, and reported, below; on all ranks alike
            run.backward(own_part)

        error: RankError | None = None
        try:
            run_threads(rank_main, ranks, timeout=self.timeout)
        except RankError as failure:
            error = failure
            unfit = next((e for e in failure.errors.values() if isinstance(e, ValueError)), None)
            if unfit is not None and not runs:
                raise ValueError(str(unfit)) from failure  # the conversion refused, or the rows do not divide
        errors: dict[str, dict[str, float]] = {"outputs": {}, "input_gradients": {}, "parameter_gradients": {}}
        recorders = [run.recorder for _, run in sorted(runs.items())]
        events = Events(whole.recorder, recorders, shard_dim, self.tolerance)
        difference: Difference | None
        if error is not None:
            difference = events.first_difference() or _failure(runs, error, events)
        else:
            listed = [runs[rank] for rank in range(ranks)]
            difference = _compared(whole, listed, events, errors, rows)
        narrow = whole.recorder.narrow
        if difference is not None and narrow and difference.error <= _ROUNDING:
            where = ", ".join(f"{name} in {dtype}" for dtype, name in narrow.items())
            advice = f"this may be rounding, since not all is computed in double precision ({where}): do so to find out"
            difference = replace(difference, advice=advice)
        divided_as, notes = divided[0] if divided else self.partition, tuple(self.notes)
        return VerificationReport(
            difference is None,
            ranks,
            divided_as,
            **errors,
            tolerance=self.tolerance,
            difference=difference,
            notes=notes,
        )


def _arguments(inputs: Any, seed: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments in double precision; shapes become random numbers."""
    generator = torch.Generator().manual_seed(seed)

    def made(given: Any) -> Any:
        if not isinstance(given, Tensor) and is_shape(given):
            return torch.randn(tuple(given), dtype=torch.float64, generator=generator)
        return mapped(given, lambda _, x: cast_tensor(x.detach(), torch.float64))

    return arguments_of(inputs, made)


def _sharded(x: Tensor, rows: int, shard_dim: int) -> bool:
    return is_number(x) and has_rows(x, rows, shard_dim)


def _compared(
    whole: Run, runs: Sequence[Run], events: Events, errors: dict[str, dict[str, float]], rows: int
) -> Difference | None:
    """Fill in the errors, and find the first difference: of the outputs, or else of the gradients."""
    outputs, inputs, parameters = errors.values()
    shard_dim, tolerance = events.shard_dim, events.tolerance
    for path, out in whole.outputs.items():
        parts = [run.outputs[path].detach() for run in runs if path in run.outputs]
        try:
            outputs[path] = compare(out.detach(), parts, shard_dim, tolerance).error
        except LookupError:
            outputs[path] = float("nan")
    if any(not value <= tolerance for value in outputs.values()):
        return events.first_difference() or unlike_shapes(whole.outputs, [run.outputs for run in runs])

    buffers = sorted({name for run in runs for name in unlike_buffers(whole.model, run.model, tolerance)})
    if buffers:
        owner, _, name = buffers[0].rpartition(".")
        what = f"its buffer {name} has other values after a forward"
        return Difference("forward", owner, events.kind_of(owner), what)
    for name, value in whole.inputs.items():
        if value.grad is None:
            continue
        found = [run.input_gradient(name) for run in runs]
        if _sharded(value, rows, shard_dim):
            inputs[name] = compare(value.grad, found, shard_dim, tolerance).error
        else:  # all ranks hold it, and each has its share of the gradient
            inputs[name] = compare_whole(value.grad, torch.stack(found).sum(0))
    largest = max((float(grad.abs().max()) for grad in whole.gradients.values() if grad.numel()), default=0.0)
    for name, parameter in whole.model.named_parameters():
        zeros = torch.zeros_like(parameter)
        shares = [run.gradients[name] for run in runs if name in run.gradients]
        if name in whole.gradients or shares:
            expected = whole.gradients.get(name, zeros)
            parameters[name] = compare_whole(expected, sum(shares, zeros), 1e-4 * largest)
    wrong = any(not value <= tolerance for value in (*inputs.values(), *parameters.values()))
    return events.first_backward_difference(parameters) if wrong else None


def _failure(runs: Mapping[int, Run], error: RankError, events: Events) -> Difference:
    """Which module raised, on the rank that raised for a reason of its own."""
    own = {rank: e for rank, e in error.errors.items() if not _only_told(e)} or dict(error.errors)
    rank, raised = next(iter(sorted(own.items())), (0, error))
    name = runs[rank].failed_in if rank in runs else ""
    what = f"raised on rank {rank}: {type(raised).__name__}: {raised}"
    advice = (
        "up to there all ranks agree with the whole: what its forward expects of shapes holds for the whole only, or "
        "rows of one height lie on different ranks (see granularity)"
    )
    return Difference("failed", name, events.kind_of(name), what, advice=advice)


def _only_told(error: BaseException) -> bool:
    """Whether a rank failed because another one did."""
    text = str(error)
    return (
        isinstance(error, SystemExit)
        or ("rank" in text and ("failed" in text or "ended" in text))
        or "timed out" in text
    )
