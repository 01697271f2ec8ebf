"""What the whole and the ranks did, side by side, and the first place where they differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from credit_domain.verification.compare import compare
from credit_domain.verification.record import Event, Key, Recorder
from credit_domain.verification.report import Difference, seams_near

_OWN_CODE = (
    "its forward does something with rows that a rank cannot do alone{calls}: use credit_domain.functional there, or "
    "replace the module by a custom converter"
)


@dataclass
class Run:
    """What one rank, or the whole, did."""

    recorder: Recorder | None = None
    outputs: dict[str, Tensor] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    parameters: dict[str, Tensor | None] = field(default_factory=dict)
    failed_in: str = ""


class Events:
    """The events of all runs, side by side."""

    def __init__(self, whole: Run, runs: list[Run], shard_dim: int, tolerance: float) -> None:
        assert whole.recorder is not None
        self.kinds = whole.recorder.kinds
        recorders = [run.recorder for run in runs if run.recorder is not None]
        by_key: list[dict[Key, Event]] = [{event.key: event for event in recorder.events} for recorder in recorders]
        self.pairs = [
            (event, [events[event.key] for events in by_key])
            for event in whole.recorder.events
            if by_key
            and all(event.key in events for events in by_key)
            and not event.key[1].startswith(recorders[0].elsewhere)
        ]
        self.shard_dim, self.tolerance = shard_dim, tolerance

    def first_difference(self) -> Difference | None:
        """The first event, in the order of execution, whose tensors differ."""
        before = ""
        for event, others in self.pairs:
            for path, tensor in event.tensors.items():
                bad = self._differs(tensor, [other.tensors.get(path) for other in others])
                if bad is not None:
                    return self._forward_difference(event, bad, before)
            if event.key[0] == "exit":
                before = event.key[1]
        return None

    def _differs(self, whole: Tensor, parts: list[Tensor | None]) -> Any:
        if any(part is None for part in parts):
            return None
        try:
            found = compare(whole, [part for part in parts if part is not None], self.shard_dim, self.tolerance)
        except LookupError:
            return None  # cut into windows or tokens in a way of their own: the modules after it tell
        if found.dim == -whole.ndim and found.dim != self.shard_dim:
            return None  # shards of the batch: windows of several samples lie in another order
        return None if found.error <= self.tolerance else found

    def _forward_difference(self, event: Event, found: Any, before: str) -> Difference:
        kind, name, _ = event.key
        seams = seams_near(found.rows, found.sizes) if found.sizes else ()
        whole = next(iter(event.tensors.values()))
        held = f" (of {whole.shape[self.shard_dim]} rows the ranks have {', '.join(map(str, found.sizes))})"
        held = held if found.error == float("inf") else ""
        common = {"error": found.error, "rows": found.rows, "seams": seams}
        calls = f" ({', '.join(event.calls)})" if event.calls else ""
        if kind == "enter":  # what the caller computed before it called
            after = f" after {before}" if before and before != event.caller else ""
            what = f"what it computes{after} and passes to {name or 'the model itself'} differs{held}"
            return Difference(
                "forward",
                event.caller,
                self.kind_of(event.caller),
                what,
                **common,
                advice=_OWN_CODE.format(calls=calls),
            )
        children = any(other.startswith(f"{name}." if name else "") and other != name for other in self.kinds)
        what = f"its result differs{held}" + (f", though that of {before} does not" if children and before else "")
        return Difference("forward", name, self.kind_of(name), what, **common, advice=_OWN_CODE.format(calls=calls))

    def first_backward_difference(self, parameters: Mapping[str, float]) -> Difference:
        """The first event, in the order of backward, whose gradients differ."""
        after = ""
        for event, others in reversed(self.pairs):
            kind, name, _ = event.key
            for path, grad in event.gradients.items():
                bad = self._differs(grad, [other.gradients.get(path) for other in others])
                if bad is None:
                    continue
                where = name if kind == "enter" else event.caller
                what = (
                    "its result is right, and the gradient of its input differs"
                    if kind == "enter"
                    else f"the gradient that its forward passes back to {name or 'the model itself'} differs"
                    + (f", though that of {after} does not" if after and after != where else "")
                )
                seams = seams_near(bad.rows, bad.sizes) if bad.sizes else ()
                advice = (
                    "something in its forward drops or miscounts a gradient (a plain torch.distributed reduction drops "
                    "it): use the differentiable functions of credit_domain.functional"
                )
                return Difference("backward", where, self.kind_of(where), what, bad.error, bad.rows, seams, advice)
            after = name
        worst = max(parameters, key=lambda name: parameters[name], default="")
        owner = worst.rpartition(".")[0]
        return Difference(
            "backward",
            owner,
            self.kind_of(owner),
            f"the gradient of {worst} differs, though those of all activations agree",
            parameters.get(worst, float("nan")),
            advice="its forward uses the parameter for other rows than this rank's, or on all ranks alike",
        )

    def kind_of(self, name: str) -> str:
        """Name of the class of a module."""
        return self.kinds.get(name, "?")


def unlike_shapes(whole: Run, runs: list[Run]) -> Difference:
    """What to say where the outputs of the ranks are no shards of the whole."""
    listed = "; ".join(
        f"{path}: {tuple(out.shape)} whole, {[tuple(run.outputs[path].shape) for run in runs if path in run.outputs]}"
        for path, out in whole.outputs.items()
    )
    return Difference(
        "forward",
        "",
        "model",
        f"the outputs of the ranks are no shards of that of the whole ({listed})",
        advice="something sets the number of rows from that of the whole, or of one rank",
    )
