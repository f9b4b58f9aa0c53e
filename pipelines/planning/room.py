"""Whether every example, and every prompt of a benchmark with its answer, has room in the base.

A prompt that is too long ends a benchmark, and to cut it would change the question. So it is
refused before any gate is fitted. The length of a conversation depends on the model's answers: here
all its questions count, and of the answers only the last.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from lm_eval.models.utils import has_bos_prefix, resolve_max_length

from meteora.base.chat_template import ConversationError, encode_pair, rendered
from meteora.base.loading import load_config, load_tokenizer
from pipelines.data.rows import ExamplesError, Row
from pipelines.evaluation.harness import (
    BenchmarkError,
    is_templated,
    refuse_conversations,
    refuse_too_long,
    room_of,
)
from pipelines.evaluation.measurements import ORACLES
from pipelines.planning.examples import LEAST_EXAMPLES
from pipelines.workspace.console import say

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from meteora.artifacts import RouterOptions, SpeedSpec
    from meteora.fitting.sequences import LabelledSequence
    from pipelines.data.spans import SpannedRow, SpannedTurns
    from pipelines.evaluation.tasks import Task
    from pipelines.recipe.benchmark import SpeedSection


def check_names(tasks: Iterable[Task]) -> None:
    """Refuse the first `lm_eval` task that lm-eval does not know, with a `BenchmarkError`."""
    for task in tasks:
        if task.lm_eval:
            # seconds, and few recipes need it
            from pipelines.evaluation.lm_eval_tasks import find_lm_eval_task  # noqa: PLC0415

            find_lm_eval_task(task)


def check_rows(
    folder: Path,
    tasks: Collection[Task],
    examples: Mapping[str, Sequence[Row]],
    spans: Sequence[SpannedRow | SpannedTurns],
    place: Callable[[str, int], str],
    options: RouterOptions,
    *,
    plain: bool,
    of_cards: Collection[str] = (),
    systems: Collection[str] = (),
    speed: SpeedSection | SpeedSpec | None = None,
) -> None:
    """Refuse rows that are too long for a base, or not possible in its chat template.

    Args:
        examples: by expert; none, like `spans`, if no gates are to be fitted
        place: returns the place of an example, from its expert and its number
        plain: whether gates are fitted to prompts without the chat template
        of_cards: the experts whose examples are those of their cards' data sets
        systems: that answer the tasks; an oracle needs the places of a composite's questions
        speed: how the model is timed, if it is

    Raises:
        BenchmarkError: a prompt of a task is.
        ExamplesError: an example is, or the chat template does not suit the gates.
    """
    config, tokenizer = load_config(folder), load_tokenizer(folder)
    check_room(tasks, config, tokenizer, speed)
    if plain:
        tokenizer.chat_template = None
    without_too_long(examples, of_cards, room_of(config), tokenizer)
    given = {name: rows for name, rows in examples.items() if name not in of_cards}
    check_examples(given, place, config, tokenizer)
    oracle = any(system in ORACLES for system in systems)
    placed = [task.composites[0] for task in tasks if oracle and task.composites]
    for one in (*spans, *placed):
        one.encode(tokenizer)
    if examples:
        check_opening(options, tokenizer)


def check_room(
    tasks: Iterable[Task],
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    speed: SpeedSection | SpeedSpec | None = None,
) -> None:
    """Refuse the first task with prompts that are too long or not possible in the chat template.

    Tasks of lm-eval may be longer, since it cuts their prompts itself.

    Args:
        speed: how the model is timed, if it is

    Raises:
        BenchmarkError: a prompt is too long, or there is no such template, system prompt or turn.
    """
    if speed is not None and speed.prompt_tokens + speed.new_tokens > room_of(config):
        raise BenchmarkError(
            f"speed: prompts of {speed.prompt_tokens:,} tokens and answers of"
            f" {speed.new_tokens:,} are too long, since the base has room for"
            f" {room_of(config):,}; lower `speed.prompt_tokens`"
        )
    room = resolve_max_length(config, tokenizer)
    for task in tasks:
        templated = is_templated(tokenizer, task.template, task.system_prompt)
        refuse_conversations(task.name, task.dialogues, tokenizer, templated=templated)
        if not task.lm_eval and (lengths := _lengths(task, tokenizer)):
            refuse_too_long(task.name, lengths, task.longest_answer(tokenizer), room)


def check_examples(
    examples: Mapping[str, Sequence[Row]],
    place: Callable[[str, int], str],
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Refuse an example that is longer than the base's context, if its config states one.

    Args:
        tokenizer: as for the fit: without a chat template if the recipe asks in plain text

    Raises:
        ExamplesError: an example is too long.
    """
    room = room_of(config)
    for name, rows in examples.items():
        lengths = [len(encode_pair(tokenizer, row.prompt, row.response)) for row in rows]
        if too_long := [number for number, length in enumerate(lengths) if length > room]:
            first = too_long[0]
            raise ExamplesError(
                f"expert {name}: {len(too_long)} of {len(rows)} examples are too long: the first,"
                f" {place(name, first)}, has {lengths[first]} tokens with its answer, and the base"
                f" has room for {room}; take such examples out, or shorten them"
            )


def having_room(rows: Sequence[Row], room: int, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    """The rows with at most `room` tokens in prompt and answer together."""
    return [row for row in rows if len(encode_pair(tokenizer, row.prompt, row.response)) <= room]


def without_too_long(
    examples: Mapping[str, Sequence[Row]],
    of_cards: Collection[str],
    room: int,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Sequence[Row]]:
    """The examples, without those of cards' data sets that have more than `room` tokens.

    Nobody can shorten these. Those of a recipe are refused by `check_examples`.

    Raises:
        ExamplesError: too few of an expert's are left for its gate.
    """
    fitting = dict(examples)
    for name in of_cards:
        rows = examples[name]
        own = having_room(rows, room, tokenizer)
        if len(own) < min(LEAST_EXAMPLES, len(rows)):
            raise ExamplesError(
                f"expert {name}: {len(own)} of {len(rows)} examples of the data set that its card"
                f" names fit into the base's context of {room} tokens, and a gate needs"
                f" {LEAST_EXAMPLES} or more; name other examples in the recipe"
            )
        fitting[name] = own
    return fitting


def check_opening(options: RouterOptions, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse gates that store the opening of all prompts, if the template puts the date into it.

    The opening of tomorrow's prompts would be another one.
    """
    knows = options.opening == "prompt" and not options.by_turns
    if knows and "strftime_now" in str(tokenizer.chat_template or ""):
        raise ExamplesError(
            "the base's chat template has today's date in every prompt, so gates with"
            " `router: {opening: prompt}` would not know the prompts of tomorrow; take `opening`"
            " out of the recipe"
        )


def with_room(room: int, mixed: Sequence[LabelledSequence]) -> list[LabelledSequence]:
    """The mixed prompts of at most `room` tokens; prints the number of the others."""
    fitting = [one for one in mixed if len(one.input_ids) <= room]
    if more := len(mixed) - len(fitting):
        text = f"{more} of {len(mixed)} mixed prompts have more than the {room} tokens that the"
        say(f"{text} base has room for: gates are fitted without these", "note")
    return fitting


def longest(task: Task, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """The most tokens of a task's prompt with its answer or answers.

    The base's context length for tasks whose prompts are not known here, such as lm-eval's.
    """
    answers = max((len(dialogue.questions) for dialogue in task.dialogues), default=1)
    if task.lm_eval or not (lengths := _lengths(task, tokenizer)):
        return resolve_max_length(config, tokenizer)
    return max(lengths) + answers * task.max_new_tokens


def _lengths(task: Task, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of each prompt, as the harness counts them; empty if the template refuses one."""
    messages: list[list[dict[str, str]]] = [
        dialogue.with_answers([""] * (len(dialogue.questions) - 1)).messages()
        for dialogue in task.dialogues
    ]
    system = task.system_prompt
    opening = [] if system is None else [{"role": "system", "content": system}]
    messages += [
        [*opening, {"role": "user", "content": one.prompt}] for one in task.composites or task.rows
    ]
    templated = bool(tokenizer.chat_template) and task.template != "plain"
    if templated:
        try:
            texts = [rendered(tokenizer, one) for one in messages]
        except ConversationError:
            return []  # the benchmark reports the template's error
    else:
        texts = [own[-1]["content"] for own in messages]
    return [
        len(tokenizer(text, add_special_tokens=special).input_ids)
        for text in texts
        for special in [not templated and not has_bos_prefix(text, tokenizer.bos_token)]
    ]
