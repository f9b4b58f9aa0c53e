"""Examples of an adapter for which the recipe names none: rows of a data set that its card names.

A card is a stranger's text. So `datasets` reads the data set in a process with a limit of memory,
and runs none of its code, and a data set whose columns are unclear is not used.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from huggingface_hub import HfApi

from meteora.untrusted.findings import listed
from pipelines.data.hub_rows import HOW_TO_GET_ACCESS, exchange_in, hub_items, limited_datasets
from pipelines.data.pinned import DataSetError, ask, cached_entries, pin
from pipelines.data.row_sources import data_set_of, read_rows
from pipelines.data.rows import ExamplesError, Row
from pipelines.hub.card import stated_licence

COLUMNS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("prompt", "chosen"),
    ("instruction,input", "output"),
    ("instruction,context", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question,context", "answer"),
    ("question", "answer"),
    ("question", "response"),
    ("question", "chosen"),
    ("query", "response"),
    ("query", "answer"),
    ("input", "output"),
    ("inputs", "targets"),
    ("user", "assistant"),
    ("human", "assistant"),
    ("source", "target"),
    ("article", "highlights"),
    ("document", "summary"),
    ("dialogue", "summary"),
)
"""Pairs of columns that hold a prompt and its answer, the most certain first. Of the two answers of
a preference the chosen one counts."""
TURNS = (
    "messages",
    "conversations",
    "conversation",
    "prompt,completion",
    "prompt,chosen",
    "chosen",
)
"""Columns of turns, the most certain first; with a comma, a conversation in two columns."""
SEEN = 16
"""The first rows, by which the columns are chosen."""
LICENCE_SECONDS = 5.0
"""Time for the Hub to tell the licence of a data set, which is only noted."""
LONGEST_PROMPT = 8_000
"""Characters. Longer prompts are left out: fitting to them would take too much memory."""


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
            cause = error.__cause__
            if isinstance(cause, DataSetError):
                if cause.is_fault_of_hub:
                    raise
                error = _fault(name, cause)
            reasons.append(str(error))
    raise NoCardExamplesError("; ".join(reasons) or "its card names no data set of the Hub")


def licences_of_data_sets(
    sources: Iterable[str], token_of: Callable[[str], str | None]
) -> dict[str, str]:
    """The licences that data sets of the Hub state at the commits of `sources`, by `owner/name`.

    Those that the Hub does not tell are left out; if it fails, no more are asked for.
    """
    licences = {}
    for name, commit in dict.fromkeys(map(data_set_of, sources)):
        try:
            licence = _licence_of(name, commit, token_of(name))
        except DataSetError as error:
            if error.is_fault_of_hub:
                break
            continue
        if licence:
            licences[name] = licence
    return licences


def _licence_of(name: str, commit: str, token: str | None) -> str:
    def make() -> list[dict[str, str]]:
        licence = ask(licence_at, name, commit, token, seconds=LICENCE_SECONDS)
        return [{"licence": licence}]

    (licence,) = cached_entries(["licence", name, commit], make, lambda e: str(e["licence"]))
    return licence


def licence_at(name: str, commit: str, token: str | None) -> str:
    """The licence that a data set states at a commit; empty for none."""
    card = HfApi().dataset_info(name, revision=commit, token=token or False).card_data
    return stated_licence(card and card.get("license"))


def _options(name: str, token: str | None) -> dict[str, str]:
    """Config, split, columns and commit of a data set, as `hf:` takes them."""
    if Path(name).exists():  # `datasets` prefers a folder; a stranger must not name one of ours
        raise NoCardExamplesError(
            f"{name} is also a folder in the working folder, which would be read in its place"
        )
    try:
        commit = pin(name, "", token)
        asked = ["options", COLUMNS, TURNS, name, commit]
        make = partial(ask, options_at, name, commit, token)
        (options,) = cached_entries(asked, lambda: [make()], dict)
    except DataSetError as error:
        raise _fault(name, error) from error
    return options


def options_at(name: str, commit: str, token: str | None) -> dict[str, str]:
    """Config, split and columns of a data set at a commit.

    Raises:
        NoCardExamplesError: they are not clear.
        Exception: the data set cannot be read.
    """
    hub = limited_datasets()
    access: Any = {"token": token or False, "revision": commit}
    config = hub.get_dataset_default_config_name(name, **access)
    if config is None:
        configs = listed(hub.get_dataset_config_names(name, **access), 4)
        raise NoCardExamplesError(
            f"{name} has several configs ({configs}), and none is its default"
        )
    splits = hub.get_dataset_split_names(name, config, **access)
    no_rows = NoCardExamplesError(f"{name} has no rows")
    if not splits:
        raise no_rows
    trains = [split for split in splits if split.startswith("train")]
    split = "train" if "train" in splits else (trains or splits)[0]
    options = {"config": config, "split": split}
    options |= {"longest": str(LONGEST_PROMPT), "incomplete": "skip", "revision": commit}
    items = list(islice(hub_items(name, options, token), SEEN))
    if not items:
        raise no_rows
    columns = columns_of(items)
    if columns is None:
        raise NoCardExamplesError(
            f"{name} has the columns {listed(list(items[0]), 8)}, which are none of a prompt and"
            " its answer as text"
        )
    return options | columns


def _fault(name: str, error: DataSetError) -> ExamplesError:
    """The error for a failed download: a fault of the Hub is no verdict on the data set."""
    if error.is_fault_of_hub:
        return ExamplesError(
            f"the Hub cannot be reached for {name}, a data set that an adapter's card names;"
            " try again, or name examples in the recipe"
        )
    hint = f"; if it is gated or private, {HOW_TO_GET_ACCESS}" if error.is_hidden else ""
    return NoCardExamplesError(f"{name} cannot be read ({error}){hint}")


def columns_of(items: Sequence[Mapping[str, Any]]) -> dict[str, str] | None:
    """The columns with a prompt and its answer in some rows, as options of `hf:`; None in doubt.

    Upper and lower case are the same, unless that makes two columns one.
    """
    lower = Counter(name.lower() for name in items[0])
    names = {name.lower(): name for name in items[0] if lower[name.lower()] == 1}

    def named(columns: str) -> str:
        """The columns as they are written there; empty if one is missing."""
        asked = columns.split(",")
        return ",".join(names[one] for one in asked) if names.keys() >= {*asked} else ""

    for prompt, response in COLUMNS:
        options = {"prompt": named(prompt), "response": named(response)}
        if all(options.values()) and _is_text(items, options):
            return options
    for columns in map(named, TURNS):
        if columns and any(all(exchange_in(item, columns)) for item in items):
            return {"turns": columns}
    return None


def _is_text(items: Sequence[Mapping[str, Any]], options: Mapping[str, str]) -> bool:
    """Whether columns hold text or nothing, and in one row both prompt and answer."""
    columns = ",".join(options.values()).split(",")
    texts = all(isinstance(item.get(name), str | None) for item in items for name in columns)
    return texts and any(
        all(any(item.get(name) for name in own.split(",")) for own in options.values())
        for item in items
    )
