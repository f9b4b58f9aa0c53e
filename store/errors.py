"""What the store refuses, and why. Each message says what, where, and what to do."""

from __future__ import annotations

from meteora.artifacts import MeteoraError


class StoreError(MeteoraError):
    """The store cannot do what was asked of it."""


class DamagedError(StoreError):
    """A file does not hold the bytes that its name promises."""


class MissingBlobError(StoreError):
    """A blob is named that does not lie in the store."""


class ConflictError(StoreError):
    """Something is recorded already, and what is to be recorded now says otherwise."""


class UnknownError(StoreError):
    """Nothing is recorded under that id, or several things are."""


class BusyError(StoreError):
    """Another process holds a lock for longer than one is willing to wait."""


class UnreachableError(StoreError):
    """The storage that homes share does not answer, or refuses."""


class NewerLedgerError(StoreError):
    """The index was written by a newer release; this one does not touch it."""


class QueryError(StoreError):
    """A question that is not one SELECT, or that ran out of time, memory or rows."""
