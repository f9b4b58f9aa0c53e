"""What the store costs: `python -m tests.benchmarks.store [--scores N] [--artifacts N]`.

Tables in Markdown. The first has many processes that write and ingest at once, and readers; the
others a home of millions of scores, as `store_home` makes it, its rebuild and what questions take.
"""

import argparse
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import duckdb
import numpy as np

from store.ledger import Ledger
from store.query import Limits, examples
from tests.benchmarks.store_home import Size, make_home
from tests.store.conftest import BASE, Shelf, adapter

ASKED = {
    "a model's places": "FROM leaderboard WHERE subject_id = '{router}'",
    "a task's best hundred": "FROM leaderboard WHERE task = 'task-3' ORDER BY place LIMIT 100",
    "everything beside a model": "FROM standings WHERE router_id = '{router}'",
    "what a model is made of": "FROM lineage WHERE artifact_id = '{router}'",
    "what an adapter is in": "FROM lineage WHERE artifact_id = '{adapter}'",
    "a recipe's regressions": "FROM regressions WHERE recipe_name = 'recipe-3'",
    "a name's adapters": "FROM adapters WHERE name = 'task-3'",
    "how a model routes": "FROM routing WHERE router_id = '{router}'",
    "what ran": "FROM runs LIMIT 100",
    "what is published": "FROM publications LIMIT 100",
    "what failed": "FROM failures LIMIT 100",
}
LIMITS = Limits(seconds=300.0, memory_bytes=4 << 30)


def table(title: str, rows: dict[str, str]) -> None:
    print(f"\n| {title} | |\n|-|-|")  # noqa: T201
    for name, value in rows.items():
        print(f"| {name} | {value} |")  # noqa: T201


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.store.worker", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def spread(seconds: list[float]) -> str:
    if not seconds:
        return "none"
    p50, p99, worst = np.quantile(seconds, [0.5, 0.99, 1.0])
    return f"p50 {p50:.3f} s, p99 {p99:.3f} s, worst {worst:.3f} s"


def contention(home: Path, num_writers: int, num_records: int) -> None:
    Ledger(home).ingest()
    began = time.monotonic()
    writers = [
        start("write", home, 1 + number * num_records, num_records) for number in range(num_writers)
    ]
    readers = [start("read", home, 3600) for _ in range(2)]
    lines = [line for writer in writers for line in writer.communicate()[0].splitlines()]
    wall = time.monotonic() - began
    for reader in readers:
        reader.terminate()
    reads = [
        float(line.split()[1])
        for reader in readers
        for line in reader.communicate()[0].splitlines()
        if line.count(".") == 1 and line.count(" ") == 1
    ]
    fields = [line.split(maxsplit=2) for line in lines]
    Ledger(home).ingest()
    ((held,),) = Ledger(home).query("SELECT count(*) FROM artifacts").rows
    table(
        f"{num_writers} writers of {num_records} records, each ingesting; 2 readers",
        {
            "records in the index": f"{held:,} of {num_writers * num_records:,}",
            "ingests that had to wait": str(sum(len(line) > 2 for line in fields)),
            "all of it": f"{wall:.1f} s, {held / wall:.0f} records/s",
            "record + ingest": spread([float(line[1]) for line in fields]),
            "a reader's question": spread(reads),
        },
    )


def scale(home: Path, size: Size) -> None:
    began = time.monotonic()
    num_records = make_home(home, size)
    made, began = time.monotonic() - began, time.monotonic()
    ledger = Ledger(home)
    outcome = ledger.ingest(deadline_seconds=1)
    wall = time.monotonic() - began
    if outcome.num_records != num_records:
        raise SystemExit(f"{outcome} of {num_records}")
    packed = sum(path.stat().st_size for path in ledger.records.segments.root.glob("*.parquet"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    rows = {
        "records, packed": f"{num_records:,}, {packed / 2**30:.2f} GiB, written in {made:.0f} s",
        "rebuild from records alone": f"{wall:.0f} s, {num_records / wall:,.0f} records/s",
        "the most memory that it took": f"{peak:.1f} GiB",
        "size of the index": f"{ledger.index.live.stat().st_size / 2**30:.2f} GiB",
    }
    shelf = Shelf(home)
    shelf.make(adapter(2))
    rows["ingest of one more artifact"] = spent(ledger.ingest)
    shelf.measure(BASE, "task-3", 0.5)
    rows["ingest of one more score"] = spent(ledger.ingest)
    fresh = Ledger(home)
    rows["first lookup of a process"] = spent(lambda: fresh.weights_of(BASE.id))
    rows["each later lookup"] = spent(lambda: fresh.weights_of(BASE.id))
    table(f"{size.num_scores:,} scores, {size.num_artifacts:,} artifacts", rows)
    questions(ledger)


def questions(ledger: Ledger) -> None:
    """What every question of the cookbook takes, and what people ask of each view."""
    ((model,),) = ledger.query("SELECT max(id) FROM artifacts WHERE kind = 'router'").rows
    ((one,),) = ledger.query("SELECT max(adapter_id) FROM experts").rows
    rows = {
        name: took(ledger, sql.format(router=model, adapter=one)) for name, sql in ASKED.items()
    }
    rows |= {title: took(ledger, sql) for title, sql in examples()}
    table("Questions, median of 3, connection and all", rows)


def took(ledger: Ledger, sql: str) -> str:
    seconds = []
    for _ in range(3):
        began = time.monotonic()
        answer = ledger.query(sql, limits=LIMITS)
        seconds.append(time.monotonic() - began)
    return f"{median(seconds):.2f} s, {len(answer.rows):,} rows"


def spent(call: Callable[[], object]) -> str:
    began = time.monotonic()
    call()
    return f"{time.monotonic() - began:.2f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scores", type=int, default=1_000_000)
    parser.add_argument("--artifacts", type=int, default=10_000)
    parser.add_argument("--writers", default="8x250", help="Such as 8x250; 0x0 for none.")
    parser.add_argument("--folder", type=Path, help="Where there is room: 6 GB for ten million.")
    asked = parser.parse_args()
    size = Size(asked.artifacts, asked.scores)
    if asked.scores and not size.is_enough:
        parser.error("--artifacts takes 25 or more, and --scores a few for each, or 0 for none")
    print(  # noqa: T201
        f"DuckDB {duckdb.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores;"
        f" load when it began {os.getloadavg()[0]:.1f}"
    )
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        num_writers, num_records = map(int, asked.writers.split("x"))
        if num_writers:
            contention(Path(folder, "many"), num_writers, num_records)
        if asked.scores:
            scale(Path(folder, "large"), size)
    print(f"\nLoad when it ended: {os.getloadavg()[0]:.1f}")  # noqa: T201


if __name__ == "__main__":
    main()
