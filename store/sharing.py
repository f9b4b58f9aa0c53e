"""Share records and blobs between homes, through a common storage.

    record ─▶ this disk (now it is safe) ─▶ its blobs, then the record, to the storage
    ingest ─▶ upload what is missing there, download what is missing here, then the index

Names are hashes of bytes, and files never change. So sharing is the union of two sets. Records are
downloaded with every ingest, blobs when they are first used. If the storage does not answer,
records wait in the home, and no run fails.
"""

import json
import logging
import platform
import re
import secrets
import time
import tomllib
from collections.abc import Collection, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from store.blobs import Blobs
from store.errors import DamagedError, MissingBlobError, StoreError, UnreachableError
from store.files import write_whole
from store.garbage import freed
from store.records import Record, Records, is_record
from store.remote import Remote
from store.segments import SUFFIX

logger = logging.getLogger(__name__)

SETTING = "store.toml"
KEYS = {"remote", "name"}
PAUSE_SECONDS = 60.0
"""If the storage does not answer, recording does not try it again for this long or more."""
PATIENCE = 10
"""Nor for this many times as long as it took to fail: a storage may let every request wait."""
MOST_PAUSE_SECONDS = 600.0
"""The longest such pause."""
AT_ONCE = 16
"""The number of objects that are transferred in parallel."""
UNSHARED = (DamagedError, MissingBlobError)
"""Faults of one record or of its blobs, which do not keep others from being shared."""
RECORD = re.compile(r"records/([0-9a-f]{2})/([0-9a-f]{62})\.json")
SEGMENT = re.compile(r"records/packed/([0-9a-f]{64}\.parquet)")


@dataclass(frozen=True)
class Setting:
    """The contents of `store.toml`."""

    remote: str = ""
    """Such as `s3://bucket/prefix`; empty if the home does not share."""
    name: str = ""
    """The name of this home among those that share. A home closes only its own killed runs."""

    @classmethod
    def load(cls, home: Path) -> Self:
        """Read the file; without one, the home does not share; a damaged one is a `StoreError`."""
        path = home / SETTING
        try:
            fields = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return cls()
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise StoreError(f"{path} is not TOML: {error}") from None
        if fields.keys() != KEYS or not all(isinstance(field, str) for field in fields.values()):
            raise StoreError(
                f"{path} has {', '.join(sorted(fields)) or 'nothing'}; it needs the texts"
                f" {' and '.join(sorted(KEYS))}, as `meteora store share` writes them"
            )
        return cls(**fields)


def connect(home: Path, url: str) -> Setting:
    """Make a home share its records and blobs at `url` from now on.

    It keeps a name that it has, by which its own runs are known. A copy of another machine's home
    gets a new one.

    Raises:
        StoreError: the storage cannot be used for sharing.
    """
    Remote(url).prove()
    known, node = Setting.load(home).name, platform.node()
    is_own = known.rpartition("-")[0] == node
    setting = Setting(url, known if is_own else f"{node}-{secrets.token_hex(2)}")
    remote, name = (json.dumps(text, ensure_ascii=False) for text in (setting.remote, setting.name))
    text = f"remote = {remote}\nname = {name}\n"
    write_whole(home / SETTING, text.encode(), root=home)
    return setting


class Sharing:
    """Uploads and downloads between a home and its shared storage."""

    def __init__(self, records: Records, blobs: Blobs, remote: Remote) -> None:
        self.remote = remote
        self._records = records
        self._blobs = blobs
        self._away_until = 0.0

    def push(self, sha256: str) -> None:
        """Upload a record that was just written. Never raises: `sync` uploads it later."""
        if time.monotonic() < self._away_until:
            return
        try:
            with self._pausing():
                self._push_record(sha256)
        except StoreError as error:
            logger.warning("%s", error)

    def sync(self, *, restore: bool = False) -> None:
        """Download all records that are missing here, and upload those that are missing there.

        Args:
            restore: also upload the blobs of this home that the storage has lost. All records are
                read if there are some.

        Raises:
            UnreachableError: the storage does not answer, or refuses.
        """
        with self._pausing():
            self._exchange()
            if restore:
                self._restore()

    @contextmanager
    def _pausing(self) -> Generator[None]:
        """After an error `push` does not try for a while."""
        began = time.monotonic()
        try:
            yield
        except UnreachableError:
            now = time.monotonic()
            pause = min(PATIENCE * (now - began), MOST_PAUSE_SECONDS)
            self._away_until = now + max(PAUSE_SECONDS, pause)
            raise
        self._away_until = 0.0

    def _exchange(self) -> None:
        loose, segments = self._listed()
        for name in sorted(segments - self._records.segments.names()):
            self._pull_segment(name)
        missing = loose.keys() - self._records.loose()
        missing -= self._records.segments.holding(missing)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for _ in pool.map(self._pull_record, sorted(missing)):
                pass
            waiting = self._records.loose() - loose.keys()
            for _ in pool.map(self._push_record, sorted(waiting)):
                pass
        for name in sorted(self._records.segments.names() - segments):
            self._blobs.survey()
            try:
                self._push_blobs(self._records.segments.blobs(name))
            except UNSHARED as error:
                logger.warning("not shared: %s", error)
                continue
            self.remote.put(f"records/packed/{name}", self._records.segments.path_of(name))

    def _restore(self) -> None:
        """Upload blobs that records name, and that are here and not there."""
        lost = set(self._blobs) - self._blobs.survey()
        if not lost:
            return
        texts, _ = self._records.read_all(self._records.loose())
        named = {sha256 for text in texts.values() for sha256 in Record.from_bytes(text).blobs}
        for name in self._records.segments.names():
            try:
                named |= self._records.segments.blobs(name)
            except StoreError as error:
                logger.warning("not shared: %s", error)
        for sha256 in sorted(lost & named):
            try:
                self._blobs.push(sha256)
            except UNSHARED as error:
                logger.warning("not shared: %s", error)

    def prune(self) -> None:
        """Remove loose records from the storage if its segments hold them, too."""
        loose, segments = self._listed()
        for segment in sorted(segments & self._records.segments.names()):
            if packed := self._records.segments.holding(loose, [segment]):
                self._records.segments.check(segment)
                self.remote.remove([loose[sha256] for sha256 in packed])

    def _listed(self) -> tuple[dict[str, str], set[str]]:
        """The objects of loose records on the storage by SHA-256, and the names of segments there.

        Loose records are listed first, so that a record that is being packed is in one of the two.
        """
        found = map(RECORD.fullmatch, self.remote.names("records"))
        loose = {one[1] + one[2]: one[0] for one in found if one}
        found = map(SEGMENT.fullmatch, self.remote.names("records/packed"))
        return loose, {one[1] for one in found if one}

    def _pull_segment(self, name: str) -> None:
        sha256, records = name.removesuffix(SUFFIX), self._records
        if self.remote.fetch(f"records/packed/{name}", sha256, records.root, records.is_segment):
            records.drop(records.segments.holding(records.loose(), [name]))

    def _pull_record(self, sha256: str) -> None:
        """Download a record, unless another home has just packed it."""
        name = f"records/{sha256[:2]}/{sha256[2:]}.json"
        self.remote.fetch(
            name, sha256, self._records.root, lambda path: is_record(path.read_bytes())
        )

    def _push_record(self, sha256: str) -> None:
        """Upload a record after its blobs, so that those it refers to are there, or were freed."""
        try:
            record = self._records.read(sha256)
            path = self._records.path_of(sha256)
            self._push_blobs(record.blobs)
            self.remote.put(f"records/{sha256[:2]}/{sha256[2:]}.json", path)
        except FileNotFoundError:
            return  # another process has just packed it
        except UNSHARED as error:
            logger.warning("not shared: %s", error)

    def _push_blobs(self, sha256s: Collection[str]) -> None:
        for sha256 in sha256s:
            try:
                self._blobs.push(sha256)
            except MissingBlobError:
                if sha256 not in freed(self._records.root.parent, self._blobs):
                    raise
