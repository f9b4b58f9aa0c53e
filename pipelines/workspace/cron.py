"""Schedules and times without Prefect, which must not be imported before its server runs."""

from datetime import UTC, datetime
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cronsim import CronSim, CronSimError

from meteora.artifacts import MeteoraError

SHORT = ("@hourly", "@daily", "@midnight", "@weekly", "@monthly", "@yearly", "@annually")


class ScheduleError(MeteoraError):
    """A schedule is malformed, or never due."""


def clock(moment: datetime | None = None) -> str:
    """A moment, by default now, by this machine's clock and zone: `2026-12-01 03:00 CET`."""
    return f"{(moment or datetime.now(UTC)).astimezone():%Y-%m-%d %H:%M %Z}"


def require_schedule(cron: str, timezone: str) -> None:
    """Refuse a malformed cron line, and a time zone that does not exist.

    Six fields are refused, too: some programs take the first for seconds, others the last.

    Raises:
        ScheduleError: One of them is malformed, or no day is ever due.
    """
    try:
        ZoneInfo(timezone)
        if cron in SHORT:
            return
        if (count := len(cron.split())) != 5:
            raise CronSimError(f"{count} fields")
        if next(CronSim(cron, datetime.now(UTC)), None) is None:
            raise CronSimError("there is no such day")
    except (ValueError, ZoneInfoNotFoundError, OSError, CronSimError) as error:
        raise ScheduleError(
            f"{cron!r} in {timezone!r} is no schedule ({error}); give minute, hour, day, month and"
            ' weekday, and a time zone such as Europe/Berlin: "0 3 * * *" is every night at three'
        ) from None
