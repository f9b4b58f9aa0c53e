"""What an expert that joins later knows of prompts of several tasks.

    python -m tests.benchmarks.rejoin RUN BASE CHECKPOINT NAME

RUN is the folder that `tests.benchmarks.lists` left, CHECKPOINT what its recipe came to. NAME goes
out of it and comes back, from 32 plain examples and with lists of them beside, and all three are
asked where the tokens of mixed prompts go. Seconds are of processor time, with one thread.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import meteora
from meteora.base.chat_template import Template, encode_pair
from meteora.checkpoint.manifest import MANIFEST, read_manifest
from meteora.model.fused import expert_names
from meteora.routing.hooks import recorded_logits
from pipelines.admission.candidate import Candidate
from pipelines.admission.checkpoints import FoundCheckpoint
from pipelines.data.composites import compose, fits
from pipelines.data.row_sources import read_rows
from pipelines.stages import edit
from store.ledger import Ledger

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

    from pipelines.data.rows import Row

EXAMPLES, PROMPTS, SINGLES = 32, 56, 4
WAYS: dict[str, dict[str, list[int]]] = {"plain": {}, "with lists": {"composites": [3]}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("run", "base", "checkpoint"):
        parser.add_argument(name, type=Path)
    parser.add_argument("name")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    setattr(edit, "EXAMPLES", EXAMPLES)  # noqa: B010  (the type of a constant is its value)
    names = read_manifest(asked.checkpoint).names
    source = f"jsonl:{asked.run.absolute()}/tasks/{{}}/{{}}.jsonl"
    tests = {name: read_rows(source.format(name, "test"), Path(), 24) for name in names}
    adapter = Candidate(asked.name, str(asked.run / "adapters" / asked.name))
    told(asked.checkpoint, asked.base, tests, asked.name, "all together")
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(Path(folder) / "home")
        without = edit.drop(ledger, asked.checkpoint, asked.name)
        for way, composites in WAYS.items():
            copy = Path(folder) / way
            shutil.copytree(without, copy)
            body = json.loads((copy / MANIFEST).read_text())
            body["gates"].pop("composites", None)
            body["gates"] |= composites
            (copy / MANIFEST).write_text(json.dumps(body))
            started = time.process_time()
            examples = source.format(asked.name, "train")
            grown = edit.add(
                ledger, FoundCheckpoint(copy, asked.base, device="cpu"), adapter, examples
            )
            print(f"{way}: {time.process_time() - started:.0f} s", flush=True)
            told(grown, asked.base, tests, asked.name, way)


@torch.inference_mode()
def told(
    checkpoint: Path, base: Path, tests: Mapping[str, Sequence[Row]], new: str, way: str
) -> None:
    """Shares that go to their own expert: by the vote of all modules, in mixed prompts."""
    model, tokenizer = meteora.load(checkpoint, base_folder=base)
    names = expert_names(model)
    rows = {name: [row for row in own if fits(row)] for name, own in tests.items()}
    right: list[bool] = []
    opened: dict[bool, list[bool]] = {True: [], False: []}
    for composite in compose(rows, 3, PROMPTS, 0):
        ids, owners = composite.encode(tokenizer)
        votes = torch.nn.functional.one_hot(chosen(model, ids), len(names)).sum(0).argmax(-1)
        hits = [names[e] == owner for e, owner in zip(votes.tolist(), owners, strict=True)]
        right += [hit for hit, owner in zip(hits, owners, strict=True) if owner]
        for place in composite.answer_starts(tokenizer):
            opened[owners[place] == new].append(hits[place])
    opening = len(Template.of(tokenizer).opening)
    alone = {
        name: torch.stack(
            [
                (chosen(model, encode_pair(tokenizer, row.prompt, row.response))[:, opening:] == e)
                .float()
                .mean()
                for row in tests[name][:SINGLES]
            ]
        ).mean()
        for e, name in enumerate(names)
        if name in tests  # the mean of all experts has no rows
    }
    found = {
        "tokens": sum(right) / len(right),
        f"numbers of its answers (n={len(opened[True])})": sum(opened[True]) / len(opened[True]),
        f"of the others' (n={len(opened[False])})": sum(opened[False]) / len(opened[False]),
        "its own rows": float(alone.pop(new)),
        "the others'": float(torch.stack([*alone.values()]).mean()),
    }
    print(way, json.dumps({name: round(value, 4) for name, value in found.items()}), flush=True)


def chosen(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """[M, L] the expert that each module chooses for each token."""
    with recorded_logits(model) as logits:
        model(input_ids=torch.tensor([ids]), logits_to_keep=1)
    return torch.stack([one.argmax(-1) for one in logits.values()])


if __name__ == "__main__":
    main()
