"""Examples of an adapter for which the recipe names none: rows of a data set that its card names.

A card is a stranger's text. So `datasets` reads the data set and runs none of its code, and a data
set whose columns are unclear is not used.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from httpx2 import TransportError  # what huggingface_hub speaks HTTP with

from meteora.untrusted.findings import brief, causes, listed
from pipelines.data.pinned import cached_entries, pin
from pipelines.data.row_sources import HOW_TO_GET_ACCESS, hub_items, read_rows
from pipelines.data.rows import ExamplesError, Row

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
LONGEST_PROMPT = 8_000
"""Characters. Longer prompts are left out: fitting to them would take too much memory."""
ASKING, ANSWERING = {"user", "human"}, {"assistant", "gpt"}


class NoCardExamplesError(ExamplesError):
    """A card names no data set that can be used."""


def read_card_examples(
    datasets: Sequence[str], folder: Path, limit: int, token_of: Callable[[str], str | None]
) -> tuple[list[Row], str]:
    """Rows of the first usable data set, and their source as a recipe would name it.

    Args:
        datasets: each `owner/name`
        folder: of the recipe
        limit: the greatest number of rows
        token_of: returns the token to send for a data set

    Raises:
        NoCardExamplesError: none is usable; the message gives the reason for each.
        ExamplesError: the Hub cannot be reached.
    """
    reasons = []
    for name in datasets:
        try:
            source = f"hf:{name}?{urlencode(_options(name, token_of(name)), safe=',.')}"
            return read_rows(source, folder, limit, token_of), source
        except ExamplesError as error:
            if _is_fault_of_hub(error.__cause__):
                raise
            reasons.append(str(error))
    raise NoCardExamplesError("; ".join(reasons) or "its card names no data set of the Hub")


def _is_fault_of_hub(error: BaseException | None) -> bool:
    """Whether the Hub was not reached, or had a fault of its own: no verdict on a data set."""
    transient = (ConnectionError, TimeoutError, TransportError)
    return any(
        isinstance(one, transient) or status == 429 or status >= 500
        for one, status in _with_status(error)
    )


def _with_status(error: BaseException | None) -> Iterator[tuple[BaseException, int]]:
    """An error and its causes, each with the HTTP status of its answer, or 0."""
    for one in causes(error, hidden=True):  # `datasets` hides what it met on the Hub
        yield one, getattr(getattr(one, "response", None), "status_code", 0)


def _options(name: str, token: str | None) -> dict[str, str]:
    """Config, split, columns and commit of a data set, as `hf:` takes them."""
    if Path(name).exists():  # `datasets` prefers a folder; a stranger must not name one of ours
        raise NoCardExamplesError(
            f"{name} is also a folder in the working folder, which would be read in its place"
        )
    try:
        commit = pin(name, "", token)
        asked = ["options", name, commit]
        (options,) = cached_entries(asked, lambda: [_options_at(name, commit, token)], dict)
    except ExamplesError:
        raise
    except Exception as error:  # each library and file reader has its own, such as BadZipFile
        raise _fault(name, error) from error
    return options


def _options_at(name: str, commit: str, token: str | None) -> dict[str, str]:
    import datasets as hub  # noqa: PLC0415  (seconds to import, and only needed here)

    access: Any = {"token": token or False, "revision": commit}
    configs = hub.get_dataset_config_names(name, **access)
    config = configs[0] if len(configs) == 1 else "default"
    if config not in configs:
        raise NoCardExamplesError(f"{name} has several configs ({listed(configs, 4)})")
    splits = hub.get_dataset_split_names(name, config, **access)
    no_rows = NoCardExamplesError(f"{name} has no rows")
    if not splits:
        raise no_rows
    options = {"config": config, "split": "train" if "train" in splits else splits[0]}
    options |= {"longest": str(LONGEST_PROMPT), "revision": commit}
    item = next(iter(hub_items(name, options, token)), None)
    if not item:
        raise no_rows
    columns = columns_of(item)
    if columns is None:
        raise NoCardExamplesError(
            f"{name} has the columns {listed(list(item), 8)}, which are none of a prompt and its"
            " answer"
        )
    return options | dict(zip(("prompt", "response"), columns, strict=True))


def _fault(name: str, error: Exception) -> ExamplesError:
    """The error for a failed download: a fault of the Hub is no verdict on the data set."""
    if _is_fault_of_hub(error):
        return ExamplesError(
            f"the Hub cannot be reached for {name}, a data set that an adapter's card names;"
            " try again, or name examples in the recipe"
        )
    is_hidden = any(
        status in (401, 403) or isinstance(one, FileNotFoundError)  # so `datasets` says it
        for one, status in _with_status(error)
    )
    hint = f"; if it is gated or private, {HOW_TO_GET_ACCESS}" if is_hidden else ""
    return NoCardExamplesError(f"{name} cannot be read ({brief(error)}){hint}")


def columns_of(item: Mapping[str, Any]) -> tuple[str, str] | None:
    """The columns of a row's prompt and answer, as `hf:` names them; None in doubt."""
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
