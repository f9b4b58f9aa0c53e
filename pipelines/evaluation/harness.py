"""lm-eval's model class as what puts prompts to a live model, and tells us what came back.

Judging, statistics and records are ours (`metrics`, `intervals`), and happen afterwards: so every
value can be computed again from what is kept. The tasks that lm-eval brings are asked in
`lm_eval_tasks`; rows of our own need none of its task machinery, which takes seconds to import.
"""

from __future__ import annotations

import logging
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, cast

# transformers' own does the same, beside the Trainer, and that imports PEFT
from accelerate.utils import set_seed
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook
from lm_eval.models.huggingface import HFLM

from meteora.artifacts import MeteoraError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

    from pipelines.data.rows import Row

HARNESS = f"lm-eval {version('lm-eval')}"
LOGGERS = ("lm_eval.models.huggingface",)
EXPECTED = (
    "`pretrained` model kwarg is not of type `str`",
    "Passed an already-initialized model through `pretrained`",
)
"""What lm-eval warns of whenever it is handed a live model: it always is, here."""


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
        self.seed = seed
        for name in LOGGERS:
            logging.getLogger(name).addFilter(_is_news)
        self.model = _Model(
            pretrained=model,
            tokenizer=cast("PreTrainedTokenizerFast", tokenizer),
            batch_size=batch_size,
            device=str(model.device),
        )
        self.model.told.advance = advance

    def prompt_tokens(self, prompts: Sequence[str]) -> list[int]:
        """The length of each prompt as it is put to the model."""
        return [len(self.model.tok_encode(self._put(prompt))) for prompt in prompts]

    def _put(self, prompt: str) -> str:
        """A prompt as it is put to the model."""
        if not self.templated:
            return prompt
        return self.model.apply_chat_template([{"role": "user", "content": prompt}])

    def check_room(self, task: str, lengths: Sequence[int], max_new_tokens: int) -> None:
        """Refuse prompts of which one does not fit into the model with its answer.

        Args:
            lengths: of the prompts, as `prompt_tokens` tells them
        """
        longest = max(lengths)
        room = self.model.max_length - max_new_tokens
        if longest > room:
            raise BenchmarkError(
                f"task {task}: its longest prompt has {longest} tokens, and beside an answer of"
                f" {max_new_tokens} the model has room for {max(0, room)}; shorten one of the two"
            )

    @staticmethod
    def check_choices(task: str, rows: Sequence[Row]) -> None:
        """Refuse rows of which one has no choices to weigh."""
        if bare := next((row for row in rows if not row.choices), None):
            raise BenchmarkError(
                f"task {task}: the prompt {bare.prompt[:60]!r} has no choices to weigh; give its"
                " row `choices`, or choose a metric that judges a free answer"
            )

    def generate(self, prompts: Sequence[str], max_new_tokens: int) -> list[tuple[str, bool]]:
        """Greedy answers, each up to the end of sequence or `max_new_tokens`.

        Returns:
            of each prompt the answer, and whether it was cut at `max_new_tokens`
        """
        settings = {
            "until": [self.tokenizer.eos_token],
            "max_gen_toks": max_new_tokens,
            "do_sample": False,
        }
        texts = [self._put(prompt) for prompt in prompts]
        asked = [Instance("generate_until", {}, (text, settings), 0) for text in texts]
        set_seed(self.seed)
        answers = self.model.generate_until(asked)
        return [
            (answer, self.model.told.truncated[text])
            for text, answer in zip(texts, answers, strict=True)
        ]

    def weigh(self, rows: Sequence[Row]) -> list[list[float]]:
        """The log-likelihood of every choice of every row, right after its prompt."""
        asked = [
            Instance("loglikelihood", {}, (text, choice), i)
            for row in rows
            for text in [self._put(row.prompt)]
            for i, choice in enumerate(row.choices)
        ]
        set_seed(self.seed)
        weights = iter(self.model.loglikelihood(asked))
        return [[next(weights)[0] for _ in row.choices] for row in rows]


def _is_news(record: logging.LogRecord) -> bool:
    return not any(text in record.getMessage() for text in EXPECTED)


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
