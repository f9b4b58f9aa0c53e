"""A stage without room on the disk does not begin, and says what is there and what is needed."""

import shutil
from collections.abc import Callable

import pytest

from meteora.adapters.compatibility import stack_bytes
from pipelines.stages import build
from pipelines.workspace.context import RunContext
from pipelines.workspace.faults import NoSpaceError
from store.errors import BusyError
from store.files import locked
from tests.pipelines.conftest import plan_of


def test_stack_and_gates_ask_for_their_room_first(
    workplace: Callable[..., RunContext], monkeypatch: pytest.MonkeyPatch
) -> None:
    hasty, work = workplace(deadlines={"gates": "0.1s"}), workplace()
    planned = plan_of(work)

    def leave(num_bytes: float) -> None:
        left = shutil.disk_usage(work.home)._replace(free=int(num_bytes))
        monkeypatch.setattr(shutil, "disk_usage", lambda _: left)

    specs = [expert.adapter.spec for expert in planned.experts]
    leave(stack_bytes(specs) - 1)
    with pytest.raises(NoSpaceError, match=r"the stack of 2 experts needs 0\.0 MB, and the disk"):
        build.stack(work, planned)
    leave(stack_bytes(specs))
    build.stack(work, planned)
    size = work.ledger.blobs.path_of(str(work.ledger.weights_of(planned.fused.id))).stat().st_size
    assert 0 <= size - stack_bytes(specs) < 10_000  # the rest is the header

    lock = work.home / "locks" / f"gates-{work.training_folder(planned.router.id).name}.lock"
    with locked(lock, deadline_seconds=0), pytest.raises(BusyError):
        build.fit_gates(hasty, planned)  # a recipe with the same gates is being run

    needed = build._bytes_of_fit(planned)
    leave(needed - 1)
    with pytest.raises(NoSpaceError, match="a fit of these gates needs"):
        build.fit_gates(work, planned)
    assert work.ledger.built(planned.router.id) is None
    leave(needed)
    made = build.fit_gates(work, planned)
    tensors = sum(work.ledger.blobs.path_of(blob).stat().st_size for blob in made.blobs)
    assert tensors < needed + 20_000  # two headers
