"""When a schedule is due: where clocks change, in leap years, in any time zone."""

import asyncio
import re
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock, Mock
from zoneinfo import ZoneInfo

import pytest

from pipelines.workspace.context import RunContext
from pipelines.workspace.cron import ScheduleError, require_schedule
from tests.pipelines.cli.command_line import ask

BERLIN = "Europe/Berlin"


@pytest.fixture(scope="module")
def due() -> Callable[..., list[datetime]]:
    """A function from cron line, time zone, first moment and number to moments."""
    from prefect.server.schemas.schedules import CronSchedule  # noqa: PLC0415

    from pipelines.flows.deployments import read_schedule  # noqa: PLC0415

    def moments(cron: str, timezone: str, start: datetime, count: int) -> Any:
        asked: Any = read_schedule(cron, timezone)
        schedule = CronSchedule(cron=asked.cron, timezone=asked.timezone)
        return asyncio.run(schedule.get_dates(count, start=start))

    return moments


def days(found: list[datetime], timezone: str = BERLIN) -> list[tuple[int, int, int, int]]:
    """Month, day, hour and minute by the clock on the wall."""
    local = [moment.astimezone(ZoneInfo(timezone)) for moment in found]
    return [(one.month, one.day, one.hour, one.minute) for one in local]


def test_a_nightly_run_is_due_once_a_night_by_the_clock_on_the_wall(
    due: Callable[..., list[datetime]],
) -> None:
    for month, first in ((3, 28), (10, 24)):  # the clock changes on the second of these nights
        start = datetime(2026, month, first, tzinfo=UTC)
        expected = [(month, first + day, 3, 30) for day in range(3)]
        assert days(due("30 3 * * *", BERLIN, start, 3)) == expected


def test_an_hour_that_is_skipped_or_comes_twice_is_due_once(
    due: Callable[..., list[datetime]],
) -> None:
    for month, first in ((3, 28), (10, 24)):
        found = due("30 2 * * *", BERLIN, datetime(2026, month, first, tzinfo=UTC), 3)
        assert [day for _, day, _, _ in days(found)] == [first, first + 1, first + 2]
        assert len(set(found)) == 3
        assert found == sorted(found)


def test_an_hourly_run_is_due_at_every_hour_that_the_clock_shows(
    due: Callable[..., list[datetime]],
) -> None:
    """So one that comes twice is due once."""
    for month, first, longest in ((3, 28, 3600), (10, 24, 7200)):
        found = due("0 * * * *", BERLIN, datetime(2026, month, first, 12, tzinfo=UTC), 30)
        # two moments in one zone differ by what the clock on the wall shows
        moments = [moment.astimezone(UTC) for moment in found]
        steps = [(later - sooner).total_seconds() for sooner, later in pairwise(moments)]
        assert {*steps} == {3600.0, float(longest)}
        assert steps.count(7200.0) == (longest == 7200)


def test_the_29th_of_february_is_due_in_leap_years_alone(
    due: Callable[..., list[datetime]],
) -> None:
    found = due("0 3 29 2 *", "UTC", datetime(2026, 1, 1, tzinfo=UTC), 3)
    assert [(one.year, one.month, one.day) for one in found] == [
        (2028, 2, 29), (2032, 2, 29), (2036, 2, 29),
    ]  # fmt: skip
    last = due("0 3 * * *", "UTC", datetime(2028, 2, 28, tzinfo=UTC), 3)
    assert [(one.month, one.day) for one in last] == [(2, 28), (2, 29), (3, 1)]


def test_one_moment_has_another_hour_in_another_zone(due: Callable[..., list[datetime]]) -> None:
    start = datetime(2026, 6, 1, tzinfo=UTC)
    ((_, _, hour, minute),) = days(due("15 3 * * *", "Asia/Kathmandu", start, 1), "UTC")
    assert (hour, minute) == (21, 30)


@pytest.mark.parametrize(
    ("cron", "timezone"),
    [
        ("0 3 * *", "UTC"),
        ("0 3 * * * *", "UTC"),
        ("61 3 * * *", "UTC"),
        ("0 0 30 2 *", "UTC"),
        ("", "UTC"),
        ("@reboot", "UTC"),
        ("0 3 * * *", "Atlantis"),
    ],
)
def test_what_is_no_schedule_is_one_sentence_before_a_server_is_there(
    cron: str, timezone: str, tmp_path: Path
) -> None:
    with pytest.raises(ScheduleError, match="is no schedule"):
        require_schedule(cron, timezone)
    words = ("schedule", "quickstart", "--cron", cron, "--timezone", timezone, "--home", tmp_path)
    said = ask(*words)
    assert said.returncode == 1
    assert "is no schedule" in said.stderr
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("cron", ["@daily", "0 3 29 2 *", "*/5 8-17 * jan mon,fri", "0 3 L * *"])
def test_what_is_a_schedule_is_taken(cron: str) -> None:
    from pipelines.flows.deployments import read_schedule  # noqa: PLC0415

    require_schedule(cron, BERLIN)
    assert read_schedule(cron, BERLIN).cron == cron


def test_what_is_a_schedule_and_not_prefects_is_refused() -> None:
    from pipelines.flows.deployments import ServeError, read_schedule  # noqa: PLC0415

    require_schedule("0 3 LW * *", BERLIN)
    with pytest.raises(ServeError, match="is no schedule of Prefect's"):
        read_schedule("0 3 LW * *", BERLIN)


@pytest.mark.parametrize("url", ["foo", "ftp://host/x", "https://", "http:// x"])
def test_what_is_called_on_failure_is_a_url(url: str, tmp_path: Path) -> None:
    said = ask("schedule", "quickstart", "--on-failure", url, "--home", tmp_path)
    assert said.returncode == 2
    assert not [*tmp_path.iterdir()]


def test_a_recipe_that_is_given_twice_is_refused(workplace: Callable[..., RunContext]) -> None:
    from pipelines.flows.deployments import ServeError, serve  # noqa: PLC0415

    with pytest.raises(ServeError, match="is given twice"):
        serve([workplace(), workplace()], None, limit=1)


def test_two_recipes_of_one_name_are_told_apart_once(
    workplace: Callable[..., RunContext],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from pipelines.flows import deployments  # noqa: PLC0415

    work = workplace(policy={})
    (tmp_path / "other").mkdir()
    path = tmp_path / "other" / work.path.name
    path.write_bytes(work.path.read_bytes())
    other = replace(work, path=path)
    runner = Mock(start=AsyncMock())
    monkeypatch.setattr(deployments, "Runner", lambda **_: runner)
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    nightly = deployments.read_schedule("30 3 * * *", "UTC")
    deployments.serve([work, other], nightly, limit=1)
    said = capsys.readouterr().err
    assert len({call.args[0].name for call in runner.add_deployment.call_args_list}) == 2
    coming = r"runs at '30 3 \* \* \*' \(UTC\), next on 20\d\d-\d\d-\d\d \d\d:\d\d \S+, as"
    assert len(re.findall(coming, said)) == 2
    assert said.count(f"2 recipes are called {work.name}: ") == 1
    assert all(f"{one.path} as `{one.key}`" in said for one in (work, other))
