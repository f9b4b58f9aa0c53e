"""A child process answers, or it ends: at its deadline, with its parent, with all it started."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipelines.processes.child import (
    ChildDiedError,
    ChildError,
    ChildProcess,
    ChildTimeoutError,
    answers,
)
from tests.pipelines.process_tree import ends

ROOT = Path(__file__).parents[3]
MODULE = "tests.pipelines.processes.child"


def child(*, pickled: bool = False, quiet: bool = True) -> ChildProcess:
    environment = {"PYTHONPATH": str(ROOT), "PICKLED": str(int(pickled))}
    return ChildProcess(MODULE, pickled=pickled, quiet=quiet, environment=environment)


def exists(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize("pickled", [False, True], ids=["json", "pickled"])
def test_a_request_is_answered_and_what_comes_before_is_passed_on(pickled: bool) -> None:
    seen: list[tuple[int, int]] = []
    listeners = {"progress": lambda *step: seen.append(step)}
    with child(pickled=pickled) as process:
        for request in ("one", ["two"]):
            answer = process.ask(request, deadline_seconds=60, listeners=listeners)
            assert answer == request
        assert process.ask("three", deadline_seconds=60) == "three"  # nobody listens
        pid = process.pid
    assert seen == [(1, 2), (1, 2)]
    assert not exists(pid)


def test_an_error_is_described_in_json_and_raised_as_it_is_where_it_is_pickled() -> None:
    with child() as process, pytest.raises(ChildError) as described:
        process.ask("refuse", deadline_seconds=60)
    assert described.value.args == ({"text": "no"},)
    with child(pickled=True) as process, pytest.raises(ValueError, match="no"):
        process.ask("refuse", deadline_seconds=60)


def test_at_the_deadline_it_ends_with_all_that_it_started() -> None:
    started: list[int] = []
    process = child()
    begin = time.monotonic()
    with pytest.raises(ChildTimeoutError, match="longer than its deadline of 3 s"):
        process.ask("hang", deadline_seconds=3, listeners={"started": started.append})
    assert time.monotonic() - begin < 30
    assert not exists(process.pid)
    assert all(ends(pid) for pid in started)
    process.close()


def test_ctrl_c_ends_it() -> None:
    started: list[int] = []

    def interrupt(pid: int) -> None:
        started.append(pid)
        reader = threading.main_thread().ident  # another thread's signal wakes no read
        threading.Timer(0.2, signal.pthread_kill, (reader, signal.SIGINT)).start()

    with child() as process, pytest.raises(KeyboardInterrupt):
        process.ask("hang", deadline_seconds=60, listeners={"started": interrupt})
    assert not exists(process.pid)
    assert ends(started[0])


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        ("die", "ended with code 1 and without an answer: no disk"),
        ("be killed", "ended by SIGKILL; that is mostly for want of memory"),
        ("babble", "sent no message"),
    ],
)
def test_how_it_died_is_said(request_: str, text: str) -> None:
    process = child()
    with pytest.raises(ChildDiedError, match=text):
        process.ask(request_, deadline_seconds=60)
    process.close()
    assert not exists(process.pid)
    with pytest.raises(ChildDiedError, match="ended"):
        process.ask("one", deadline_seconds=60)


def test_several_answer_in_order_and_the_first_death_is_raised() -> None:
    with child() as one, child() as other:
        for process, request in ((one, "one"), (other, "other")):
            process.send(request)
        assert answers([one, other]) == ["one", "other"]
        one.send("hang")
        other.send("die")
        with pytest.raises(ChildDiedError, match="no disk"):
            answers([one, other])


def test_a_killed_parent_leaves_no_child() -> None:
    code = (
        "from tests.pipelines.processes.test_child import child\n"
        "with child() as process:\n"
        "    show = lambda pid: print(process.pid, pid, flush=True)\n"
        "    process.ask('hang', deadline_seconds=600, listeners={'started': show})\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True,
    ) as asking:  # fmt: skip
        assert asking.stdout is not None
        pids = list(map(int, asking.stdout.readline().split()))
        assert all(map(exists, pids))
        asking.kill()
    assert len(pids) == 2
    assert all(ends(pid) for pid in pids)


def test_a_file_where_a_person_works_takes_the_place_of_no_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('this ran')")
    monkeypatch.chdir(tmp_path)
    with child() as process:
        found = process.ask("where is json", deadline_seconds=60)
    assert Path(found).parent != tmp_path
