"""What the store costs: `python -m tests.benchmarks.store [--records N] [--writers 8x250]`.

Two tables, in Markdown. The first has many processes that write and ingest at once, and readers;
the second a home with N scores on 1,000 models, written without fsync to save the benchmark's time.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import quantiles

from store.ledger import Ledger
from store.query import Limits
from store.records import Record
from tests.store.conftest import BASE, Shelf, adapter, benchmark, fused, router, score

VIEWS = ("leaderboard", "lineage", "adapters", "runs", "routing", "publications", "regressions")
NUM_MODELS = 1000


def table(title: str, rows: dict[str, str]) -> None:
    print(f"\n| {title} | |\n|-|-|")  # noqa: T201
    for name, value in rows.items():
        print(f"| {name} | {value} |")  # noqa: T201


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.store.worker", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def spread(seconds: list[float]) -> str:
    cuts = quantiles(seconds, n=100)
    return f"p50 {cuts[49]:.3f} s, p99 {cuts[98]:.3f} s, worst {max(seconds):.3f} s"


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


def fill(home: Path, num_scores: int) -> None:
    """A home with many scores, as `Ledger` would have written it."""
    shelf = Shelf(home)
    shelf.make(BASE)
    shelf.make(adapter(1))
    shelf.make(stack := fused(adapter(1)))
    blob = shelf.ledger.blobs.put_bytes(b"outputs")
    models = [router(stack, seed=seed) for seed in range(NUM_MODELS)]
    for model in models:
        body = {
            "id": model.id,
            "kind": "router",
            "spec": model.to_dict(),
            "parents": list(model.parents),
            "weights_sha256": "",
            "built": None,
        }
        write(home, Record("artifact", model.id, body, "r1", "2026-01-01T00:00:00.000000Z"))
    for number in range(num_scores):
        subject = models[number % NUM_MODELS].id
        spec = replace(benchmark(subject, f"task-{number // NUM_MODELS}"), seed=0)
        body = {"id": spec.id, **score(spec, 0.5, blob).to_dict()}
        write(home, Record("score", spec.id, body, "r1", "2026-01-01T00:00:00.000000Z", (blob,)))


def write(home: Path, record: Record) -> None:
    data = record.to_bytes()
    path = Ledger(home).records.path_of(hashlib.sha256(data).hexdigest())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def scale(home: Path, num_scores: int) -> None:
    fill(home, num_scores)
    rows = {}
    ledger = Ledger(home)
    began = time.monotonic()
    count = ledger.ingest(deadline_seconds=1).num_records
    wall = time.monotonic() - began
    rows["rebuild from records alone"] = f"{wall:.1f} s, {count / wall:,.0f} records/s"
    rows["size of the index"] = f"{ledger.index.live.stat().st_size / 2**20:.0f} MiB"
    Shelf(home).make(adapter(2))
    began = time.monotonic()
    ledger.ingest()
    rows["ingest of one more record"] = f"{time.monotonic() - began:.2f} s"
    began = time.monotonic()
    fresh = Ledger(home)
    fresh.weights_of(BASE.id)
    rows["first lookup of a process"] = f"{time.monotonic() - began:.2f} s"
    began = time.monotonic()
    fresh.weights_of(BASE.id)
    rows["each later lookup"] = f"{time.monotonic() - began:.2f} s"
    for view in VIEWS:
        began = time.monotonic()
        ledger.query(f"SELECT count(*), max(hash(v)) FROM {view} v", limits=Limits(seconds=300))  # noqa: S608
        rows[f"`FROM {view}`, every row"] = f"{time.monotonic() - began:.2f} s"
    table(f"{num_scores:,} scores of {NUM_MODELS:,} models", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--writers", default="8x250")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        num_writers, num_records = map(int, asked.writers.split("x"))
        contention(Path(folder, "many"), num_writers, num_records)
        scale(Path(folder, "large"), asked.records)


if __name__ == "__main__":
    main()
