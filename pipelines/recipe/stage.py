"""The names of a run's stages."""

from enum import StrEnum


class Stage(StrEnum):
    """The stages of a run, in their order; a run may be told to stop after one."""

    base = "base"
    check = "check"
    stack = "stack"
    gates = "gates"
    benchmark = "benchmark"
    publish = "publish"

    def and_before(self) -> list["Stage"]:
        """The stages of a run that is to stop after this one."""
        return [*Stage][: [*Stage].index(self) + 1]
