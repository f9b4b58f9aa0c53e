"""Prompts to a live model, through lm-eval's model class.

`scoring.metrics` computes the values later, so they can be computed again from the stored answers.
Tasks of lm-eval's own are in `lm_eval_tasks`: plain rows do not need lm-eval's task code, which
takes seconds to import.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Collection, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, cast

import torch

# transformers' set_seed is the same, but importing it imports the Trainer and PEFT
from accelerate.utils import set_seed
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import resolve_max_length

from meteora.artifacts import MeteoraError
from meteora.base.placement import input_device
from meteora.model.generate import ONE_ANSWER, end_tokens, prompts_at_once
from meteora.model.shared_prefix import share_prefix
from meteora.routing.passes import watcher_of
from pipelines.data.conversations import takes
from pipelines.data.rows import ExamplesError, Row

if TYPE_CHECKING:
    from transformers import (
        PretrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        PreTrainedTokenizerFast,
    )

    from pipelines.data.dialogues import Dialogue

HARNESS = f"lm-eval {version('lm-eval')}"
"""The harness that scores record."""
LOGGER = "lm_eval.models.huggingface"
"""The logger of lm-eval that writes the warnings below."""
EXPECTED = (
    "`pretrained` model kwarg is not of type `str`",
    "Passed an already-initialized model through `pretrained`",
)
"""Warnings of lm-eval for every live model; they are hidden."""


class BenchmarkError(MeteoraError):
    """A task cannot be measured with the settings of the recipe."""


def is_templated(
    tokenizer: PreTrainedTokenizerBase, template: str, system_prompt: str | None
) -> bool:
    """Whether prompts are put into the chat template; arguments as of `Harness`.

    Raises:
        BenchmarkError: the template is `chat`, and the tokenizer has none; or it takes no system
            prompt, and one is given.
    """
    if template == "chat" and not tokenizer.chat_template:
        raise BenchmarkError(
            "the recipe asks for the chat template, but the base's tokenizer has none; choose"
            " `template: plain`"
        )
    templated = bool(tokenizer.chat_template) and template != "plain"
    if system_prompt is not None and not (templated and takes(tokenizer, 1, "Be brief.")):
        raise BenchmarkError(
            "the recipe asks under a system prompt, but the base's chat template takes none, or"
            " prompts are plain text; take `system_prompt` out of `benchmark`"
        )
    return templated


def refuse_conversations(
    task: str, dialogues: Sequence[Dialogue], tokenizer: PreTrainedTokenizerBase, *, templated: bool
) -> None:
    """Raise `BenchmarkError` for conversations without a chat template that takes them."""
    if dialogues and not templated:
        raise BenchmarkError(
            f"task {task}: conversations need the roles of a chat template, and prompts are"
            " asked as plain text; take `conversation` out of the benchmark, or choose a base with"
            " a chat template and not `template: plain`"
        )
    for first in dialogues[:1]:
        try:
            first.with_answers(["yes"] * (len(first.questions) - 1)).encode(tokenizer)
        except ExamplesError as error:
            raise BenchmarkError(
                f"task {task}: its conversations are not possible with this base: {error}"
            ) from error


def room_of(config: PretrainedConfig) -> int:
    """The base's context length in tokens; `sys.maxsize` if its config states none."""
    return resolve_max_length(config, default=sys.maxsize)


def refuse_too_long(
    task: str, lengths: Sequence[int], max_new_tokens: int, context_length: int
) -> None:
    """Raise `BenchmarkError` if a prompt with its answer has more tokens than the context."""
    room = context_length - max_new_tokens
    if too_long := [length for length in lengths if length > room]:
        raise BenchmarkError(
            f"task {task}: {len(too_long)} of {len(lengths)} prompts are too long: the longest has"
            f" {max(too_long)} tokens, but with an answer of {max_new_tokens} the model has room"
            f" for {max(0, room)}; take out the longest rows, ask fewer questions in one prompt, or"
            " lower `max_new_tokens`"
        )


def _is_unexpected(record: logging.LogRecord) -> bool:
    return not any(text in record.getMessage() for text in EXPECTED)


class _AnswerHook(CacheHook):
    """lm-eval calls it with each prompt and answer, in order; it records which answers were cut."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        super().__init__(None)
        self.advance = advance
        self.batch: list[bool] = []
        """Whether each answer of the last generated batch was cut."""
        self.truncated: dict[str, bool] = {}
        """Whether the answer was cut, by the text of the prompt with its template."""

    def add_partial(self, attr: str, req: Any, res: Any) -> None:  # noqa: ANN401, ARG002
        if attr == "generate_until":
            self.truncated[req[0]] = self.batch.pop(0)
        self.advance(1)


class MaskedModel(HFLM):
    """lm-eval's model class, with a mask for routers that read whole prompts.

    lm-eval pads a batch of log-likelihoods on the right and passes no mask, since a causal model
    needs none.
    """

    _inputs: Collection[tuple[int, ...]] = ()
    """The token ids of the requests, without padding."""

    @property
    def batch_size(self) -> Any:  # noqa: ANN401  (a number, or `auto`)
        return prompts_at_once(self.model, super().batch_size)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        *args: Any,  # noqa: ANN401
        **kwargs: Any,  # noqa: ANN401
    ) -> list[tuple[float, bool]]:
        longest = self.max_length + 1
        self._inputs = {tuple((one + other)[-longest:][:-1]) for _, one, other in requests}
        return super()._loglikelihood_tokens(requests, *args, **kwargs)

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:  # noqa: ANN401
        if watcher_of(self.model) is None:
            return super()._model_call(inps, *args, **kwargs)
        width = inps.shape[1]
        lengths = [
            next((n for n in range(width, 0, -1) if tuple(row[:n]) in self._inputs), width)
            for row in inps.tolist()
        ]
        mask = torch.arange(width) < torch.tensor(lengths).unsqueeze(1)
        masked = {"attention_mask": mask.long().to(inps.device)}
        with self.model.register_forward_pre_hook(
            lambda _model, args, kwargs: (args, kwargs | masked), with_kwargs=True, prepend=True
        ):
            return super()._model_call(inps, *args, **kwargs)


class Harness(MaskedModel):
    """A live model that answers prompts, with its routing of that moment; it shows no bars."""

    tokenizer: PreTrainedTokenizerFast

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        template: str = "auto",
        system_prompt: str | None = None,
        seed: int = 0,
        advance: Callable[[int], None] = lambda _rows: None,
    ) -> None:
        """Wrap `model`.

        Args:
            template: `chat`, `plain`, or `auto`: the chat template if the tokenizer has one
            system_prompt: before every prompt; None is the chat template's default, and an empty
                text is an empty system prompt
            advance: as of `evaluate_task`

        Raises:
            BenchmarkError: as `is_templated`.
        """
        self.templated = is_templated(tokenizer, template, system_prompt)
        self.system_prompt, self.seed, self.advance = system_prompt, seed, advance
        logging.getLogger(LOGGER).addFilter(_is_unexpected)
        super().__init__(
            pretrained=model,
            tokenizer=cast("PreTrainedTokenizerFast", tokenizer),
            batch_size=batch_size,
            # a template writes its own special tokens
            add_bos_token=False if self.templated else None,
        )
        self._device = input_device(model)  # an offloaded model's `device` may be another
        self.cache_hook = self._answers = _AnswerHook(advance)

    def prompt_tokens(self, prompts: Sequence[str]) -> list[int]:
        """The number of tokens of each prompt, with the template."""
        return [len(self.tok_encode(self._apply_template(prompt))) for prompt in prompts]

    def _apply_template(self, prompt: str) -> str:
        if not self.templated:
            return prompt
        return self.apply_chat_template([{"role": "user", "content": prompt}])

    def generate(self, prompts: Sequence[str], max_new_tokens: int) -> list[tuple[str, bool]]:
        """Greedy answers, each up to the end of sequence or `max_new_tokens`.

        Returns:
            for each prompt the answer, and whether it was cut at `max_new_tokens`
        """
        settings = {
            "until": [self.tokenizer.eos_token] if self.tokenizer.eos_token else [],
            "max_gen_toks": max_new_tokens,
            "do_sample": False,
            **ONE_ANSWER,
        }
        texts = [self._apply_template(prompt) for prompt in prompts]
        requests = [Instance("generate_until", {}, (text, settings), 0) for text in texts]
        set_seed(self.seed)
        answers = self.generate_until(requests)
        return [
            (answer, self._answers.truncated[text])
            for text, answer in zip(texts, answers, strict=True)
        ]

    def log_likelihoods(self, rows: Sequence[Row]) -> list[list[float]]:
        """The log-likelihood of each row's choices as answers to its prompt; [rows][choices]."""
        requests = [
            ((text, choice), *self._parts(text, choice))
            for row in rows
            for text in [self._apply_template(row.prompt)]
            for choice in row.choices
        ]
        set_seed(self.seed)
        found = self._loglikelihood_tokens(requests, disable_tqdm=True)
        values = (value for value, _ in found)
        return [[next(values) for _ in row.choices] for row in rows]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        if self.system_prompt is not None and chat_history[0]["role"] != "system":
            chat_history = [{"role": "system", "content": self.system_prompt}, *chat_history]
        return super().apply_chat_template(chat_history, add_generation_prompt)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:  # noqa: ARG002
        return super().generate_until(requests, disable_tqdm=True)

    def loglikelihood(
        self,
        requests: list[Any],
        disable_tqdm: bool = False,  # noqa: ARG002
    ) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        *args: Any,  # noqa: ANN401
        **kwargs: Any,  # noqa: ANN401
    ) -> list[int]:
        if add_special_tokens is None and self.prefix_token_id is None:
            add_special_tokens = self.add_bos_token is not False  # lm-eval looks for a prefix
        return super().tok_encode(string, add_special_tokens, *args, **kwargs)

    def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> Any:  # noqa: ANN401
        if tokens is None:  # the tokenizer has no end-of-sequence token
            return None
        return super().tok_decode(tokens, skip_special_tokens)

    def _parts(self, prompt: str, answer: str) -> tuple[list[int], list[int]]:
        """The tokens of a prompt and of its answer, which is not empty.

        For lm-eval the answer begins after as many tokens as the prompt alone has. This is wrong
        if the tokenizer joins the two, as `:` and `-` in "A:-5", or adds a token to every text.
        """
        before, after = self._encode_pair(prompt, answer)
        if self.tok_encode(prompt + answer)[: len(before)] == before:
            return before, after
        space = prompt[len(prompt.rstrip()) :]  # `_encode_pair` moves it to the answer, too
        return before, self.tok_encode(space + answer, add_special_tokens=False)

    def _model_generate(
        self,
        context: torch.Tensor,
        max_length: int,
        stop: list[str],
        **settings: Any,  # noqa: ANN401
    ) -> torch.Tensor:
        mask = settings.pop("attention_mask")
        started = share_prefix(self.model, context, mask, asked=settings)
        batch = started.to_generate()
        context = batch.pop("input_ids")
        out = super()._model_generate(context, max_length, stop, **settings, **batch)
        new = out[:, context.shape[1] :]
        stops = end_tokens(self.model, self.tokenizer)
        ended = torch.isin(new, new.new_tensor(stops)).any(-1).tolist()
        full = out.shape[1] >= max_length
        self._answers.batch = [full and not done for done in ended]
        return out
