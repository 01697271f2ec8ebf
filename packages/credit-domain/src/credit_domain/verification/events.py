"""What the whole and the ranks did, side by side, and the first place where they differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from credit_domain.verification.compare import Comparison, compare
from credit_domain.verification.record import Event, Recorder
from credit_domain.verification.report import Difference, seams_near

_GRADIENT_ADVICE = (
    "something in its forward drops or miscounts a gradient (a plain torch.distributed reduction drops it): use the "
    "differentiable functions of credit_domain.functional"
)


class Events:
    """The events of the whole and of the ranks, side by side."""

    def __init__(self, whole: Recorder, ranks: Sequence[Recorder], shard_dim: int, tolerance: float) -> None:
        self.kinds, self.kind_of = whole.kinds, whole.kind_of
        self.shard_dim, self.tolerance = shard_dim, tolerance
        by_key = [{event.key: event for event in recorder.events} for recorder in ranks]
        self.pairs = [
            (event, [events[event.key] for events in by_key])
            for event in whole.events
            if by_key
            and all(event.key in events for events in by_key)
            and not event.key[1].startswith(ranks[0].elsewhere)
        ]

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

    def _differs(self, whole: Tensor, parts: Sequence[Tensor | None]) -> Comparison | None:
        held = [part for part in parts if part is not None]
        if len(held) < len(parts):
            return None
        try:
            found = compare(whole, held, self.shard_dim, self.tolerance)
        except LookupError:
            return None  # cut into windows or tokens in a way of their own: the modules after it tell
        if found.dim == -whole.ndim and found.dim != self.shard_dim:
            return None  # shards of the batch: windows of several samples lie in another order
        return None if found.error <= self.tolerance else found

    def _forward_difference(self, event: Event, found: Comparison, before: str) -> Difference:
        kind, name, _ = event.key
        whole = next(iter(event.tensors.values()))
        held = f" (of {whole.shape[self.shard_dim]} rows the ranks have {', '.join(map(str, found.sizes))})"
        held = held if found.error == float("inf") else ""
        if kind == "enter":  # what the caller computed before it called
            where = event.caller
            after = f" after {before}" if before and before != where else ""
            what = f"what it computes{after} and passes to {name or 'the model itself'} differs{held}"
        else:
            where = name
            children = any(other.startswith(f"{name}." if name else "") and other != name for other in self.kinds)
            though = f", though that of {before} does not" if children and before else ""
            what = f"its result differs{held}{though}"
        calls = f" ({', '.join(event.calls)})" if event.calls else ""
        advice = (
            f"its forward does something with rows that a rank cannot do alone{calls}: use credit_domain.functional "
            "there, or replace the module by a custom converter"
        )
        return self._difference("forward", where, what, found, advice)

    def first_backward_difference(self, parameters: Mapping[str, float]) -> Difference:
        """The first event, in the order of backward, whose gradients differ; else the worst of the parameters."""
        after = ""
        for event, others in reversed(self.pairs):
            kind, name, _ = event.key
            for path, grad in event.gradients.items():
                bad = self._differs(grad, [other.gradients.get(path) for other in others])
                if bad is None:
                    continue
                where, what = name, "its result is right, and the gradient of its input differs"
                if kind != "enter":
                    where = event.caller
                    though = f", though that of {after} does not" if after and after != where else ""
                    what = f"the gradient that its forward passes back to {name or 'the model itself'} differs{though}"
                return self._difference("backward", where, what, bad, _GRADIENT_ADVICE)
            after = name
        worst = max(parameters, key=lambda name: parameters[name], default="")
        found = Comparison(None, parameters.get(worst, float("nan")))
        what = f"the gradient of {worst} differs, though those of all activations agree"
        advice = "its forward uses the parameter for other rows than this rank's, or on all ranks alike"
        return self._difference("backward", worst.rpartition(".")[0], what, found, advice)

    def _difference(self, phase: str, where: str, what: str, found: Comparison, advice: str) -> Difference:
        seams = seams_near(found.rows, found.sizes) if found.sizes else ()
        return Difference(phase, where, self.kind_of(where), what, found.error, found.rows, seams, advice)


def unlike_shapes(whole: Mapping[str, Tensor], ranks: Sequence[Mapping[str, Tensor]]) -> Difference:
    """What to say where the outputs of the ranks are no shards of the whole."""
    listed = "; ".join(
        f"{path}: {tuple(out.shape)} whole, {[tuple(outs[path].shape) for outs in ranks if path in outs]}"
        for path, out in whole.items()
    )
    what = f"the outputs of the ranks are no shards of that of the whole ({listed})"
    advice = "something sets the number of rows from that of the whole, or of one rank"
    return Difference("forward", "", "model", what, advice=advice)
