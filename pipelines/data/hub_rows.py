"""The rows of a data set of the Hub, and the prompt and the answer in each.

A column of turns holds a conversation, `[{"role": "user", "content": "…"}, …]`, or with the keys
`from` and `value`. Its first question and the answer to it are a row; a system prompt is left out.
"""

from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from fsspec import AbstractFileSystem, available_protocols, register_implementation

from meteora.untrusted.findings import listed
from pipelines.data.rows import ExamplesError

HOW_TO_GET_ACCESS = (
    "accept its terms on its page or ask its owner, log in with `hf auth login`, and name its owner"
    " in the recipe under hub, token_for, or to the command with --token-for"
)
"""For a data set that is gated or private."""
ASKING, ANSWERING = {"user", "human"}, {"assistant", "gpt"}
KEYS = (("role", "content"), ("from", "value"))
"""The keys of a turn: who says it, and the text."""
PROTOCOLS = {"hf", "file", "local", "zip", "tar"}
"""Where the rows of a data set may be: on the Hub, here, and in archives of these files."""


class UnreadableError(ExamplesError):
    """A data set of the Hub cannot be read; its cause says why."""


class _Elsewhere(AbstractFileSystem):
    """The files of another server, to which a data set may refer: none of them is asked for."""

    def __init__(self, *_arguments: object, **_options: object) -> None:
        raise PermissionError("it refers to files outside its repository, which are not read")


def limited_datasets() -> Any:  # noqa: ANN401  (a module)
    """`datasets`; from now on this process reads files of the Hub and of this machine alone.

    A data set names its files in its README, and they may be addresses inside this network.
    """
    import datasets  # noqa: PLC0415  (seconds to import, and only needed here)

    for protocol in {*available_protocols()} - PROTOCOLS:
        register_implementation(protocol, _Elsewhere, clobber=True)
    return datasets


def hub_items(
    name: str, options: Mapping[str, str], token: str | None
) -> Iterator[Mapping[str, Any]]:
    """The rows of a data set of the Hub, one by one, without conversion.

    Args:
        options: `config`, `split` (default: test) and `revision`

    Raises:
        ExamplesError: the rows of a commit are asked for, and a folder here has the same name.
        Exception: the data set cannot be read; file readers have their own, such as BadZipFile.
    """
    datasets = limited_datasets()
    if options.get("revision") and Path(name).exists():
        raise ExamplesError(
            f"hf:{name}: the folder {name} in the working folder would be read in its place; rename"
            " it, or run in another folder"
        )
    yield from datasets.load_dataset(
        name,
        options.get("config"),
        split=options.get("split", "test"),
        revision=options.get("revision") or None,
        streaming=True,
        token=token or False,
    )


def unreadable(name: str, error: Exception) -> UnreadableError:
    """The error for a data set that a recipe names and that cannot be read."""
    return UnreadableError(
        f"hf:{name} cannot be read from the Hub ({error}); check its name, config and split,"
        " and whether the Hub can be reached; if it is gated or private,"
        f" {HOW_TO_GET_ACCESS}"
    )


def no_column(data_set: str, name: str, item: Mapping[str, Any], advice: str) -> ExamplesError:
    """The error for a column that a data set does not have."""
    columns = listed(list(item), 20)
    return ExamplesError(f"hf:{data_set} has no column {name!r}, it has {columns}; {advice}")


def text_in(item: Mapping[str, Any], names: str, data_set: str, *, may_miss: bool) -> str:
    """The text of a column, or of several joined with an empty line, as far as they have any.

    Args:
        names: `a`; `a.b` for the column b inside a, if there is no column `a.b`; `a.0` for the
            first of a list; `a,b` for two columns
        may_miss: whether the text is empty where no column has any; else that is an error
    """
    texts = []
    for name in names.split(","):
        value: Any = item
        for step in [name] if name in item else name.split("."):
            if isinstance(value, list) and step in map(str, range(len(value))):
                value = value[int(step)]
                continue
            if not isinstance(value, dict) or step not in value:
                advice = "name the columns with ?prompt=…&response=…"
                raise no_column(data_set, name, item, advice)
            value = value[step]
        if not isinstance(value, str | None):
            raise ExamplesError(f"hf:{data_set}: its column {name!r} is not text")
        texts.append(value)
    if not may_miss and all(text is None for text in texts):
        raise ExamplesError(f"hf:{data_set}: a row has no text in its column {names!r}")
    return "\n\n".join(filter(None, texts))


def exchange_in(item: Mapping[str, Any], columns: str) -> tuple[str, str]:
    """The first question of a conversation and its answer; both are empty if there are none.

    With the columns `a,b` the conversation goes on in a second column.
    """
    values = [item.get(name) or [] for name in columns.split(",")]
    turns = [turn for value in values if isinstance(value, list) for turn in value]
    for one, then in pairwise(map(_said, turns)):
        if one[0] in ASKING and then[0] in ANSWERING:
            return one[1], then[1]
    return "", ""


def _said(turn: object) -> tuple[str, str]:
    """Who says a turn, and its text; empty where they are no text."""
    said = turn if isinstance(turn, dict) else {}
    role, content = next((keys for keys in KEYS if keys[0] in said), KEYS[0])
    who, text = said.get(role), said.get(content)
    return (who if isinstance(who, str) else ""), (text if isinstance(text, str) else "")
