"""Samplers that deal samples out over replicas, not over ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch.utils.data import Dataset, DistributedSampler

from credit_parallel.contract import Where, place_of


def data_parallel_sampler(
    dataset: Dataset[Any], where: Where = None, *, shuffle: bool = True, seed: int = 0, drop_last: bool = False
) -> DataParallelSampler:
    """A sampler of the samples of this rank's replica, the same for all ranks that share a sample.

    Args:
        shuffle: Draw a new order in each epoch; see :meth:`~torch.utils.data.DistributedSampler.set_epoch`.
        seed: Seed of the order; the same on every rank.
        drop_last: Drop the samples that do not divide by the replicas, instead of repeating some.
    """
    layout, at = place_of(where)
    return DataParallelSampler(
        dataset, num_replicas=layout.dp, rank=at.dp, shuffle=shuffle, seed=seed, drop_last=drop_last
    )


class DataParallelSampler(DistributedSampler[Any]):
    """torch's DistributedSampler, which can go on in the middle of an epoch, with another number of replicas too.

    Its arguments are those of :class:`torch.utils.data.DistributedSampler`; ``rank`` and ``num_replicas`` are those of
    the data axis (:func:`credit_parallel.sampler.data_parallel_sampler` fills them in).

    Where samples do not divide by the replicas, and are not dropped, the first ones are seen twice; the last
    :attr:`repeated` indices of this replica are such, and an exact mean over samples leaves them out.
    """

    def __init__(self, dataset: Dataset[Any], *args: Any, **kwargs: Any) -> None:
        super().__init__(dataset, *args, **kwargs)
        self._next = self._start = 0

    def __iter__(self) -> Iterator[Any]:
        """The indices of this replica; after :meth:`load_state_dict`, once, those that are left of the epoch."""
        self._next, self._start = self._start, 0
        return self._rest(list(super().__iter__()))

    def _rest(self, indices: list[Any]) -> Iterator[Any]:
        for index in indices[self._next :]:
            self._next += 1
            yield index

    @property
    def repeated(self) -> int:
        """How many indices at the end of this replica's repeat samples that were seen before, in the same epoch."""
        own = len(range(self.rank, len(self.dataset), self.num_replicas))  # type: ignore[arg-type]
        return max(0, self.num_samples - own)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, from which the order is drawn; another one than before starts at its beginning."""
        if epoch != self.epoch:
            self._next = self._start = 0
        super().set_epoch(epoch)

    def state_dict(self, used: int | None = None) -> dict[str, Any]:
        """Where in the epoch training is; the same on every rank.

        ``used`` is how many samples of this replica training has used in this epoch. None takes those handed out, which
        are more where the workers of a loader read ahead. A ValueError refuses more than there are.
        """
        used = max(self._next, self._start) if used is None else used
        if not 0 <= used <= self.num_samples:
            raise ValueError(f"used must be in 0..{self.num_samples}; got {used}")
        done = used == self.num_samples
        identity = self._identity()
        return {**identity, "epoch": self.epoch, "used": identity["samples"] if done else used * self.num_replicas}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a state was taken, on any number of replicas that divides the samples used so far.

        A state of another dataset length, seed or order is a ValueError, as are samples that do not divide.
        """
        mine = self._identity()
        other = {key: (state.get(key), value) for key, value in mine.items() if state.get(key) != value}
        if other:
            told = ", ".join(
                f"{key} is {there!r} in the state and {here!r} here" for key, (there, here) in other.items()
            )
            raise ValueError(f"the state is of another order of samples: {told}")
        used = int(state["used"])
        done = used >= mine["samples"]
        if used % self.num_replicas and not done:
            raise ValueError(
                f"{used} samples were used, which {self.num_replicas} replicas cannot have shared evenly: go on from "
                "the start of an epoch, or with another number of replicas"
            )
        super().set_epoch(int(state["epoch"]))
        self._next = self._start = self.num_samples if done else min(used // self.num_replicas, self.num_samples)

    def _identity(self) -> dict[str, Any]:
        size = len(self.dataset)  # type: ignore[arg-type]
        return {"samples": size, "shuffle": self.shuffle, "seed": self.seed, "drop_last": self.drop_last}
