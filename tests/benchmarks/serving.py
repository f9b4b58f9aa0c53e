"""A fused model in vLLM beside the bare base, and beside vLLM's own adapters named by hand.

    python -m tests.benchmarks.serving CHECKPOINT BASE FOLDER [--rows 8] [--rounds 6] [--tasks DIR]
        [--dtype bfloat16] [--without-adapters]

CHECKPOINT has gates that vLLM can serve, and experts whose tests lie in DIR (the quickstart's, by
default). BASE is its base as safetensors, FOLDER is one for the files that are written meanwhile.
With `--rounds 0` nothing is timed. All of it in one dtype, float32 by default, over HTTP, greedy,
8 requests at a time. Servers stand side by side and take turns, so that a busy moment meets all
of them. `--without-adapters` leaves vLLM's own out, whose server has the base in memory again.

    parity      tokens and scores of chat requests against `model.generate`, one prompt at a time;
                with the prefix cache, without it, and with prefills in chunks; gates that wait
                for whole questions have none of the three
    decoding    eight requests of 64 tokens each; the ratio to the bare base in the same round, by
                the clock and by the time that the server's processes computed
    prefill     eight requests for one token each, whose prompts have some 500 tokens
    memory      of a server's processes, proportional set size
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch

import meteora
from meteora.base import loading
from meteora.base.chat_template import encode_prompt
from meteora.checkpoint.export import export_expert
from meteora.checkpoint.manifest import read_manifest
from meteora.serving.served_folder import export_for_vllm
from pipelines.data.rows import Row
from pipelines.scoring.metrics import exact_match
from tests.benchmarks.bigbench import SHIPPED, read
from tests.benchmarks.timing import machine, table

AT_ONCE = 8
LONGEST = 32
"""Tokens of an answer that is compared."""
TIMED = 64
"""Tokens of an answer that is timed."""
LONG = 1_600
"""Characters of a long prompt."""
START_SECONDS = 400
COMMON = ("--max-model-len", "2048", "--max-num-seqs", str(AT_ONCE))
COMMON += ("--kv-cache-memory-bytes", str(1 << 30))
ALWAYS = {"temperature": 0, "return_token_ids": True}
VARIANTS: dict[str, tuple[str, ...]] = {
    "meteora": (),
    "meteora, no prefix cache": ("--no-enable-prefix-caching",),
    "meteora, chunks of 32 tokens": ("--max-num-batched-tokens", "32"),
}
BARE, LORA = "bare base", "vLLM's adapters, named by hand"


class Server:
    """`vllm serve` in processes of its own."""

    def __init__(self, folder: Path, port: int, words: Iterable[str], log: Path) -> None:
        self.url = f"http://127.0.0.1:{port}"
        # the command `vllm serve` asks for a distribution named vllm, which the CPU build is not
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder]
        command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "model"]
        self._log = log.open("w")
        self.process = subprocess.Popen(
            [*map(str, command), *COMMON, *words],
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"VLLM_NO_USAGE_STATS": "1", "VLLM_CACHE_ROOT": str(log.parent)},
        )
        self.client = httpx.Client(base_url=self.url, timeout=600)

    def wait(self) -> None:
        """Until it answers; raises where it ends before."""
        ends = time.monotonic() + START_SECONDS
        while time.monotonic() < ends:
            if self.process.poll() is not None:
                raise SystemExit(f"a server ended; see {self._log.name}")
            try:
                if self.client.get("/health").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(1)
        raise SystemExit(f"a server did not start in {START_SECONDS} s; see {self._log.name}")

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)
        self.client.close()
        self._log.close()

    def chat(self, prompt: str, model: str = "model", **asked: object) -> dict[str, Any]:
        body = {"model": model, "messages": [{"role": "user", "content": prompt}], **asked}
        answer = self.client.post("/v1/chat/completions", json=body | ALWAYS)
        answer.raise_for_status()
        (choice,) = answer.json()["choices"]
        return choice

    def chat_all(self, asked: Sequence[tuple[str, str]], **more: object) -> list[dict[str, Any]]:
        """Answers to (prompt, model) pairs, `AT_ONCE` of them at a time."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(lambda pair: self.chat(*pair, **more), asked))

    def pids(self) -> list[int]:
        """Of its processes."""
        pids = [self.process.pid]
        for pid in pids:  # which grows meanwhile
            children = Path(f"/proc/{pid}/task").glob("*/children")
            pids += [int(child) for path in children for child in path.read_text().split()]
        return pids

    def megabytes(self) -> float:
        """Of its processes together; pages that they share count once."""
        rollups = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in self.pids()]
        lines = [line.split() for text in rollups for line in text.splitlines()]
        return sum(int(words[1]) for words in lines if words[0] == "Pss:") / 1e3

    def computed(self) -> float:
        """Seconds that its processes computed, which others on the machine change little."""
        stats = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2] for pid in self.pids()]
        ticks = sum(int(tick) for stat in stats for tick in stat.split()[11:13])
        return ticks / os.sysconf("SC_CLK_TCK")


@contextmanager
def serve(folder: Path, words: Iterable[str], logs: Path, port: int) -> Generator[Server]:
    server = Server(folder, port, words, logs / f"vllm-{port}.log")
    try:
        server.wait()
        yield server
    finally:
        server.stop()


def ours(checkpoint: Path, base: Path, prompts: Sequence[str], dtype: str) -> list[list[int]]:
    """Token ids of `model.generate`, one prompt at a time, without the end token."""
    loaded: Any = meteora.load(checkpoint, base_folder=base, dtype=dtype)
    model, tokenizer = loaded
    answers = []
    for prompt in prompts:
        ids = torch.tensor([encode_prompt(tokenizer, prompt)])
        out = model.generate(ids, max_new_tokens=LONGEST, do_sample=False)[0, ids.shape[1] :]
        answers.append([i for i in out.tolist() if i != tokenizer.eos_token_id])
    return answers


def parity(
    server: Server, rows: Sequence[tuple[str, Row]], expected: Sequence[list[int]], eos: int
) -> tuple[float, int, float]:
    """The share of equal tokens, the number of equal answers, and the mean exact match."""
    found = server.chat_all([(row.prompt, "model") for _, row in rows], max_tokens=LONGEST)
    equal = total = same = 0
    for choice, right in zip(found, expected, strict=True):
        ids = [i for i in choice["token_ids"] if i != eos]
        total += max(len(ids), len(right))
        equal += sum(a == b for a, b in zip(ids, right, strict=False))
        same += ids == right
    texts = [choice["message"]["content"] or "" for choice in found]
    scores = [exact_match(text, row) for text, (_, row) in zip(texts, rows, strict=True)]
    return equal / total, same, sum(scores) / len(scores)


def long_prompts(rows: Sequence[tuple[str, Row]]) -> Generator[tuple[str, str]]:
    """Pairs of a task and a prompt of `LONG` characters, no two of which begin with the same."""
    for number in itertools.count():
        task, _ = rows[number % len(rows)]
        texts = [row.prompt for _, row in (*rows[number % len(rows) :], *rows)]
        yield task, " ".join([f"{number}:", *texts, *texts * (LONG // len(texts[0]))])[:LONG]


def in_turns(
    servers: dict[str, Server],
    prompts: Iterator[tuple[str, str]],
    rounds: int,
    max_tokens: int,
) -> dict[str, list[tuple[float, float]]]:
    """Seconds by the clock and seconds computed, by round; servers are asked the same in turn."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in servers}
    for place in range(rounds + 1):
        asked = list(itertools.islice(prompts, AT_ONCE))
        for name, server in servers.items():
            pairs = [(prompt, task if name == LORA else "model") for task, prompt in asked]
            began, computed = time.perf_counter(), server.computed()
            server.chat_all(pairs, max_tokens=max_tokens, ignore_eos=True)
            if place:  # the first round warms up
                taken = time.perf_counter() - began, server.computed() - computed
                found[name].append(taken)
    return found


def write_times(what: str, times: dict[str, list[tuple[float, float]]], tokens: int) -> None:
    """Write a line a server: medians over rounds; ratios are of the same round.

    Args:
        tokens: of a round, for the tokens a second
    """
    lines = []
    for name, found in times.items():
        pairs = list(zip(times[BARE], found, strict=True))
        speed = statistics.median(tokens / clock for clock, _ in found)
        by_clock = [bare[0] / own[0] for bare, own in pairs]
        by_work = [bare[1] / own[1] for bare, own in pairs]
        ratios = [
            f"{statistics.median(r):.3f} ({min(r):.2f} to {max(r):.2f})"
            for r in (by_clock, by_work)
        ]
        lines.append((name, f"{speed:.1f}", *ratios))
    head = what, "tokens a second", "to the bare base, by the clock", "by CPU time"
    sys.stdout.write("\n" + table(head, lines))


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("base", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=8, help="of each expert's test")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--tasks", type=Path, default=SHIPPED / "tasks")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--without-adapters", action="store_true")
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=VARIANTS)
    return parser.parse_args()


def main() -> None:
    args = read_arguments()
    names = read_manifest(args.checkpoint).names
    args.folder.mkdir(parents=True, exist_ok=True)
    served = args.folder / "served"
    needed = export_for_vllm(args.checkpoint, args.base, served).split()
    for name in names:
        export_expert(args.checkpoint, name, args.folder / "adapters" / name)
    tests = {name: read(args.tasks / name / "test.jsonl")[: args.rows] for name in names}
    rows = [
        (name, Row(tests[name][i]["prompt"], tests[name][i]["response"]))
        for i in range(args.rows)
        for name in names
    ]
    expected = ours(args.checkpoint, args.base, [row.prompt for _, row in rows], args.dtype)
    tokenizer = loading.load_tokenizer(args.base)
    eos = tokenizer.eos_token_id
    texts = [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in expected]
    score = statistics.mean(exact_match(t, row) for t, (_, row) in zip(texts, rows, strict=True))
    dtype = ["--dtype", args.dtype]
    lines: list[Sequence[object]] = [("model.generate", "", len(rows), f"{score:.4f}")]
    for port, variant in enumerate(args.variants, 8101):
        if variant == "meteora" or needed:  # which leaves one way to compute a prompt
            continue
        with serve(served, (*VARIANTS[variant], *dtype), args.folder, port) as server:
            share, same, score = parity(server, rows, expected, eos)
            lines.append((variant, f"{share:.4%}", same, f"{score:.4f}"))
    lora = ["--enable-lora", "--max-loras", str(len(names)), "--max-lora-rank", "16"]
    lora += ["--lora-modules", *(f"{name}={args.folder / 'adapters' / name}" for name in names)]
    with ExitStack() as stack:
        needed += dtype
        lora += needed  # all with the options that the gates need
        asked = {"meteora": (served, needed), BARE: (args.base, needed), LORA: (args.base, lora)}
        if args.without_adapters or not args.rounds:
            del asked[LORA]
        if not args.rounds:
            del asked[BARE]
        servers = {
            name: stack.enter_context(serve(folder, words, args.folder, port))
            for port, (name, (folder, words)) in enumerate(asked.items(), 8111)
        }
        share, same, score = parity(servers["meteora"], rows, expected, eos)
        lines.insert(1, ("meteora", f"{share:.4%}", same, f"{score:.4f}"))
        short = ((task, row.prompt) for task, row in itertools.cycle(rows))
        decoding = in_turns(servers, short, args.rounds, TIMED)
        prefill = in_turns(servers, long_prompts(rows), args.rounds, 1)
        memory = {name: server.megabytes() for name, server in servers.items()}
    sys.stdout.write(
        table(("server", "equal tokens", f"equal answers of {len(rows)}", "exact match"), lines)
    )
    if args.rounds:
        long = [prompt for _, prompt in itertools.islice(long_prompts(rows), AT_ONCE)]
        num_long = sum(len(encode_prompt(tokenizer, prompt)) for prompt in long)
        write_times("decoding", decoding, AT_ONCE * TIMED)
        write_times(f"prefill of {num_long // AT_ONCE} tokens", prefill, num_long)
    facts: dict[str, object] = {**machine(), "load": os.getloadavg()}
    facts |= {f"MB of {name}": f"{size:,.0f}" for name, size in memory.items()}
    facts["times"] = json.dumps([decoding, prefill])
    sys.stdout.write("".join(f"- {name}: {value}\n" for name, value in facts.items()))


if __name__ == "__main__":
    main()
