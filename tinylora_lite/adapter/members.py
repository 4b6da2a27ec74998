"""Whose numbers a row of a batch computes with, where several adapters share one model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_MEMBERS: ContextVar[Tensor | None] = ContextVar("members", default=None)


@contextmanager
def rows_belong_to(members: Tensor | None) -> Iterator[None]:
    """Inside, row i of what the model is given belongs to the member ``members[i]`` of its population.

    Args:
        members: ``[batch]`` int64; ``None`` where the model carries no population, and leaves everything as it is.
    """
    if members is None:
        yield
        return
    token = _MEMBERS.set(members)
    try:
        yield
    finally:
        _MEMBERS.reset(token)


def members_of_rows(batch: int) -> Tensor:
    """The members of the rows that the model is computing, ``[batch]`` int64.

    Raises:
        RuntimeError: nobody said, or said so of another number of rows.
    """
    members = _MEMBERS.get()
    if members is None:
        raise RuntimeError(
            "the model carries a population, and nothing says whose rows these are; "
            "call it inside tinylora_lite.adapter.members.rows_belong_to(...)"
        )
    if len(members) != batch:
        raise RuntimeError(f"the batch has {batch} rows, but {len(members)} of them were given to members")
    return members
