"""A base with experts that differ, their rows, and what gates are worth on them."""

from __future__ import annotations

import itertools
import json
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from meteora.adapters import reader
from meteora.adapters.compatibility import fit_to_base
from meteora.artifacts import RouterOptions
from meteora.base import loading
from meteora.base.chat_template import Template, encode_pair, encode_prompt
from meteora.base.shapes import fingerprint_of, linear_sizes
from meteora.checkpoint.manifest import EXPERTS, BaseEntry, ExpertEntry, Manifest
from meteora.checkpoint.stack import module_entries, stack_adapters
from meteora.fitting.sequences import UNLABELLED
from meteora.model.fused import expert_names, insert_experts
from meteora.model.generate import answer_all
from meteora.routing.hooks import recorded_routes
from pipelines.data.conversations import CONVERSATION_TURNS, converse, default_system_prompts
from pipelines.data.labels import Labeller
from pipelines.data.rows import Row
from pipelines.scoring.metrics import exact_match
from tests.benchmarks.bigbench import SHIPPED, read
from tests.quickstart.make import BATCH_SIZE, NUM_TEST, NUM_TRAIN, SPLIT_SEED, TRAIN_SEED
from tests.quickstart.make import TRAININGS as QUICKSTART
from tests.quickstart.tasks import rows as made_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from meteora.fitting.sequences import LabelledSequence

MOST_EXAMPLES = 128


@dataclass
class World:
    base: Path
    adapters: dict[str, Path]
    examples: dict[str, list[Row]]
    tests: dict[str, list[Row]]
    tokenizer: PreTrainedTokenizerBase
    folder: Path
    """For what is written meanwhile."""

    @classmethod
    def open(cls, base_folder: Path, trained: Path, names: Sequence[str], num_tests: int) -> World:
        """Experts by name: the quickstart's own, or such as `tests.benchmarks.bigbench` left."""
        found, examples, tests = {}, {}, {}
        for name in names:
            if name in QUICKSTART:
                found[name] = SHIPPED / "adapters" / name
                rows, held_out = _quickstart_rows(name)
            else:
                found[name] = trained / "adapters" / name
                rows = read(trained / "tasks" / name / "train.jsonl")
                held_out = read(trained / "tasks" / name / "test.jsonl")
            examples[name] = [Row(row["prompt"], row["response"]) for row in rows]
            tests[name] = [Row(row["prompt"], row["response"]) for row in held_out[:num_tests]]
            asked = {row.sha256 for row in tests[name]}
            assert not asked & {row.sha256 for row in examples[name]}, name
        folder = trained / "gates"
        folder.mkdir(parents=True, exist_ok=True)
        return cls(base_folder, found, examples, tests, loading.load_tokenizer(base_folder), folder)

    @property
    def names(self) -> list[str]:
        return list(self.adapters)

    def model(
        self, names: Sequence[str] | None = None, *, null: bool = False, opening: str = "own"
    ) -> PreTrainedModel:
        """The base with these experts, all by default, and no router yet."""
        chosen = list(names or self.names)
        sizes = linear_sizes(self.base)
        read_ones = [fit_to_base(reader.read(self.adapters[n]), sizes) for n in chosen]
        stack_adapters(read_ones, self.folder / EXPERTS)
        manifest = Manifest(
            base=BaseEntry("", "", fingerprint_of(self.base)),
            experts=tuple(
                ExpertEntry(name, one.spec.id, "", "", one.spec.weights_sha256, "", "")
                for name, one in zip(chosen, read_ones, strict=True)
            ),
            modules=module_entries([one.spec for one in read_ones]),
            router=RouterOptions("gate", 1, 1.0, opening=opening, null=null),
        )
        model, _ = loading.load_folder(self.base, dtype=torch.float32)
        insert_experts(model, self.folder, manifest)
        return model.eval()

    @property
    def template(self) -> Template:
        return Template.of(self.tokenizer)

    def sequences(self, count: int, names: Sequence[str] | None = None) -> list[LabelledSequence]:
        """The first examples of each expert, with its place in the order of all."""
        labeller = Labeller(self.tokenizer)
        return [
            sequence
            for name in names or self.names
            for sequence in labeller.rows(self.examples[name][:count], self.names.index(name))
        ]

    def conversations(self, count: int, *, shared: bool = True) -> list[LabelledSequence]:
        """The first examples of each expert as a recipe labels them by default: in conversations.

        Args:
            shared: whether the tokens of openings belong to the mean of all experts, or to nobody
        """
        examples = {name: self.examples[name][:count] for name in self.names}
        systems = default_system_prompts(count * len(self.names), CONVERSATION_TURNS)
        talks = converse(examples, self.names, CONVERSATION_TURNS, systems, seed=0)
        nobody = len(self.names) if shared else UNLABELLED
        return Labeller(self.tokenizer, self.names, nobody).spans(talks)

    def scores(
        self,
        model: PreTrainedModel,
        names: Sequence[str] | None = None,
        answer: Callable[..., list[list[int]]] = answer_all,
    ) -> dict[str, list[float]]:
        """Exact match of each test row, greedy, by task.

        Args:
            answer: has the arguments of `answer_all`
        """
        values = {}
        for name in names or self.names:
            rows = self.tests[name]
            asked = [encode_prompt(self.tokenizer, row.prompt) for row in rows]
            longest = max(len(self.tokenizer(row.response).input_ids) for row in rows)
            said = answer(model, self.tokenizer, asked, longest + 4)
            texts = self.tokenizer.batch_decode(said, skip_special_tokens=True)
            values[name] = [exact_match(t, row) for t, row in zip(texts, rows, strict=True)]
        return values

    def routing(
        self, model: PreTrainedModel, names: Sequence[str] | None = None
    ) -> dict[str, float]:
        """Share of (module, token) pairs of test rows that go to the row's own expert.

        Returns:
            `all` tokens, and those `after` the template's opening: means over tasks
        """
        opening = len(self.template.opening)
        everything, after = [], []
        for name in names or self.names:
            place = expert_names(model).index(name)
            right: list[torch.Tensor] = []
            starts: list[torch.Tensor] = []
            for row in self.tests[name]:
                ids = encode_pair(self.tokenizer, row.prompt, row.response)
                with torch.inference_mode(), recorded_routes(model) as routes:
                    model(input_ids=torch.tensor([ids]), logits_to_keep=1)
                chosen = torch.stack([experts[:, 0] for _, experts in routes.values()])
                right.append((chosen == place).float().mean(0))
                starts.append(torch.arange(len(ids)) >= opening)
            hits, late = torch.cat(right), torch.cat(starts)
            everything.append(hits.mean().item())
            after.append(hits[late].mean().item())
        return {"all": float(np.mean(everything)), "after": float(np.mean(after))}


def _quickstart_rows(task: str) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Examples, the shipped ones first and as many as are asked, and the shipped tests."""
    seen = {
        row["prompt"]
        for row in itertools.islice(
            made_rows(task, TRAIN_SEED), QUICKSTART[task].steps * BATCH_SIZE
        )
    }
    fresh = (row for row in made_rows(task, SPLIT_SEED) if row["prompt"] not in seen)
    drawn = list(itertools.islice(fresh, MOST_EXAMPLES + NUM_TEST))
    tests = drawn[NUM_TRAIN : NUM_TRAIN + NUM_TEST]
    return drawn[:NUM_TRAIN] + drawn[NUM_TRAIN + NUM_TEST :], tests


@contextmanager
def timed() -> Generator[dict[str, float]]:
    """Seconds of processor time: other work on the machine does not count."""
    found: dict[str, float] = {}
    started = time.process_time()
    yield found
    found["seconds"] = time.process_time() - started


class Results:
    """What was measured, in a file: a section that is there is not measured again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}

    def __contains__(self, key: str) -> bool:
        return key in self.found

    def __getitem__(self, key: str) -> Any:
        return self.found[key]

    def keep(self, key: str, value: Any) -> None:
        self.found[key] = value
        self.path.write_text(json.dumps(self.found, indent=1) + "\n")
        print(key, json.dumps({k: v for k, v in value.items() if k != "scores"}), flush=True)
