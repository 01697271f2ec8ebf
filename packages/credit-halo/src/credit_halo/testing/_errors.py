"""What a failed rank leaves behind."""

from __future__ import annotations


class RankError(RuntimeError):
    """Ranks failed.

    Attributes:
        failures: For each rank that failed, its traceback, or why there is none.
        errors: For each rank that raised an exception that could be brought here, the exception.
    """

    def __init__(self, failures: dict[int, str], errors: dict[int, BaseException]) -> None:
        self.failures, self.errors = failures, errors
        texts = [f"rank {rank}:\n{text.strip()}" for rank, text in sorted(failures.items())]
        super().__init__(f"{len(failures)} ranks failed\n" + "\n".join(texts))
