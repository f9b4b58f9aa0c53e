"""Ten minutes of a schedule, a chat server, readers and kills: what they use stays what it was.

    pytest -m slow -n 0 tests/pipelines/test_soak.py -o log_cli=true

prints the figures; `SOAK_MINUTES` in the environment is another length. On two cores with much else
to do, from the fourth minute to the tenth, over 4 runs that ended well and 1,112 requests (and with
4 kills in all of the time):

    MB of memory, open files    schedule 144, 21     chat server 625, 9     Prefect's server 293, 31
    then                                 144, 21                 626, 10                     310, 35

and each of two readers went from 86 or 87 MB to 87, over 2,600 queries in all of the time.
"""

from __future__ import annotations

import json
import logging
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

from pipelines.workspace.context import RunContext
from tests.pipelines.conftest import CHAT_TEMPLATE, letters
from tests.pipelines.flows.test_local_server import servers, wait_until, without_prefect
from tests.pipelines.process_tree import descendants

if TYPE_CHECKING:
    from collections.abc import Generator

    from tests.conftest import World

pytestmark = pytest.mark.slow

MINUTES = float(os.environ.get("SOAK_MINUTES", "10"))
START_SECONDS = 300
"""How long a busy machine may take to start one of the two."""
HELLO = {"model": "soak", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 16}
MOST = {"MB of the store": 0.5, "MB of its index": 4.0, "MB of Prefect": 2.0}
"""On the disk, for a run that ends well, with those that are killed and skipped meanwhile."""
BEGUN = "('RUNNING', 'PENDING', 'CANCELLING')"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Used:
    """What one process has at a moment."""

    megabytes: float
    descriptors: int
    threads: int

    @classmethod
    def by(cls, pid: int) -> Used:
        process = Path(f"/proc/{pid}")
        pages = int((process / "statm").read_text().split()[1])
        descriptors, threads = (len([*(process / part).iterdir()]) for part in ("fd", "task"))
        return cls(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, descriptors, threads)

    @classmethod
    def by_all(cls, pids: dict[str, int]) -> dict[str, Used]:
        return {name: cls.by(pid) for name, pid in pids.items()}

    def is_bounded_by(self, before: Used) -> bool:
        """Whether it is no more than what one more request or run takes for a while."""
        return (
            self.megabytes < 1.2 * before.megabytes + 20
            and self.descriptors <= before.descriptors + 10
            and self.threads <= before.threads + 10  # a query has those of DuckDB
        )


def start(module: str, *words: object, log_file: Path, tmp: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", module, *map(str, words)]
    environment = {**without_prefect(), "TMPDIR": str(tmp)}
    with log_file.open("ab") as out:
        return subprocess.Popen(command, stdout=out, stderr=out, env=environment)


@contextmanager
def started(
    module: str, *words: object, log_file: Path, tmp: Path
) -> Generator[subprocess.Popen[bytes]]:
    """A process that goes on until it is told to end, and then does."""
    process = start(module, *words, log_file=log_file, tmp=tmp)
    try:
        yield process
        assert process.poll() is None, log_file.read_text()
    finally:
        process.terminate()
        process.wait(timeout=START_SECONDS)


def said(log_file: Path, pattern: str) -> re.Match[str]:
    """What a process says, once it has."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if found := re.search(pattern, log_file.read_text()):
            return found
        time.sleep(0.2)
    raise AssertionError(log_file.read_text())


def ask(url: str, seed: int) -> None:
    """One of the ways in which clients use a server, and misuse it."""
    draw = random.Random(seed)
    kind = draw.randrange(6)
    body = {**HELLO, "messages": [{"role": "user", "content": "".join(draw.choices("abc", k=40))}]}
    with httpx.Client(timeout=START_SECONDS) as client:
        if kind == 0:
            assert client.post(url, json=body).status_code == 200
        elif kind == 1:
            assert "[DONE]" in client.post(url, json={**body, "stream": True}).text
        elif kind == 2:
            asked = {**body, "stream": True, "max_tokens": 400}
            with client.stream("POST", url, json=asked) as answer:
                next(answer.iter_lines())  # and leaves
        elif kind == 3:
            assert client.post(url, json={**body, "model": "nobody"}).status_code == 404
        elif kind == 4:
            noise, as_json = draw.randbytes(1_000), {"content-type": "application/json"}
            assert client.post(url, content=noise).status_code == 415
            assert client.post(url, content=noise, headers=as_json).status_code == 400
        else:
            assert client.post(url, json=body, headers={"host": "evil.example"}).status_code == 403


@contextmanager
def asked(url: str) -> Generator[list[int]]:
    """Three clients at once, with breaths; yields how many requests each has made."""
    over, counts, faults = threading.Event(), [0, 0, 0], []

    def work(client: int) -> None:
        while not over.wait(0.5):
            try:
                ask(url, 3 * counts[client] + client)
            except Exception as fault:
                faults.append(fault)
                return
            counts[client] += 1

    threads = [threading.Thread(target=work, args=[client]) for client in range(3)]
    for thread in threads:
        thread.start()
    try:
        yield counts
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert faults == []


@contextmanager
def killed(work: RunContext, schedule: int, tmp: Path) -> Generator[dict[str, int]]:
    """After each run that ends well, one by hand or a process of the schedule's is killed.

    Yields:
        How many of each have been.
    """
    over, counts, chance = threading.Event(), {"by hand": 0, "scheduled": 0}, random.Random(0)
    words = ("pipelines.cli", "run", work.path, "--home", work.home)

    def kill() -> None:
        before = num_runs(work)
        while not over.wait(1):
            if num_runs(work) == before:
                continue
            before = num_runs(work)
            if chance.random() < 0.5:
                by_hand = start(*words, log_file=tmp.with_name("by hand.log"), tmp=tmp)
                over.wait(chance.uniform(1, 60))
                counts["by hand"] += by_hand.poll() is None
                by_hand.kill()
                by_hand.wait()
            else:
                over.wait(chance.uniform(1, 60))
                others = {*descendants(schedule)} - {*servers(work.home)}
                with suppress(IndexError, ProcessLookupError):
                    os.kill(chance.choice(sorted(others)), signal.SIGKILL)
                    counts["scheduled"] += 1

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield counts
    finally:
        over.set()
        thread.join()


def megabytes_of(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def named(home: Path) -> list[str]:
    """The commands that go on and name a home."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            found.append((entry / "cmdline").read_bytes().decode(errors="replace"))
    return [command for command in found if str(home) in command]


def num_runs(work: RunContext) -> int:
    """Those that were finished."""
    return work.ledger.query("SELECT count(*) FROM runs WHERE outcome = 'ok'").rows[0][0]


Figures = tuple[dict[str, Used], dict[str, float]]


def figures(work: RunContext, counts: list[int]) -> dict[str, float]:
    """What was done, and what it takes on the disk."""
    prefect, store = (megabytes_of(work.home / name) for name in ("prefect", ""))
    index = sum(path.stat().st_size for path in work.home.glob("ledger*.duckdb")) / 1e6
    return {
        "requests": sum(counts),
        "runs": num_runs(work),
        "MB of the store": store - prefect - index,
        "MB of its index": index,
        "MB of Prefect": prefect,
    }


def ask_for_more(folder: Path, number: int) -> None:
    """Other test rows, so that a run has something to do."""
    lines = [json.dumps(row) + "\n" for row in letters("attention", 9 + number, 2)]
    (folder / "new").write_text("".join(lines))
    (folder / "new").replace(folder / "attention.test.jsonl")


def stays_what_it_was(before: Figures, after: Figures) -> None:
    """What each process has, and what one more run takes on the disk."""
    for name, now in after[0].items():
        log.warning("%s: %s, then %s", name, before[0][name], now)
    log.warning("%s, then %s", before[1], after[1])
    for name, now in after[0].items():
        assert now.is_bounded_by(before[0][name]), name
    more = {name: now - before[1][name] for name, now in after[1].items()}
    assert min(more["requests"], more["runs"]) > 0
    for name, megabytes in MOST.items():
        assert more[name] < megabytes * (more["runs"] + 1), name


def nothing_is_left(work: RunContext, tmp: Path) -> None:
    """The next run finishes, closes and sweeps what was stopped in its middle."""
    for words in (("run", work.path), ("verify",)):
        last = tmp.with_name("last.log")
        one = start("pipelines.cli", *words, "--home", work.home, log_file=last, tmp=tmp)
        assert one.wait() == 0, last.read_text()
    assert work.ledger.unended_runs() == []
    ends = work.ledger.query("SELECT outcome, count(*) FROM runs GROUP BY ALL ORDER BY ALL").rows
    log.warning("runs, by how they ended: %s", ends)
    with closing(sqlite3.connect(work.home / "prefect" / "prefect.db")) as database:
        for table in ("flow_run", "task_run"):
            begun = f"SELECT count(*) FROM {table} WHERE state_type IN {BEGUN}"  # noqa: S608
            assert database.execute(begun).fetchone() == (0,), table
    places = (tmp, *(work.home / name for name in ("tmp", "runs", "answers", "training")))
    assert [path for place in places for path in place.rglob("*") if path.is_file()] == []


def test_ten_minutes_of_runs_answers_and_kills_leave_nothing_behind(
    world: World, recipe_folder: Path, tmp_path: Path
) -> None:
    """Each run has something new to measure; clients ask, leave, and send what is no question."""
    folder, home, tmp = (tmp_path / name for name in ("recipe", "home", "tmp"))
    shutil.copytree(recipe_folder, folder, symlinks=True)
    base = shutil.copytree(world.base, tmp_path / "base")
    (base / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    tmp.mkdir()
    recipe = folder / "recipe.yaml"
    work = RunContext.open(str(recipe), home)
    work.ledger.ingest()
    pids: dict[str, int] = {}
    logs = {name: tmp_path / f"{name}.log" for name in ("schedule", "server", "reader", "other")}
    with ExitStack() as going:

        def begin(name: str, module: str, *words: object) -> None:
            one = started(module, *words, log_file=logs[name], tmp=tmp)
            pids[name] = going.enter_context(one).pid

        plan = ("schedule", recipe, "--home", home, "--cron", "* * * * *")
        begin("schedule", "pipelines.cli", *plan)
        serve = ("chat-server", world.checkpoint, "--base", base, "--port", 0, "--name", "soak")
        begin("server", "pipelines.cli", *serve)
        said(logs["schedule"], "runs at")
        for reader in ("reader", "other"):
            begin(reader, "tests.store.worker", "read", home, 60 * MINUTES + 2 * START_SECONDS)
        url = said(logs["server"], r"serving soak at (\S+),")[1]
        (pids["prefect"],) = servers(home)
        kills = going.enter_context(killed(work, pids["schedule"], tmp))
        counts = going.enter_context(asked(f"{url}/chat/completions"))

        began, number, before = time.monotonic(), 0, None
        while time.monotonic() - began < 60 * MINUTES:
            time.sleep(1)
            if num_runs(work) > number:
                number += 1
                ask_for_more(folder, number)
            if before is None and number and time.monotonic() - began > 20 * MINUTES:
                before = Used.by_all(pids), figures(work, counts)
        after = Used.by_all(pids), figures(work, counts)
    assert before is not None
    log.warning("killed: %s", kills)
    assert sum(kills.values()) > 0
    stays_what_it_was(before, after)
    for reader in ("reader", "other"):
        lines = logs[reader].read_text().splitlines()[:-1]
        counted = [int(line.split()[0]) for line in lines]
        assert len(counted) > MINUTES
        assert counted == sorted(counted)
    wait_until(lambda: not named(home), seconds=60)
    ask_for_more(folder, number + 1)
    nothing_is_left(work, tmp)
