"""Trying a converted model once, on the ranks that will train it: small, with random weights, before the first step.

A converter sees modules, and not what the ``forward`` of a module does with rows. So a copy of the model runs whole on
every rank, and sharded over them, on a few random rows. Outputs, the gradients of the inputs and of every parameter
must agree. The copy has random weights, so that what a fresh model multiplies by zero shows as well.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import logging
import math
import operator
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import Any
from weakref import WeakValueDictionary, ref

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from credit_domain.engine.ranks import constant
from credit_domain.model.trace import FIRST_CALL, is_shape
from credit_domain.verification.compare import sharded_dim
from credit_domain.verification.events import Events, Run, unlike_shapes
from credit_domain.verification.ghost import Ghost, Switches, switches_of
from credit_domain.verification.record import Recorder, tensors_in
from credit_domain.verification.report import Difference
from credit_halo import ExchangeError
from credit_mesh import DomainParallelManager, RowPartition
from credit_mesh.extend import set_aside

logger = logging.getLogger(__name__)

_ROWS_PER_RANK = 16  # a few strides and windows, so that each rank has neighbours and an interior
_COLUMNS = 64
_LARGEST = 2**24  # values in the inputs of a trial at full size
_LARGEST_IN_FLOAT64 = 2**28  # values in the weights, 2 GiB then
_TOLERANCES = {torch.float64: 1e-7, torch.float32: 1e-3}


@dataclass(frozen=True)
class _Rows:
    """An argument with rows: random numbers of this shape take its place."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class _Try:
    """One way to run the trial.

    Attributes:
        rows: Rows of the whole.
        columns: Size of the dim beside the sharded one; None leaves it.
        dtype: Of the weights and inputs.
    """

    rows: int
    columns: int | None
    dtype: torch.dtype


class Trial:
    """The trial of one model; made before the model is converted, and begun afterwards.

    Args:
        plain: The model before it was converted.
        manager: The domain-parallel manager of the ranks.
        shard_dim: The sharded dim, negative.
        reasons: Why each module was converted, or was not, by name.
    """

    def __init__(
        self, plain: Ghost, manager: DomainParallelManager, shard_dim: int, reasons: Mapping[str, str]
    ) -> None:
        self._plain, self._manager, self._shard_dim, self._reasons = plain, manager, shard_dim, reasons
        self._sharded: Ghost | None = None
        self._switches: Switches = {}
        self._other = -1 if shard_dim != -1 else -2
        self.kind = type(plain.model).__name__

    @classmethod
    def of(
        cls, model: nn.Module, manager: DomainParallelManager, shard_dim: int, reasons: Mapping[str, str]
    ) -> Trial | None:
        """The trial of a model that is not converted yet; None, with a warning in the log, where it cannot be made."""
        if dist.get_backend(manager.domain_group) == "fake":
            return None  # no message arrives
        try:
            return cls(Ghost.of(model), manager, shard_dim, reasons)
        except (TypeError, RuntimeError, ValueError, AttributeError) as error:
            _warn(type(model).__name__, f"it cannot be copied ({type(error).__name__}: {_line(error)})")
            return None

    def begin(self, converted: nn.Module, inputs: Any = None) -> None:
        """Try the model now if its inputs are known, else at its first call.

        Args:
            converted: The converted model.
            inputs: Global shape of its input, or its arguments.

        Raises:
            ValueError: On all domain ranks alike, if a module gives other numbers; it is named.

        Collectives:
            Those of the converted model, and small gathers.
        """
        self._sharded = Ghost.of(converted, like=self._plain)
        self._switches = switches_of(converted)
        if inputs is None:
            _FirstCall(self, converted)
            return
        device = torch.device("cpu")
        with device:
            given = self._given(inputs)
        if problem := self._attempt(converted, given, device):
            _warn(self.kind, problem)

    # Inputs

    def _given(self, inputs: Any) -> tuple[Any, Any, int]:
        """Arguments in place of shapes, with what has rows marked; and the number of rows."""
        kwargs = dict(inputs) if isinstance(inputs, Mapping) else {}
        args: tuple[Any, ...] = ()
        if not kwargs:
            args = (inputs,) if isinstance(inputs, Tensor) or is_shape(inputs) else tuple(inputs)
        shapes = [tuple(v.shape) if isinstance(v, Tensor) else v for v in (*args, *kwargs.values())]
        rows = next((s[self._shard_dim] for s in shapes if is_shape(s) and len(s) >= 3), 0)
        generator = torch.Generator().manual_seed(1)

        def mark(value: Any) -> Any:
            if isinstance(value, Tensor):
                return self._mark(value, rows, rows)
            if not is_shape(value):
                return value
            if len(value) >= 3 and value[self._shard_dim] == rows:
                return _Rows(tuple(value), torch.float32)
            return torch.randn(tuple(value), generator=generator)

        return tuple(map(mark, args)), {name: mark(value) for name, value in kwargs.items()}, rows

    def at_call(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        """Try the model with the arguments, and in the mode, of its first call.

        Raises:
            ValueError: On all domain ranks alike, if a module gives other numbers; it is named.
        """
        assert self._sharded is not None
        for ghost in (self._plain, self._sharded):
            ghost.follow(model, self._switches)
        tensors = [value for _, value in tensors_in({"args": args, "kwargs": kwargs})]
        device = next((x.device for x in tensors if not x.is_meta), torch.device("cpu"))
        sizes, rows_of = self._agreed_rows(tensors)
        if rows_of is None:
            _warn(self.kind, "its inputs have rows of several heights")
            return
        marks = iter(rows_of)

        def mark(x: Tensor) -> Any:
            return self._mark(x, x.shape[self._shard_dim] if next(marks) else -1, sum(sizes))

        marked = _map((args, kwargs), mark)
        if problem := self._attempt(model, (*marked, sum(sizes)), device, sizes):
            _warn(self.kind, problem)

    def _agreed_rows(self, tensors: Sequence[Tensor]) -> tuple[list[int], list[bool] | None]:
        """Rows of each rank, and which tensors have them; None where some have rows of another height.

        Ranks hold a tensor whole if it is the same on all of them. Rows of different ranks are different, or at least
        those of the tensors with the most dims.
        """
        dim, declared = self._shard_dim, self._manager.partition
        told = self._told([(tuple(x.shape), _digest(x)) for x in tensors])
        deep = [x.ndim >= 3 for x in tensors]
        most = max((x.ndim for x in tensors if x.ndim >= 3 and not _is_whole(x)), default=0)
        sizes = [[shapes[i][0][dim] if deep[i] else 0 for shapes in told] for i in range(len(tensors))]
        apart = [len({shapes[i][1] for shapes in told}) > 1 for i in range(len(tensors))]
        main = [i for i, x in enumerate(tensors) if x.ndim == most > 0 and not _is_whole(x)]
        main.sort(key=lambda i: (declared is None or sizes[i] != list(declared.sizes), not apart[i]))
        if not main:
            return [0], [False] * len(tensors)
        own = sizes[main[0]]
        rows_of = [deep[i] and sizes[i] == own and (apart[i] or x.ndim == most) for i, x in enumerate(tensors)]
        other = any(deep[i] and apart[i] and not rows_of[i] and not _is_whole(x) for i, x in enumerate(tensors))
        return own, None if other else rows_of

    def _mark(self, x: Tensor, own: int, rows: int) -> Any:
        if x.ndim < 3 or x.shape[self._shard_dim] != own:
            return x.detach().clone()
        shape = list(x.shape)
        shape[self._shard_dim] = rows
        return _Rows(tuple(shape), x.dtype)

    def _tries(self, args: Any, kwargs: Any, rows: int) -> Iterator[_Try]:
        """Small ones first; the model may insist on its full size, or on its own dtype."""
        block = self._block()
        base = self._manager.domain_parallel_size * block
        heights = [height for height in (base + rows % block, base) if height < rows]
        columns = max((leaf.shape[self._other] for leaf in _leaves((args, kwargs))), default=0)
        sizes = [(h, c) for h, c in product(heights, (_COLUMNS, None)) if c is None or c < columns]
        values = max((math.prod(leaf.shape) for leaf in _leaves((args, kwargs))), default=0)
        if values <= _LARGEST:
            sizes += [(rows, c) for c in (_COLUMNS, None) if c is None or c < columns]
        dtypes = [dtype for dtype in _TOLERANCES if dtype != torch.float64 or self._plain.size <= _LARGEST_IN_FLOAT64]
        for dtype, (height, width) in product(dtypes, dict.fromkeys(sizes)):
            yield _Try(height, width, dtype)

    def _fill(self, value: Any, how: _Try, device: torch.device) -> Any:
        """Arguments of the whole for one way to run the trial."""
        generator = torch.Generator().manual_seed(2)

        def fill(leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                return leaf.to(device, _dtype_for(leaf.dtype, how.dtype))
            shape = list(leaf.shape)
            shape[self._shard_dim] = how.rows
            shape[self._other] = min(shape[self._other], how.columns or shape[self._other])
            dtype = _dtype_for(leaf.dtype, how.dtype)
            if dtype.is_floating_point or dtype.is_complex:
                return torch.randn(shape, dtype=dtype, generator=generator).to(device)
            return torch.randint(0, 2, shape, generator=generator).to(device, dtype)

        return _map(value, fill)

    # The trial

    def _attempt(
        self,
        model: nn.Module,
        marked: tuple[Any, Any, int],
        device: torch.device,
        sizes: Sequence[int] | None = None,
    ) -> str:
        """Try the first way in which the whole runs; returns why none does, or an empty text.

        At full size the rows lie as in the call, by ``sizes``, if that fits the granularity; else as declared.
        """
        args, kwargs, rows = marked
        if rows < self._manager.domain_parallel_size:
            return "no input has rows of all ranks"
        if dist.get_backend(self._manager.domain_group) == "nccl":
            device = torch.device("cuda", torch.cuda.current_device())
        models = _Models(self._plain, self._sharded, device)
        problem, begun = f"its inputs of {rows} rows are large, and it takes no others", time.perf_counter()
        devices = [device] if device.type == "cuda" else []
        autocast = torch.autocast(device.type, enabled=False)
        # A checkpoint around the first call must not count what is saved for the backward of the trial.
        hidden = torch.autograd.graph.saved_tensors_hooks(lambda x: x.detach(), lambda x: x)
        with ExitStack() as stack:
            for context in (torch.random.fork_rng(devices), _as_before(model), torch.device(device), autocast, hidden):
                stack.enter_context(context)
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            for how in self._tries(args, kwargs, rows):
                given = self._fill((args, kwargs), how, device)
                whole = _Numbers(given, lambda how=how: models.plain(how.dtype))  # type: ignore[misc]
                with set_aside():
                    failed = whole.run() or whole.is_random()
                failures = [failure for failure in self._told(failed) if failure]
                if failures:
                    problem = f"it could not be run whole on {how.rows} rows ({failures[0]})"
                    continue
                try:
                    partition = self._partition(how.rows, rows, sizes)
                except ValueError as error:
                    problem = _line(error)
                    continue
                with self._manager.declared(partition):
                    self._compare(whole, given, partition, how.dtype, models)
                seconds, shape = time.perf_counter() - begun, [leaf.shape for leaf in _tensors(given)][:1]
                logger.info(
                    "%s gives the numbers of one rank when tried on %s: %s, %.1f s (check=False skips this)",
                    self.kind,
                    partition,
                    " ".join(str(tuple(s)) for s in shape),
                    seconds,
                )
                return ""
        return problem

    def _block(self) -> int:
        """Rows in a block of small trials: a multiple of usual strides, since the model's own may not be known."""
        return self._manager.granularity * math.ceil(_ROWS_PER_RANK / self._manager.granularity)

    def _partition(self, rows: int, all_rows: int, sizes: Sequence[int] | None) -> RowPartition:
        ranks, granularity = self._manager.domain_parallel_size, self._manager.granularity
        if rows < all_rows:
            return RowPartition.even(rows, ranks, self._block())
        if sizes is not None and all(sizes) and not any(sum(sizes[:rank]) % granularity for rank in range(ranks)):
            return RowPartition(tuple(sizes))
        return RowPartition.even(rows, ranks, granularity)

    def _told(self, value: Any) -> list[Any]:
        """What each rank says, on all of them."""
        group: ProcessGroup = self._manager.domain_group
        said: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(said, value, group=group)
        return said

    def _compare(
        self, whole: _Numbers, given: Any, partition: RowPartition, dtype: torch.dtype, models: _Models
    ) -> None:
        """Run the sharded model, and compare."""
        rank = self._manager.domain_rank
        tolerance = _TOLERANCES[torch.float32 if whole.computes_narrow() else dtype]
        rows = partition.interval(rank)

        def own(x: Tensor) -> Tensor:
            if x.ndim < 3 or x.shape[self._shard_dim] != partition.rows:
                return x
            return x.narrow(self._shard_dim, rows.start, len(rows)).contiguous()

        sharded = _Numbers(_map(given, own), lambda: models.sharded(dtype))
        if failed := sharded.run():
            where = sharded.named(sharded.failed_in)
            failed = self._refusal(f"{where} fails on rank {rank} of {partition}: {failed}", sharded.failed_in)
        try:
            failures = [failure for failure in self._told(failed) if failure]
        except RuntimeError:
            if not failed:
                raise
            failures = [failed]  # the other ranks wait for rows of this one, and do not answer
        if failures:
            raise ValueError(failures[0])
        shapes = self._told({path: tuple(out.shape) for path, out in sharded.outputs.items()})
        wrong = set()
        factors, own_factors = whole.factors(), {}
        for path, out in whole.outputs.items():
            parts = [told.get(path, ()) for told in shapes]
            try:
                dim = sharded_dim(out.shape, parts, self._shard_dim)
            except LookupError:
                wrong |= {"output", "shape"}
                continue
            expected, factor = out, factors[path]
            if dim is None:
                own_factors[path] = factor / len(parts)
            else:
                start = sum(part[dim] for part in parts[:rank])
                expected = out.narrow(dim, start, parts[rank][dim])
                own_factors[path] = factor.narrow(dim, start, parts[rank][dim])
            if not _near(expected, sharded.outputs[path], tolerance, _scales(out, dim)):
                wrong.add("output")
        if not any(self._told(bool(wrong))):
            whole.backward(factors)
            sharded.backward(own_factors)  # of the same weights: the gradients of the whole are read by now
            wrong |= self._wrong_gradients(whole, sharded, own, tolerance)
        wrong = set().union(*self._told(wrong))
        if wrong:
            raise ValueError(self._told(self._difference(whole, sharded, wrong, tolerance))[0])

    def _wrong_gradients(self, whole: _Numbers, sharded: _Numbers, own: Any, tolerance: float) -> set[str]:
        """Which gradients differ. Of those that ranks share, a random projection is compared: one number for each."""
        wrong: set[str] = set()
        shares: dict[str, tuple[complex, float]] = {}
        for path, x in whole.inputs.items():
            grad, found = whole.gradient(x), sharded.gradient(sharded.inputs[path])
            if own(x) is x:
                shares[path] = _projection(found)
            elif not _near(own(grad), found, tolerance, _scales(grad, self._shard_dim)):
                wrong.add("input gradient")
        expected = {**{path: _projection(whole.gradient(whole.inputs[path])) for path in shares}, **whole.parameters}
        totals: dict[str, complex] = dict.fromkeys(expected, 0.0)
        for told in self._told({**shares, **sharded.parameters}):
            for name, (value, _) in told.items():
                totals[name] = totals.get(name, 0.0) + value
        largest = max((norm for _, norm in expected.values()), default=0.0)
        for name, total in totals.items():
            value, norm = expected.get(name, (0.0, 0.0))
            if not abs(value - total) <= 10 * tolerance * (max(norm, 1e-4 * largest) or 1.0):
                wrong.add(f"parameter:{name}")
        return wrong

    def _difference(self, whole: _Numbers, sharded: _Numbers, wrong: set[str], tolerance: float) -> str:
        """What to say of a model whose numbers differ: the first place where they do."""
        runs = [Run(recorder, outputs) for recorder, outputs in self._told(sharded.told())]
        mine = Run(*whole.told())
        events = Events(mine, runs, self._shard_dim, tolerance)
        errors = {item.partition(":")[2]: 1.0 for item in wrong if item.startswith("parameter:")}
        if "output" in wrong:
            found = events.first_difference() or (
                unlike_shapes(mine, runs)
                if "shape" in wrong
                else Difference("forward", "", "", "channels of its result differ that are small beside others", 0.0)
            )
        else:
            found = events.first_backward_difference(errors)
        where = f"{found.module} ({found.kind})" if found.module else f"the model itself ({self.kind})"
        return self._refusal("\n  ".join(filter(None, (f"{where}: {found.what}", found.advice))), found.module)

    def _refusal(self, what: str, name: str) -> str:
        ranks, mistaken = self._manager.domain_parallel_size, self._reasons.get(name, "")
        note = f"\n  {mistaken}" if "not converted as" in mistaken else ""
        return (
            f"{self.kind} does not give the numbers of one rank on {ranks} ranks, when tried on random rows:\n"
            f"  {what}{note}\n"
            "credit_domain.verify_domain_parallel tells more. check=False converts it all the same, and it trains on "
            "wrong numbers then."
        )


class _FirstCall:
    """A hook that tries a model before its first call.

    Compiled code keeps it, and finds while it is traced that the trial is over: taking it away would compile anew.
    """

    def __init__(self, trial: Trial, model: nn.Module) -> None:
        setattr(self, FIRST_CALL, True)
        self._trial, self._model, self._number = trial, ref(model), next(_numbers)
        _hooks[self._number] = self
        self._handle = model.register_forward_pre_hook(self, with_kwargs=True)
        logger.info("%s is tried on small random rows at its first call (check=False skips this)", trial.kind)

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not torch.compiler.is_compiling():
            if self._number not in _over:
                self._trial.at_call(module, args, kwargs)
                _over.add(self._number)  # not where it was refused: it would be again
            self._handle.remove()
        elif not _is_over(self._number):
            shapes = tuple(tuple(operator.index(size) for size in x.shape) for x in args if isinstance(x, Tensor))
            _try_while_tracing(self._number, shapes if len(shapes) == len(args) and not kwargs else ())


_numbers = itertools.count()
_over: set[int] = set()
_hooks: WeakValueDictionary[int, _FirstCall] = WeakValueDictionary()


@constant
def _is_over(number: int) -> bool:
    return number in _over


@constant
def _try_while_tracing(number: int, shapes: tuple[tuple[int, ...], ...]) -> int:
    trial, model = _hooks[number]._trial, _hooks[number]._model()
    if shapes and model is not None:
        trial.at_call(model, tuple(torch.empty(shape, device="meta") for shape in shapes), {})
    else:
        _warn(trial.kind, "its first call is compiled, with other arguments than tensors; pass input_shape=")
    _over.add(number)
    return 0


def _warn(kind: str, why: str) -> None:
    logger.warning(
        "%s could not be tried on small random rows: %s. What its own code does with rows is not known to be right; "
        "credit_domain.verify_domain_parallel proves it",
        kind,
        why,
    )


class _Models:
    """The plain and the sharded model, made when they are needed, with one set of weights."""

    def __init__(self, plain: Ghost, sharded: Ghost | None, device: torch.device) -> None:
        assert sharded is not None
        self._ghosts, self._device = {"plain": plain, "sharded": sharded}, device
        self._made: dict[tuple[str, torch.dtype], nn.Module] = {}
        self._weights: dict[torch.dtype, dict[str, nn.Parameter]] = {}

    def plain(self, dtype: torch.dtype) -> nn.Module:
        """The model for one rank."""
        return self._model("plain", dtype)

    def sharded(self, dtype: torch.dtype) -> nn.Module:
        """The converted model."""
        return self._model("sharded", dtype)

    def _model(self, which: str, dtype: torch.dtype) -> nn.Module:
        for other in [other for other in self._weights if other != dtype]:
            del self._weights[other]
        self._made = {key: model for key, model in self._made.items() if key[1] == dtype}
        key = which, dtype
        if key in self._made:
            self._ghosts[which].restore(self._made[key])
        else:
            weights = self._weights.setdefault(dtype, {})
            self._made[key] = self._ghosts[which].made(dtype, self._device, weights)
        return self._made[key]


class _Numbers:
    """One run of a model, and what came of it."""

    def __init__(self, given: Any, made: Callable[[], nn.Module]) -> None:
        self.made = made
        self._given = _map(given, _leaf)
        self.inputs = {path: x for path, x in tensors_in(self._given) if x.requires_grad}
        self.outputs: dict[str, Tensor] = {}
        self.failed_in = ""
        self._model: nn.Module | None = None
        self._recorder: Recorder | None = None
        self.parameters: dict[str, tuple[complex, float]] = {}

    def run(self) -> str:
        """Run forward; returns what went wrong, or an empty text."""
        try:
            self._model = self.made()
            self._recorder = Recorder(self._model)
            args, kwargs = self._given
            with self._recorder.recording():
                out = self._model(*_map(args, _clone), **_map(kwargs, _clone))
        except ExchangeError:
            raise
        except Exception as error:
            if self._recorder is not None and self._recorder.stack:
                self.failed_in = self._recorder.stack[-1]
            return f"{type(error).__name__}: {_line(error)}"
        found = {path or "output": value for path, value in tensors_in(out)}
        self.outputs = {p: x for p, x in found.items() if x.is_floating_point() or x.is_complex()}
        if not self.outputs:
            return "it returns no tensor of numbers"
        if not all(bool(x.isfinite().all()) for x in self.outputs.values()):
            return "its result is not finite"
        return ""

    def is_random(self) -> str:
        """Why the numbers of a second run are others, if they are: they cannot be compared then."""
        again = _Numbers(self._given, self.made)
        failed = again.run()
        same = again.outputs.keys() == self.outputs.keys() and all(
            again.outputs[path].shape == out.shape and _near(out, again.outputs[path], 1e-3, _scales(out, None))
            for path, out in self.outputs.items()
        )
        return failed or ("" if same else "it draws random numbers, and gives others each time")

    def computes_narrow(self) -> bool:
        """Whether the model computes something in less than double precision by itself."""
        return self._recorder is not None and bool(self._recorder.narrow)

    def factors(self) -> dict[str, Tensor]:
        """Random weights of the outputs, for the loss."""
        generator = torch.Generator().manual_seed(3)
        return {
            path: torch.randn(out.shape, dtype=out.dtype, generator=generator).to(out.device)
            for path, out in self.outputs.items()
        }

    def backward(self, factors: Mapping[str, Tensor]) -> None:
        """Differentiate the sum of the outputs, times the factors; keep a projection of each parameter's gradient."""
        terms = [(out * factors[path]).sum() for path, out in self.outputs.items() if out.requires_grad]
        if terms:
            total = sum(terms[1:], terms[0])
            (total.real if total.is_complex() else total).backward()  # type: ignore[no-untyped-call]
        assert self._model is not None
        for name, parameter in self._model.named_parameters():
            if parameter.grad is not None:
                self.parameters[name] = _projection(parameter.grad)
                parameter.grad = None

    def gradient(self, x: Tensor) -> Tensor:
        """The gradient of an input; zeros where it has none."""
        return torch.zeros_like(x) if x.grad is None else x.grad

    def named(self, name: str) -> str:
        """A module's name and class."""
        kinds = {} if self._recorder is None else self._recorder.kinds
        return f"{name or 'the model itself'} ({kinds.get(name, '?')})"

    def told(self) -> tuple[Recorder | None, dict[str, Tensor]]:
        """What was recorded, on the CPU, so that it can be sent."""
        recorder = self._recorder
        if recorder is not None:
            recorder.events = [
                replace(
                    event,
                    tensors={path: x.cpu() for path, x in event.tensors.items()},
                    gradients={path: x.cpu() for path, x in event.gradients.items()},
                )
                for event in recorder.events
            ]
        return recorder, {path: out.detach().cpu() for path, out in self.outputs.items()}


def _clone(x: Any) -> Any:
    return x.clone()  # a model may change its inputs in place, which leaves of the graph do not allow


def _leaf(x: Any) -> Any:
    return x.detach().clone().requires_grad_(x.is_floating_point() or x.is_complex())


def _near(expected: Tensor, found: Tensor, tolerance: float, scales: Tensor) -> bool:
    if expected.shape != found.shape:
        return False
    return bool(((expected - found).detach().abs() <= tolerance * scales).all())


def _scales(whole: Tensor, sharded: int | None) -> Tensor:
    """What errors are relative to: the largest value of each channel, since channels may be in other units."""
    size = whole.detach().abs()
    if not size.numel():
        return size.new_ones(())
    largest = size.max()
    if whole.ndim < 3 or sharded == 1 - whole.ndim:
        return largest
    return size.amax([dim for dim in range(whole.ndim) if dim != 1], keepdim=True).clamp(min=1e-6 * float(largest))


@contextmanager
def _as_before(model: nn.Module) -> Iterator[None]:
    """Afterwards, the gradients of a model and the generators of Python and NumPy are as before.

    A copy of a model still has its weights where a function that it holds has them.
    """
    parameters, state = list(model.parameters()), random.getstate()
    grads = [parameter.grad for parameter in parameters]
    numpy = sys.modules.get("numpy")
    drawn = None if numpy is None else numpy.random.get_state()
    try:
        for parameter in parameters:
            parameter.grad = None
        yield
    finally:
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad
        random.setstate(state)
        if numpy is not None:
            numpy.random.set_state(drawn)


def _projection(grad: Tensor) -> tuple[complex, float]:
    """The product with a random tensor that depends on the shape alone, and the norm."""
    generator = torch.Generator().manual_seed(4)
    factor = torch.randn(grad.shape, dtype=torch.float32, generator=generator)
    return complex((grad.cpu() * factor).sum()), float(torch.linalg.vector_norm(grad))


def _dtype_for(dtype: torch.dtype, wanted: torch.dtype) -> torch.dtype:
    if dtype.is_complex:
        return torch.complex128 if wanted == torch.float64 else torch.complex64
    return wanted if dtype.is_floating_point else dtype


def _digest(x: Tensor) -> str:
    """Some thousand of the values as text; of a tensor without values, nothing."""
    if x.is_meta:
        return ""
    values = x.detach().reshape(-1)
    return str(values[:: max(1, len(values) // 4096)].tolist())


def _is_whole(x: Tensor) -> bool:
    return not (x.is_floating_point() or x.is_complex())


def _map(value: Any, change: Any) -> Any:
    """The same containers, with tensors and marks changed."""
    if isinstance(value, (Tensor, _Rows)):
        return change(value)
    if isinstance(value, MutableMapping):
        same = copy.copy(value)  # of the same class
        same.update({name: _map(item, change) for name, item in value.items()})
        return same
    if isinstance(value, Mapping):
        return {name: _map(item, change) for name, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [item.name for item in dataclasses.fields(value) if item.init]
        return dataclasses.replace(value, **{name: _map(getattr(value, name), change) for name in names})
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map(item, change) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_map(item, change) for item in value)
    return value


def _leaves(value: Any) -> list[_Rows]:
    found: list[_Rows] = []
    _map(value, lambda leaf: found.append(leaf) if isinstance(leaf, _Rows) else None)
    return found


def _tensors(value: Any) -> Sequence[Tensor]:
    return [x for _, x in tensors_in(value)]


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:300]} ..."
