"""Trying a converted model once, on the ranks that will train it: small, with random weights, before the first step.

A converter sees modules, and not what the ``forward`` of a module does with rows. So a copy of the model runs whole on
every rank, and sharded over them, on a few random rows. Outputs, the gradients of the inputs and of every parameter
must agree. The copy has random weights, so that what a fresh model multiplies by zero shows as well.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from credit_domain.containers import mapped, tensors_in
from credit_domain.verification.compare import has_rows, near, own_factors, part_of, unlike_buffers
from credit_domain.verification.events import Events, unlike_shapes
from credit_domain.verification.first_call import FirstCall
from credit_domain.verification.ghost import Ghost, Switches, Twins, switches_of
from credit_domain.verification.report import Difference
from credit_domain.verification.running import Run, attempt, line_of, set_apart
from credit_domain.verification.trial_inputs import TOLERANCES, Given
from credit_mesh import DomainParallelManager, RowPartition
from credit_mesh.extend import set_aside

logger = logging.getLogger(__name__)

_ROWS_PER_RANK = 16  # a few strides and windows, so that each rank has neighbours and an interior


class Trial:
    """The trial of one model; made before the model is converted, and begun afterwards.

    ``reasons`` says why each module was converted, or was not, by name.
    """

    def __init__(
        self, plain: Ghost, manager: DomainParallelManager, shard_dim: int, reasons: Mapping[str, str]
    ) -> None:
        self._plain, self._manager, self._shard_dim, self._reasons = plain, manager, shard_dim, reasons
        self._sharded = plain  # until it is converted
        self._switches: Switches = {}
        self._group: ProcessGroup = manager.domain_group
        self._kind = type(plain.model).__name__
        self._advice = "With input_shape=, the model is partitioned operation by operation instead. "
        # A multiple of usual strides, since the model's own may not be known.
        self._block = manager.granularity * math.ceil(_ROWS_PER_RANK / manager.granularity)

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
            _warn(type(model).__name__, f"it cannot be copied ({type(error).__name__}: {line_of(error)})")
            return None

    def begin(self, converted: nn.Module, inputs: Any = None) -> bool:
        """Try the model now if the global shape of its input, or its arguments, are known, else at its first call.

        Returns:
            Whether it was tried, or will be.

        Raises:
            ValueError: On all domain ranks alike, if a module gives other numbers; it is named.

        Collectives:
            Those of the converted model, and small gathers.
        """
        self._sharded = Ghost.of(converted, like=self._plain)
        self._switches = switches_of(converted)
        if inputs is not None:
            self._advice = ""
            return self._attempt(converted, Given.of_shapes(inputs, self._shard_dim), torch.device("cpu"))
        FirstCall(self, converted)
        logger.info("%s is tried on small random rows at its first call (check=False skips this)", self._kind)
        return True

    def at_call(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        """Try the model with the arguments, and in the mode, of its first call.

        Raises:
            ValueError: On all domain ranks alike, if a module gives other numbers; it is named.
        """
        for ghost in (self._plain, self._sharded):
            ghost.follow(model, self._switches)
        devices = [x.device for _, x in tensors_in((args, kwargs)) if not x.is_meta]
        given = Given.of_call((args, kwargs), self._shard_dim, self._manager.partition, self._told)
        if given is None:
            self.warn("its inputs have rows of several heights")
        else:
            self._attempt(model, given, devices[0] if devices else torch.device("cpu"))

    def warn(self, why: str) -> None:
        """Say in the log that the model could not be tried."""
        _warn(self._kind, why)

    def _attempt(self, model: nn.Module, given: Given, device: torch.device) -> bool:
        """Try the first way in which the whole runs; warn where none does, and say whether one did."""
        ranks = self._manager.domain_parallel_size
        if given.rows < ranks:
            self.warn("no input has rows of all ranks")
            return False
        if dist.get_backend(self._group) == "nccl":
            device = torch.device("cuda", torch.cuda.current_device())
        twins = Twins(device)
        problem, begun = f"its inputs of {given.rows} rows are large, and it takes no others", time.perf_counter()
        with set_apart(model, device):
            for how in given.tries(ranks, self._block, self._plain.size):
                filled = given.filled(how, device)
                with set_aside():
                    whole, failed = self._whole(filled, twins, how.dtype)
                failures = [failure for failure in self._told(failed) if failure]
                if failures or whole is None:
                    problem = f"it could not be run whole on {how.rows} rows ({failures[0]})"
                    continue
                try:
                    partition = self._partition(how.rows, given)
                except ValueError as error:
                    problem = line_of(error)
                    continue
                with self._manager.declared(partition):
                    self._compare(whole, filled, partition, how.dtype, twins)
                shape = " ".join(str(tuple(x.shape)) for _, x in list(tensors_in(filled))[:1])
                logger.info(
                    "%s gives the numbers of one rank when tried on %s: %s, %.1f s (check=False skips this)",
                    *(self._kind, partition, shape, time.perf_counter() - begun),
                )
                return True
        self.warn(problem)
        return False

    def _whole(self, filled: Any, twins: Twins, dtype: torch.dtype) -> tuple[Run | None, str]:
        """The run of the plain model, and why it cannot be compared, if it cannot."""
        make = partial(twins.model, self._plain, dtype)
        whole, failed = attempt(make, filled)
        if failed or whole is None:
            return whole, failed
        again, failed = attempt(make, filled)
        if failed or again is None:
            return whole, failed
        same = again.outputs.keys() == whole.outputs.keys() and all(
            near(out, again.outputs[path], 1e-3, out, None) for path, out in whole.outputs.items()
        )
        return whole, "" if same else "it draws random numbers, and gives others each time"

    def _partition(self, rows: int, given: Given) -> RowPartition:
        """At full size as in the call, if that fits the granularity; else as declared."""
        ranks, granularity, sizes = self._manager.domain_parallel_size, self._manager.granularity, given.sizes
        if rows < given.rows:
            return RowPartition.even(rows, ranks, self._block)
        if sizes is not None and all(sizes) and not any(sum(sizes[:rank]) % granularity for rank in range(ranks)):
            return RowPartition(sizes)
        return RowPartition.even(rows, ranks, granularity)

    def _told(self, value: Any) -> list[Any]:
        """What each rank says, on all of them."""
        said: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(said, value, group=self._group)
        return said

    def _compare(self, whole: Run, filled: Any, partition: RowPartition, dtype: torch.dtype, twins: Twins) -> None:
        """Run the sharded model, and compare."""
        rank, dim = self._manager.domain_rank, self._shard_dim
        tolerance = TOLERANCES[torch.float32 if whole.recorder.narrow else dtype]
        rows = partition.interval(rank)

        def own(x: Tensor) -> Tensor:
            if not has_rows(x, partition.rows, dim):
                return x
            return x.narrow(dim, rows.start, len(rows)).contiguous()

        sharded, failed = attempt(partial(twins.model, self._sharded, dtype), mapped(filled, lambda _, x: own(x)))
        if failed:
            name, kind = "", "?"
            if sharded is not None:
                name = sharded.failed_in
                kind = sharded.recorder.kind_of(name)
            where = f"{name or 'the model itself'} ({kind})"
            failed = self._refusal(f"{where} fails on rank {rank} of {partition}: {failed}", name)
        try:
            failures = [failure for failure in self._told(failed) if failure]
        except RuntimeError:
            if not failed:
                raise
            failures = [failed]  # the other ranks wait for rows of this one, and do not answer
        if failures or sharded is None:
            raise ValueError(failures[0])
        shapes = self._told(sharded.shapes)
        wrong, factors = set(), whole.factors(3)
        try:
            mine = own_factors(factors, shapes, rank, dim)
            for path, out in whole.outputs.items():
                expected, along = part_of(out, [told[path] for told in shapes], rank, dim)
                if not near(expected, sharded.outputs[path], tolerance, out, along):
                    wrong.add("output")
        except LookupError:
            wrong |= {"output", "shape"}
        wrong |= {f"buffer:{name}" for name in unlike_buffers(whole.model, sharded.model, tolerance)}
        if not any(self._told(bool(wrong))):
            whole.backward(factors, _projection)
            sharded.backward(mine, _projection)  # of the same weights: the gradients of the whole are read by now
            wrong |= self._wrong_gradients(whole, sharded, own, tolerance)
        wrong = set().union(*self._told(wrong))
        if wrong:
            raise ValueError(self._told(self._difference(whole, sharded, wrong, tolerance))[0])

    def _wrong_gradients(self, whole: Run, sharded: Run, own: Any, tolerance: float) -> set[str]:
        """Which gradients differ. Of those that ranks share, a random projection is compared: one number for each."""
        wrong: set[str] = set()
        expected, shares = dict(whole.gradients), dict(sharded.gradients)
        for path, x in whole.inputs.items():
            grad, found = whole.input_gradient(path), sharded.input_gradient(path)
            if own(x) is x:
                expected[path], shares[path] = _projection(grad), _projection(found)
            elif not near(own(grad), found, tolerance, grad, self._shard_dim):
                wrong.add("input gradient")
        totals: dict[str, complex] = dict.fromkeys(expected, 0.0)
        for told in self._told(shares):
            for name, (value, _) in told.items():
                totals[name] = totals.get(name, 0.0) + value
        largest = max((norm for _, norm in expected.values()), default=0.0)
        for name, total in totals.items():
            value, norm = expected.get(name, (0.0, 0.0))
            if not abs(value - total) <= 10 * tolerance * (max(norm, 1e-4 * largest) or 1.0):
                wrong.add(f"parameter:{name}")
        return wrong

    def _difference(self, whole: Run, sharded: Run, wrong: set[str], tolerance: float) -> str:
        """What to say of a model whose numbers differ: the first place where they do."""
        outputs = {path: out.detach().cpu() for path, out in sharded.outputs.items()}
        told = self._told((sharded.recorder.to_cpu(), outputs))
        recorders = [recorder for recorder, _ in told]
        events = Events(whole.recorder.to_cpu(), recorders, self._shard_dim, tolerance)
        buffers = sorted(item.partition(":")[2] for item in wrong if item.startswith("buffer:"))
        if "output" not in wrong and buffers:
            owner, _, name = buffers[0].rpartition(".")
            what = f"its buffer {name} has other values after a forward"
            found = Difference("forward", owner, whole.recorder.kind_of(owner), what)
        elif "output" not in wrong:
            names = [item.partition(":")[2] for item in wrong if item.startswith("parameter:")]
            found = events.first_backward_difference(dict.fromkeys(names, 1.0))
        elif (first := events.first_difference()) is not None:
            found = first
        elif "shape" in wrong:
            found = unlike_shapes(whole.outputs, [outs for _, outs in told])
        else:
            found = Difference("forward", "", "", "channels of its result differ that are small beside others")
        where = f"{found.module} ({found.kind})" if found.module else f"the model itself ({self._kind})"
        return self._refusal("\n  ".join(filter(None, (f"{where}: {found.what}", found.advice))), found.module)

    def _refusal(self, what: str, name: str) -> str:
        ranks, mistaken = self._manager.domain_parallel_size, self._reasons.get(name, "")
        note = f"\n  {mistaken}" if "not converted as" in mistaken else ""
        return (
            f"{self._kind} does not give the numbers of one rank on {ranks} ranks, when tried on random rows:\n"
            f"  {what}{note}\n"
            f"{self._advice}credit_domain.verify_domain_parallel tells more. check=False converts it all the "
            "same, and it trains on wrong numbers then."
        )


def _warn(kind: str, why: str) -> None:
    logger.warning(
        "%s could not be tried on small random rows: %s. What its own code does with rows is not known to be right; "
        "credit_domain.verify_domain_parallel proves it",
        kind,
        why,
    )


def _projection(grad: Tensor) -> tuple[complex, float]:
    """The product with a random tensor that depends on the shape alone, and the norm."""
    generator = torch.Generator("cpu").manual_seed(4)
    factor = torch.randn(grad.shape, dtype=torch.float32, generator=generator, device="cpu")
    return complex((grad.cpu() * factor).sum()), float(torch.linalg.vector_norm(grad))
