"""Stages on tiny models, most of whose time would go into what is counted for large ones."""

import pytest

from pipelines.evaluation import routing_stats


@pytest.fixture(autouse=True)
def _few_composites(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing_stats, "COMPOSITES", 6)
