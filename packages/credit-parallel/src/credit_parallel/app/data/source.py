"""What a training, a forecast and a plan need to know of a data set, wherever it comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Channel(NamedTuple):
    """One field of a sample."""

    name: str  #: name of the variable
    level: float | None = None  #: value of its vertical coordinate; None for a field without one
    units: str = ""  #: as the file has them; of the values that a source returns
    level_units: str = ""  #: those of ``level``
    long_name: str = ""  #: for titles

    @property
    def label(self) -> str:
        """Short and unique: ``t2m``, or ``u_500``."""
        return self.name if self.level is None else f"{self.name}_{self.level:g}"


@dataclass(frozen=True, eq=False)
class Grid:
    """Latitudes and longitudes, in the order of the rows and columns of the fields."""

    latitudes: Tensor  #: degrees north, of shape (H,), float64
    longitudes: Tensor  #: degrees east, of shape (W,), float64

    @property
    def height(self) -> int:
        """Number of rows."""
        return len(self.latitudes)

    @property
    def width(self) -> int:
        """Number of columns."""
        return len(self.longitudes)

    @property
    def periodic(self) -> bool:
        """Whether the column after the last one is the first one."""
        steps = torch.remainder(self.longitudes.diff(), 360)
        return self.width > 1 and bool(
            torch.isclose(steps.sum() + steps[0], steps.new_tensor(360.0), atol=1e-3, rtol=0)
        )


class Cost(NamedTuple):
    """What reading takes, in bytes of values that are not compressed."""

    needed: int  #: of the rows that were asked for
    read: int  #: of the chunks of the file that hold them, which are read whole

    def __add__(self, other: object) -> Cost:
        """Of both."""
        return Cost(self.needed + other.needed, self.read + other.read) if isinstance(other, Cost) else NotImplemented


class Source(Protocol):
    """Fields over time, of which any rows can be read.

    Times that follow one another on the calendar, such as months, have an attribute ``calendar`` besides, a
    :class:`credit_parallel.app.data.months.MonthStep`; a source without one has none.
    """

    name: str  #: what errors and titles call it
    channels: tuple[Channel, ...]  #: the fields, in the order of the channels that :meth:`read` returns
    grid: Grid  #: where they are
    labels: Sequence[str]  #: a name for each time, such as ``2019-03-01T06:00``
    #: Seconds since 1970-01-01 of each time; None where times are none (months of a climatology).
    seconds: Sequence[float] | None
    #: Ranges of times that follow one another in equal steps; samples do not cross from one to the next.
    segments: Sequence[range]
    #: Seconds between times; None where ``seconds`` is, for a single time, and for times on the calendar.
    step: float | None

    def read(self, times: Sequence[int], rows: range) -> Tensor:
        """Rows of all channels at some times: float32 of shape (len(times), C, len(rows), W), in the files' units.

        Values that are missing are NaN.
        """
        ...

    def cost(self, times: Sequence[int], rows: range) -> Cost:
        """What reading them takes."""
        ...
