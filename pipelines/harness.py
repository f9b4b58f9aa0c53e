"""lm-eval as the harness: it puts prompts to a live model, and tells us what came back.

Judging, statistics and records are ours (`metrics`, `intervals`), and happen afterwards: so every
value can be computed again from what is kept. Only of its own tasks do we take its values.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, cast

import datasets
from lm_eval.api.model import CacheHook
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import set_seed

from meteora.artifacts import MeteoraError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

    from pipelines.examples import Row

HARNESS = f"lm-eval {version('lm-eval')}"
LOGGERS = ("lm_eval.models.huggingface", "lm_eval.api.task")
EXPECTED = (
    "`pretrained` model kwarg is not of type `str`",
    "Passed an already-initialized model through `pretrained`",
    "Custom kwargs can be passed to `--metadata`",
)
"""What lm-eval warns of whenever it is handed a live model, or rows: it always is, here."""


class BenchmarkError(MeteoraError):
    """Something cannot be measured as it is asked."""


class Harness:
    """A live model, as it is routed whenever it is asked."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        template: str = "auto",
        seed: int = 0,
        advance: Callable[[int], None] = lambda _rows: None,
    ) -> None:
        """Wrap `model`.

        Args:
            template: `chat`, `plain`, or `auto`: the chat template where the tokenizer has one
            advance: called with the number of prompts, or pairs of prompt and choice, just done
        """
        if template == "chat" and not tokenizer.chat_template:
            raise BenchmarkError(
                "the chat template is asked for, and the base's tokenizer has none; choose"
                " `template: plain`"
            )
        self.tokenizer = tokenizer
        self.templated = bool(tokenizer.chat_template) and template != "plain"
        self._seed = seed
        for name in LOGGERS:
            logging.getLogger(name).addFilter(_is_news)
        self._model = _Model(
            pretrained=model,
            tokenizer=cast("PreTrainedTokenizerFast", tokenizer),
            batch_size=batch_size,
            device=str(model.device),
        )
        self._model.told.advance = advance

    def prompt_tokens(self, prompts: Sequence[str]) -> list[int]:
        """The length of each prompt as it is put to the model."""
        if self.templated:
            chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
            texts = [self._model.apply_chat_template(chat) for chat in chats]
        else:
            texts = list(prompts)
        return [len(self._model.tok_encode(text)) for text in texts]

    def check_room(self, task: str, lengths: Sequence[int], max_new_tokens: int) -> None:
        """Refuse prompts of which one does not fit into the model with its answer.

        Args:
            lengths: of the prompts, as `prompt_tokens` tells them
        """
        longest = max(lengths)
        room = self._model.max_length - max_new_tokens
        if longest > room:
            raise BenchmarkError(
                f"task {task}: its longest prompt has {longest} tokens, and beside an answer of"
                f" {max_new_tokens} the model has room for {max(0, room)}; shorten one of the two"
            )

    def generate(
        self, task: str, prompts: Sequence[str], max_new_tokens: int
    ) -> list[tuple[str, bool]]:
        """Greedy answers, each up to the end of sequence or `max_new_tokens`.

        Returns:
            of each prompt the answer, and whether it was cut at `max_new_tokens`
        """
        samples = self._ask(
            {
                "task": task,
                "output_type": "generate_until",
                "doc_to_text": "{{prompt}}",
                "doc_to_target": "",
                "generation_kwargs": {
                    "until": [self.tokenizer.eos_token],
                    "max_gen_toks": max_new_tokens,
                    "do_sample": False,
                },
            },
            [{"prompt": prompt} for prompt in prompts],
        )
        return [
            (
                str(sample["filtered_resps"][0]),
                bool(self._model.told.truncated[sample["arguments"][0][0]]),
            )
            for sample in samples
        ]

    def weigh(self, task: str, rows: Sequence[Row]) -> list[list[float]]:
        """The log-likelihood of every choice of every row, after its prompt."""
        if bare := next((row for row in rows if not row.choices), None):
            raise BenchmarkError(
                f"task {task}: the prompt {bare.prompt[:60]!r} has no choices to weigh; give its"
                " row `choices`, or choose a metric that judges a free answer"
            )
        samples = self._ask(
            {
                "task": task,
                "output_type": "multiple_choice",
                "doc_to_text": "{{prompt}}",
                "doc_to_target": 0,
                "doc_to_choice": "{{choices}}",
                "target_delimiter": "",  # as the adapters saw an answer: right behind the prompt
            },
            [{"prompt": row.prompt, "choices": list(row.choices)} for row in rows],
        )
        return [[float(value) for value, _ in sample["filtered_resps"]] for sample in samples]

    def _ask(self, task: dict[str, Any], docs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        table = datasets.Dataset.from_list(docs)
        asked = {
            **task,
            "custom_dataset": lambda **_: {"test": table},
            "test_split": "test",
            "process_results": lambda _doc, _results: {"asked": 1.0},
            "metric_list": [{"metric": "asked", "aggregation": "mean", "higher_is_better": True}],
        }
        # its own 10,000 tasks take 10 s to index
        report = self._evaluate([asked], TaskManager(include_defaults=False))
        return sorted(report["samples"][task["task"]], key=lambda sample: sample["doc_id"])

    def _evaluate(self, tasks: list[Any], manager: TaskManager, limit: int | None = None) -> Any:  # noqa: ANN401
        """What its `simple_evaluate` does, but for a second of questions about the machine."""
        set_seed(self._seed)
        loaded = manager.load(tasks)
        for task in loaded["tasks"].values():
            task.set_config("num_fewshot", task.get_config("num_fewshot") or 0)
            task.set_fewshot_seed(self._seed)
        return evaluate(
            lm=self._model,
            task_dict=loaded,
            limit=limit,
            apply_chat_template=self.templated,
            bootstrap_iters=0,
        )

    def own_task(self, name: str, folder: Path | None, limit: int) -> OwnTask:
        """The harness's own task, judged by itself.

        Raises:
            BenchmarkError: it knows no such task, or cannot get its rows.
        """
        manager = TaskManager(
            include_path=str(folder) if folder else None, include_defaults=folder is None
        )
        if name not in manager.all_tasks:
            where = f"in {folder}" if folder else f"in {HARNESS}"
            raise BenchmarkError(
                f"there is no task {name!r} {where}; `lm-eval ls tasks` lists them"
            )
        try:
            report = self._evaluate([name], manager, limit)
        except (OSError, ConnectionError, ValueError) as error:
            first = str(error).strip().partition("\n")[0]
            raise BenchmarkError(
                f"task {name}: {HARNESS} cannot get or read its rows ({first}); they come from the"
                " Hub, which has to be reached once"
            ) from error
        samples = report["samples"].get(name, [])
        first_filter = samples[0]["filter"] if samples else ""
        samples = [sample for sample in samples if sample["filter"] == first_filter]
        return OwnTask(
            sorted(samples, key=lambda sample: sample["doc_id"]),
            report["higher_is_better"].get(name, {}),
        )


def _is_news(record: logging.LogRecord) -> bool:
    return not any(text in record.getMessage() for text in EXPECTED)


@dataclass(frozen=True)
class OwnTask:
    samples: list[dict[str, Any]]
    higher_is_better: dict[str, bool]

    def values(self, name: str, metric: str) -> list[float]:
        """The metric's value of every row."""
        kept = [sample.get(metric) for sample in self.samples]
        if not kept or not all(isinstance(value, int | float) for value in kept):
            given = {
                key
                for sample in self.samples[:1]
                for key, value in sample.items()
                if key in sample["metrics"] and isinstance(value, int | float)
            }
            raise BenchmarkError(
                f"task {name}: {HARNESS} gives no {metric} for every row of it; it gives"
                f" {', '.join(sorted(given)) or 'none'}"
            )
        return [float(cast("float", value)) for value in kept]

    def outputs(self) -> list[dict[str, Any]]:
        """What is kept of every row: the question and the replies as the harness holds them."""
        return [
            {
                "prompt": str(sample["arguments"][0][0]),
                "reference": str(sample["target"]),
                "output": json.dumps(sample["filtered_resps"], default=str),
            }
            for sample in self.samples
        ]


class _Told(CacheHook):
    """Told of each prompt with its answer in order, it keeps whether that answer was cut."""

    advance: Callable[[int], None] = staticmethod(lambda _rows: None)

    def __init__(self) -> None:
        super().__init__(None)
        self.batch: list[bool] = []
        """Of the answers that were generated last."""
        self.truncated: dict[str, bool] = {}
        """By prompt, as it was put to the model."""

    def add_partial(self, attr: str, req: Any, res: Any) -> None:  # noqa: ANN401, ARG002
        if attr == "generate_until":
            self.truncated[req[0]] = self.batch.pop(0)
        self.advance(1)


class _Model(HFLM):
    """lm-eval's own model class, without its own bars; it sees which answers were cut."""

    def __init__(self, **asked: Any) -> None:  # noqa: ANN401  (HFLM's own arguments)
        super().__init__(**asked)
        self.cache_hook = self.told = _Told()

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:  # noqa: ARG002
        return super().generate_until(requests, disable_tqdm=True)

    def loglikelihood(
        self,
        requests: list[Any],
        disable_tqdm: bool = False,  # noqa: ARG002
    ) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def _model_generate(
        self,
        context: torch.Tensor,
        max_length: int,
        stop: list[str],
        **settings: Any,  # noqa: ANN401
    ) -> torch.Tensor:
        out = super()._model_generate(context, max_length, stop, **settings)
        new = out[:, context.shape[1] :]
        ended = (new == self.eot_token_id).any(-1).tolist()
        full = out.shape[1] >= max_length
        self.told.batch = [full and not done for done in ended]
        return out
