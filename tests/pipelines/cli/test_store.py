"""`meteora store …`: what each command prints, and what it refuses."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from meteora.artifacts import MeteoraError
from pipelines.cli import store
from store.errors import BusyError, StoreError
from store.query import examples
from tests.store.conftest import Shelf, fill


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    shelf = Shelf(tmp_path / "home")
    fill(shelf)
    return shelf


def test_an_index_is_made_again_and_records_are_packed(
    shelf: Shelf, capsys: pytest.CaptureFixture[str]
) -> None:
    num_records = len(shelf.ledger.records.loose())
    store.rebuild(shelf.home)
    store.pack(shelf.home)
    store.rebuild(shelf.home)
    said = [f"{num_records} records {end}" for end in ("in the index", "packed", "in the index")]
    assert capsys.readouterr().out.splitlines() == said


def test_a_damaged_record_is_told_when_the_index_is_made_again(shelf: Shelf) -> None:
    path = shelf.ledger.records.path_of(min(shelf.ledger.records.loose()))
    path.chmod(0o644)
    path.write_bytes(b"{}")
    with pytest.raises(MeteoraError, match="1 record cannot be read; `verify` names them"):
        store.rebuild(shelf.home)
    assert shelf.ledger.query("FROM leaderboard").rows


def test_garbage_is_listed_with_its_bytes_and_stays_without_a_yes(
    shelf: Shelf, capsys: pytest.CaptureFixture[str]
) -> None:
    unused = shelf.ledger.blobs.put_bytes(b"unused")
    os.utime(shelf.ledger.blobs.path_of(unused), (0, 0))
    for yes in (False, True):
        with shelf.ledger.running("nightly"), pytest.raises(BusyError, match="a run is going on"):
            store.gc(yes, shelf.home)
        store.gc(yes, shelf.home)
        assert capsys.readouterr().out == f"6\t{unused}\n"
        assert (unused in shelf.ledger.blobs) is not yes
    store.gc(False, shelf.home)
    assert capsys.readouterr() == ("", "there is nothing to remove\n")


def test_a_checkpoint_alone_is_not_checked_and_the_ways_are_told(shelf: Shelf) -> None:
    with pytest.raises(typer.BadParameter, match="--key; to ask a server, --served; to check the"):
        store.verify(shelf.home, home=shelf.home)
    with pytest.raises(typer.BadParameter, match="--answers, --model and --token-for go with"):
        store.verify(model="mine", home=shelf.home)
    with pytest.raises(typer.BadParameter, match="--answers, --model and --token-for go with"):
        store.verify(answers=3, home=shelf.home)
    with pytest.raises(typer.BadParameter, match="no --key and no --scores"):
        store.verify(shelf.home, served="http://localhost:1", scores=3, home=shelf.home)


def test_example_queries_come_in_each_form(capsys: pytest.CaptureFixture[str]) -> None:
    store.sql(examples=True, as_json=True)
    found = {one["title"]: one["query"] for one in json.loads(capsys.readouterr().out)}
    assert found == dict(examples())
    store.sql(examples=True)
    assert capsys.readouterr().out == "".join(f"/* {t} */\n{q}\n\n" for t, q in examples())


def test_what_is_not_installed_is_not_served_and_gets_no_token(
    shelf: Shelf, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(StoreError, match="has no server here"):
        store.serve("quack:localhost:1", shelf.home)
    assert "TOKEN" not in capfd.readouterr().err


@pytest.mark.parametrize("of_user", [True, False])
def test_only_a_token_that_was_made_for_the_server_is_printed(
    of_user: bool, shelf: Shelf, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("METEORA_TOKEN", "of-the-user" if of_user else "")
    tokens: list[str] = []

    def serve(_snapshot: Path, _address: str, token: str) -> Iterator[str]:
        tokens.append(token)
        yield "http://localhost:1"

    monkeypatch.setattr("store.serving.serve", serve)
    store.serve("quack:localhost:1", shelf.home)
    assert (tokens == ["of-the-user"]) is of_user
    assert (tokens[0] in capfd.readouterr().err) is not of_user


def test_a_home_shares_nothing_where_nothing_can_be_shared(shelf: Shelf) -> None:
    with pytest.raises(StoreError, match="cannot be used as shared storage"):
        store.share("shed://somewhere", shelf.home)
    assert not (shelf.home / "store.toml").exists()
