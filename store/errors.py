"""The errors of the store. Each message says what, where, and what to do."""

from __future__ import annotations

from meteora.artifacts import MeteoraError


class StoreError(MeteoraError):
    """The store cannot do what was asked of it."""


class DamagedError(StoreError):
    """A file does not hold the bytes that its name promises."""


class MissingBlobError(StoreError):
    """A blob is needed that is not in the store."""


class ConflictError(StoreError):
    """A fact is already recorded with other values."""


class UnknownError(StoreError):
    """Nothing is recorded under this id, or several things are."""


class BusyError(StoreError):
    """Another process held a lock until the deadline."""


class UnreachableError(StoreError):
    """The storage that homes share does not answer, or refuses."""


class NewerLedgerError(StoreError):
    """The index was written by a newer release, which this one does not change."""


class QueryError(StoreError):
    """A query is not one SELECT, or ran out of time, memory or rows."""


def brief(error: Exception) -> str:
    """The first line of a library's error: the rest is about its insides."""
    return str(error).partition("\n")[0]
