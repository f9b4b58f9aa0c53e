"""Examples of an adapter for which the recipe names none: rows of a data set that its card names.

A card is a stranger's text. So its data sets are read as any other, by `datasets`, which runs no
code of theirs; and only where the columns leave no doubt.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from meteora.untrusted.findings import listed, shortened
from pipelines.data.row_sources import hub_items, read_rows
from pipelines.data.rows import ExamplesError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from pipelines.data.rows import Row

COLUMNS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction,input", "output"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("query", "answer"),
    ("input", "output"),
    ("inputs", "targets"),
    ("source", "target"),
    ("article", "highlights"),
    ("document", "summary"),
    ("dialogue", "summary"),
)
"""Pairs of columns that hold a prompt and its answer, the most certain first."""
CONVERSATIONS = (("messages", "role", "content"), ("conversations", "from", "value"))
"""Columns with turns, and the keys of a turn."""
ASKING, ANSWERING = {"user", "human"}, {"assistant", "gpt"}


@dataclass(frozen=True)
class CardExamples:
    """Rows for an expert, and where they come from."""

    rows: list[Row]
    source: str
    """As a recipe would name it."""


class NoCardExamplesError(ExamplesError):
    """A card names no data set that can be used."""


def read_card_examples(
    datasets: Sequence[str], folder: Path, limit: int, token_of: Callable[[str], str | None]
) -> CardExamples:
    """Rows of the first data set that can be used.

    Args:
        datasets: each `owner/name`
        folder: of the recipe
        limit: the greatest number of rows
        token_of: the token that is sent for a data set

    Raises:
        NoCardExamplesError: there is none; the message says why each of them cannot be used.
        ExamplesError: the Hub cannot be reached.
    """
    reasons = []
    for name in datasets:
        try:
            source = f"hf:{name}?{urlencode(_options(name, token_of(name)), safe=',.')}"
            return CardExamples(read_rows(source, folder, limit, token_of), source)
        except ExamplesError as error:
            if isinstance(error.__cause__, ConnectionError):
                raise
            reasons.append(str(error))
    raise NoCardExamplesError("; ".join(reasons) or "its card names no data set of the Hub")


def _options(name: str, token: str | None) -> dict[str, str]:
    """Config, split and columns of a data set, as `hf:` takes them."""
    import datasets as hub  # noqa: PLC0415  (seconds to import, and only needed here)
    from datasets.exceptions import DatasetsError  # noqa: PLC0415

    asked: Any = {"token": token or False}
    try:
        configs = hub.get_dataset_config_names(name, **asked)
        config = configs[0] if len(configs) == 1 else "default"
        if config not in configs:
            raise NoCardExamplesError(f"{name} has several configs ({listed(configs, 4)})")
        splits = hub.get_dataset_split_names(name, config, **asked)
    except ConnectionError as error:
        raise ExamplesError(
            f"the Hub cannot be reached for {name}, a data set that an adapter's card names; try"
            " again, or name examples in the recipe"
        ) from error
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        first = str(error).strip().partition("\n")[0]
        raise NoCardExamplesError(
            f"{name} cannot be read ({shortened(first) or type(error).__name__})"
        ) from error
    options = {"config": config, "split": "train" if "train" in splits else splits[0]}
    item = next(iter(hub_items(name, options, token)), {})
    columns = columns_of(item)
    if columns is None:
        raise NoCardExamplesError(
            f"{name} has the columns {listed(list(item), 8)}, which are none of a prompt and its"
            " answer"
        )
    return options | dict(zip(("prompt", "response"), columns, strict=True))


def columns_of(item: Mapping[str, Any]) -> tuple[str, str] | None:
    """Which columns of a row are the prompt and its answer, as `hf:` names them; None in doubt."""
    for prompt, response in COLUMNS:
        if all(isinstance(item.get(name), str) for name in (*prompt.split(","), response)):
            return prompt, response
    for column, role, content in CONVERSATIONS:
        turns = item.get(column)
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            continue
        roles = [turn.get(role) for turn in turns]
        for at, (one, then) in enumerate(pairwise(roles)):
            if one in ASKING and then in ANSWERING:
                return f"{column}.{at}.{content}", f"{column}.{at + 1}.{content}"
    return None
