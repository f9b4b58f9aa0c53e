"""The errors of the store. Each message says what, where, and what to do."""

from meteora.artifacts import MeteoraError

MOST_OF_AN_ERROR = 300
"""Characters of a library's error in a message."""


class StoreError(MeteoraError):
    """The store cannot do its task."""


class DamagedError(StoreError):
    """The bytes of a file do not hash to its name."""


class MissingBlobError(StoreError):
    """A blob is needed that is not in the store."""


class ConflictError(StoreError):
    """A fact is already recorded with other values."""


class UnknownError(StoreError):
    """Nothing is recorded under this id, or several things are."""


class BusyError(StoreError):
    """Another process held a lock until the deadline."""


class UnreachableError(StoreError):
    """The shared storage does not answer, or refuses a request."""


class NewerLedgerError(StoreError):
    """A newer release wrote the index, so this one does not change it."""


class QueryError(StoreError):
    """A query is not one SELECT, or ran out of time, memory or rows."""


def brief(error: Exception) -> str:
    """The beginning of the first line of a library's error; the rest is for its developers.

    It may quote a foreign record, so it is made printable.
    """
    line = str(error).partition("\n")[0][:MOST_OF_AN_ERROR]
    return "".join(c if c.isprintable() else "�" for c in line)
