"""Read rows from files, BIG-bench, reasoning-gym, or the Hub.

jsonl:<file>                                 {"prompt", "response", "choices"} a line
bigbench:<task.json>[?split=train|test]      or the folder of a task with subtasks
reasoning_gym:<name>[?seed=1]                generated; needs the extra `reasoning`
hf:<owner>/<name>[?split=…&config=…&revision=…&prompt=<column>&response=<column>&choices=<column>]
hf:<owner>/<name>?turns=<column>             the first question of a conversation, and its answer

Rows of the Hub are read at the present commit of `revision`. `a.b` names a column inside another
(`translation.de`) if none has that name, `a.0` the first entry of a list (`messages.0.content`),
and `a,b` joins two columns. More options: `ask` is a text before every prompt; `part` is train or
test, for data without a test split; `longest` leaves out prompts with more characters, and
`incomplete=skip` rows without a prompt or an answer. Answers are chosen from the column `choices`
if there is one; `choices=<column>` names another one, and `choices=` none.
"""

import json
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode

from meteora.base.sources import path_from
from meteora.untrusted.findings import listed, not_utf8, shortened
from meteora.untrusted.strict_json import StrictJSONError, parse_object, unique_keys
from pipelines.data.hub_rows import exchange_in, hub_items, no_column, text_in, unreadable
from pipelines.data.pinned import DataSetError, ask, cached_entries, pin
from pipelines.data.rows import ExamplesError, Row

MAX_ROW_CHARACTERS = 1 << 20
"""Most characters of a line of a file, and of a row of the Hub."""
MAX_TASK_BYTES = 1 << 28
"""Most bytes of a file of BIG-bench."""
TEST_SHARE = 5
"""One row in five is for tests, by the hash of its prompt, if a source has no test split."""
PARTS = ("all", "train", "test")
INCOMPLETE = ("refuse", "skip")
"""What becomes of a row of the Hub without a prompt or an answer; the first is the default."""


def no_token(_repo_id: str) -> str | None:
    """Send no token to any repository."""
    return None


@dataclass(frozen=True)
class Request:
    """The arguments of `read_rows`, with the parts of the source."""

    source: str
    """Kind and name, without options; for messages."""
    name: str
    folder: Path
    options: dict[str, str]
    limit: int
    token_of: Callable[[str], str | None]
    answered: bool

    @property
    def path(self) -> Path:
        """The path of the file or folder that `name` names."""
        return path_from(self.folder, self.name)


def read_rows(
    source: str,
    folder: Path,
    limit: int,
    token_of: Callable[[str], str | None] = no_token,
    *,
    answered: bool = True,
) -> list[Row]:
    """The first `limit` rows of a source.

    Args:
        source: as in this module's docstring
        folder: paths are relative to it
        token_of: the token that is sent for a repository of the Hub
        answered: whether rows of a file or of the Hub need a response; a pool of prompts has none

    Raises:
        ExamplesError: the source is unknown, cannot be read, or has no rows.
    """
    if not source.strip():
        raise ExamplesError(f"the source of rows {source!r} names nothing")
    kind, name, options = _split(source)
    if ":" not in source or kind not in READERS:
        is_file = path_from(folder, source).is_file()
        guess = f" (did you mean jsonl:{source}?)" if is_file else ""
        known = ", ".join(f"`{known}:…`" for known in READERS)
        raise ExamplesError(f"{source}{guess}: rows come from {known}")
    if not name.strip():
        raise ExamplesError(f"{source}: behind `{kind}:` a file or a data set has to be named")
    allowed, read = READERS[kind]
    if unknown := options.keys() - allowed:
        known = ", ".join(sorted(allowed))
        raise ExamplesError(f"{source}: unknown option {unknown.pop()!r}; {kind} takes {known}")
    request = Request(f"{kind}:{name}", name, folder, options, limit, token_of, answered)
    rows = list(islice(read(request), limit))
    if not rows:
        raise ExamplesError(f"{source}: no rows in it")
    return rows


def _split(source: str) -> tuple[str, str, dict[str, str]]:
    """Kind, name and options of a source; `ExamplesError` if an option is given twice."""
    kind, _, rest = source.partition(":")
    if kind == "jsonl":  # it takes no options, and a path may hold a `?`
        return kind, rest, {}
    name, _, query = rest.partition("?")
    try:
        return kind, name, unique_keys(parse_qsl(query, keep_blank_values=True))
    except StrictJSONError as error:
        raise ExamplesError(f"{source}: {error}; take one out") from None


def data_set_of(source: str) -> tuple[str, str]:
    """The `owner/name` of a source's data set of the Hub, and its commit; both empty if unknown."""
    try:
        kind, name, options = _split(source)
    except ExamplesError:  # a stranger's manifest may name anything
        return "", ""
    return (name, options.get("revision", "")) if kind == "hf" else ("", "")


def pin_source(source: str, token_of: Callable[[str], str | None]) -> str:
    """A source of rows with its commit, if it is a data set of the Hub; else empty.

    Raises:
        ExamplesError: the Hub has no such data set or revision, or does not answer.
    """
    kind, name, options = _split(source)
    if kind != "hf":
        return ""
    commit = _pin(name, options, token_of(name))
    return f"hf:{name}?{urlencode(options | {'revision': commit}, safe=',.')}" if commit else ""


def _pin(name: str, options: Mapping[str, str], token: str | None) -> str:
    try:
        return pin(name, options.get("revision", ""), token)
    except DataSetError as error:
        raise unreadable(name, error) from error


def _jsonl(request: Request) -> Iterator[Row]:
    for line, place in json_lines(request.path):
        yield _row(line, place, answered=request.answered)


def row_place(source: str, folder: Path, number: int) -> str:
    """The place of a row, by its number from 0, in its source, for a message."""
    kind, _, name = source.partition(":")
    if kind != "jsonl":
        return f"{source}, row {number + 1}"
    places = (place for _, place in json_lines(path_from(folder, name)))
    return next(islice(places, number, None), source)


def json_lines(path: Path) -> Iterator[tuple[str, str]]:
    """The lines of a file that are not blank, each with its place for error messages.

    Raises:
        ExamplesError: the file cannot be read, or a line is too long.
    """
    _refuse_pipe(path)
    try:
        with path.open(encoding="utf-8-sig") as file:
            # limited, since some files have no line break, and devices have no end
            lines = iter(partial(file.readline, MAX_ROW_CHARACTERS + 1), "")
            for number, line in enumerate(lines, 1):
                place = f"{path}, line {number}"
                if len(line) > MAX_ROW_CHARACTERS:
                    raise ExamplesError(f"{place}: longer than {MAX_ROW_CHARACTERS:,} characters")
                if line.strip():
                    yield line, place
    except UnicodeDecodeError as error:
        raise ExamplesError(f"{path}, {not_utf8(path, error)}") from error
    except FileNotFoundError as error:
        options = ", and jsonl takes no options behind a `?`" if "?" in path.name else ""
        raise ExamplesError(
            f"{path.absolute()}: there is no such file; check the path of the rows{options}"
        ) from error
    except OSError as error:
        raise ExamplesError(f"{path}: {error.strerror or error}") from error


def json_of(line: str, place: str) -> Any:  # noqa: ANN401  (JSON)
    """What a line of a file holds.

    Raises:
        ExamplesError: a key is given twice, and parsers take the first or the last; or a number is
            too long for Python.
        ValueError, RecursionError: it is no JSON.
    """
    try:
        return json.loads(line, object_pairs_hook=unique_keys)
    except json.JSONDecodeError:
        raise
    except StrictJSONError as error:
        raise ExamplesError(f"{place}: {error}; take one out") from None
    except ValueError:
        raise ExamplesError(f"{place}: it has a number of thousands of digits") from None


def _refuse_pipe(path: Path) -> None:
    if path.is_fifo() or path.is_socket():
        raise ExamplesError(f"{path}: a pipe, which may never end; rows are read from a file")


def _row(line: str, place: str, *, answered: bool) -> Row:
    try:
        body = json_of(line, place)
        row = Row(body["prompt"], "")
        if answered:
            references = body.get("references")
            more = [references] if isinstance(references, str) else references
            choices = _texts(body.get("choices"), f"{place}: `choices`")
            row = Row(row.prompt, body["response"], choices, _texts(more, f"{place}: `references`"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        needed = '{"prompt": "…", "response": "…"}' if answered else '{"prompt": "…"}'
        raise ExamplesError(
            f"{place}: not a row; {needed} is needed, and it is {_described(line)}"
        ) from error
    return check_row(row, place)


def _texts(value: object, what: str) -> tuple[str, ...]:
    """A list of texts as a tuple; empty if there is none. A plain text is refused, too."""
    if not value:
        return ()
    if not isinstance(value, list):
        raise ExamplesError(f"{what}: a list of texts is needed, and it is {shortened(value)}")
    if others := [one for one in value if not isinstance(one, str)]:
        raise ExamplesError(
            f"{what}: a list of texts is needed, and {shortened(others[0])} is none"
        )
    return tuple(value)


def _described(line: str) -> str:
    """A short description of a line that is no row."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return "no JSON"
    if isinstance(value, dict):
        return f"a table with the keys {listed(list(value), 8)}" if value else "an empty table"
    return f"{shortened(value)}, not a table"


def check_row(row: Row, place: str, advice: str = "") -> Row:
    """Check a row, and return it; `advice` is for an answer that is not among its choices.

    Raises:
        ExamplesError: it is not text, its prompt is empty, or an answer is not among its choices.
    """
    texts = (row.prompt, *row.answers, *row.choices)
    if not all(isinstance(text, str) for text in texts) or not row.prompt.strip():
        raise ExamplesError(f"{place}: prompt and response must be text, and the prompt not empty")
    refuse_half_characters("".join(texts), place)
    if row.choices and (strange := set(row.answers) - set(row.choices)):
        raise ExamplesError(
            f"{place}: the answer {shortened(strange.pop())!r} is not one of its choices{advice}"
        )
    return row


def refuse_half_characters(text: str, place: str) -> None:
    """Raise `ExamplesError` for half of a surrogate pair: it cannot be tokenized or hashed."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ExamplesError(
            f"{place}: it has half of a surrogate pair, which is no character; take that out"
        ) from error


def _bigbench(request: Request) -> Iterator[Row]:
    split = _choice(request, "split", PARTS)
    return (row for row in _bigbench_rows(request.path) if _belongs(row, split))


def _choice(request: Request, key: str, allowed: Sequence[str]) -> str:
    """The value of an option; the first allowed one if it is not given."""
    value = request.options.get(key, allowed[0])
    if value not in allowed:
        raise ExamplesError(f"{request.source}: {key}={value!r} is none of {', '.join(allowed)}")
    return value


def _digits(request: Request, key: str, default: int) -> str:
    """The value of an option that is a number, as it is written."""
    value = request.options.get(key, str(default))
    if not value.isdecimal() or len(value) > 9:
        raise ExamplesError(
            f"{request.source}: {key}={value!r} is not a number of at most nine digits"
        )
    return value


def _belongs(row: Row, part: str) -> bool:
    """Whether a row is in this part; rows with equal prompts are in the same part."""
    held = int(row.sha256[:8], 16) % TEST_SHARE == 0
    return part == "all" or held == (part == "test")


def _in_turns(parts: Iterable[Iterable[Row]]) -> Iterator[Row]:
    """One row of each subtask in turn, so that the first rows are from all of them."""
    rounds = zip_longest(*parts)
    return (row for row in chain.from_iterable(rounds) if row is not None)


def _bigbench_rows(path: Path) -> Iterator[Row]:
    """The examples of a task, or of its subtasks in turn, from one file or from folders."""
    if path.is_dir():
        files = [path / "task.json"] if (path / "task.json").is_file() else []
        files = files or sorted(path.glob("*/task.json"))
        if not files:
            raise ExamplesError(f"{path}: there is no task.json in it or in its folders")
        yield from _in_turns(_bigbench_rows(file) for file in files)
        return
    _refuse_pipe(path)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_TASK_BYTES + 1)
        if len(data) > MAX_TASK_BYTES:
            raise ExamplesError(f"{path}: larger than {MAX_TASK_BYTES:,} bytes")
        body = parse_object(data.removeprefix(BOM_UTF8))
    except (OSError, StrictJSONError) as error:
        raise ExamplesError(
            f"{path}: not readable as JSON: {getattr(error, 'strerror', None) or error}"
        ) from error
    parts = body.get("subtasks")
    parts = parts if isinstance(parts, list) and parts else [body]
    yield from _in_turns(_bigbench_part(body, part, path) for part in parts)


def _bigbench_part(body: dict[str, Any], part: Any, path: Path) -> Iterator[Row]:  # noqa: ANN401
    if not isinstance(part, dict) or not isinstance(part.get("examples"), list):
        raise ExamplesError(f"{path}: a BIG-bench task needs a list `examples`, or `subtasks`")
    settings = {**body, **part}
    for number, example in enumerate(part["examples"], 1):
        yield _bigbench_row(settings, example, f"{path}, example {number}")


def _bigbench_row(task: Mapping[str, Any], example: Any, place: str) -> Row:  # noqa: ANN401
    """One example with the prompt that BIG-bench gives a model, zero-shot."""
    try:
        target_scores = example.get("target_scores") or {}
        scores = {str(choice): float(score) for choice, score in target_scores.items()}
        if scores:
            best = max(scores.values())
            right = [choice for choice, score in scores.items() if score == best]
        else:
            target = example["target"]
            right = list(target) if isinstance(target, list) else [target]
        shown = scores if task.get("append_choices_to_input", True) else ()
        prefix = task.get("choice_prefix", "\n  choice: ")
        prompt = (
            task.get("task_prefix", "")
            + task.get("example_input_prefix", "\nQ: ")
            + example["input"]
            + "".join(f"{prefix}{choice}" for choice in shown)
            + task.get("example_output_prefix", "\nA: ")
        )
        row = Row(prompt.strip(), right[0], tuple(scores), tuple(dict.fromkeys(right[1:])))
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ExamplesError(
            f"{place}: not an example; `input` with `target` or `target_scores` is needed"
        ) from error
    return check_row(row, place)


def _reasoning_gym(request: Request) -> Iterator[Row]:
    seed = _digits(request, "seed", 0)
    task = reasoning_task(request.name, int(seed), request.limit)
    for number in range(request.limit):
        entry = task[number]
        place = f"{request.source}, entry {number}"
        checker = f"{request.source}@{seed}#{number}"
        yield check_row(Row(str(entry["question"]), str(entry["answer"]), checker=checker), place)


@lru_cache(maxsize=8)
def reasoning_task(name: str, seed: int, size: int) -> Any:  # noqa: ANN401  (its own type)
    """A task of reasoning-gym. Entry `n` depends on name and seed, but not on the size.

    Raises:
        ExamplesError: reasoning-gym is not installed, or has no such task.
    """
    try:
        import reasoning_gym  # noqa: PLC0415  (an extra)
    except ImportError as error:
        raise ExamplesError(
            f"reasoning_gym:{name} needs a package that is not installed:"
            " `pip install meteora-pipelines[reasoning]`"
        ) from error
    try:
        return reasoning_gym.create_dataset(name, seed=seed, size=size)
    except (ValueError, TypeError, AssertionError) as error:
        raise ExamplesError(f"reasoning_gym:{name}: {error}") from error


def _hub(request: Request) -> Iterable[Row]:
    """Rows of the Hub; rows of a commit are cached."""
    name, token = request.name, request.token_of(request.name)
    commit = _pin(name, request.options, token)
    options = request.options | {"revision": commit}
    key = [name, options, request.limit, request.answered]
    make = partial(ask, hub_rows, *key, token)
    try:
        return cached_entries(key, make, Row.from_dict) if commit else map(Row.from_dict, make())
    except DataSetError as error:
        raise unreadable(name, error) from error


def hub_rows(
    name: str, options: dict[str, str], limit: int, answered: bool, token: str | None
) -> list[dict[str, Any]]:
    """The rows of a data set of the Hub as JSON; the arguments are those of a `Request`."""
    request = Request(f"hf:{name}", name, Path(), options, limit, no_token, answered)
    return [row.to_dict() for row in islice(_hub_rows(request, token), limit)]


def _hub_rows(request: Request, token: str | None) -> Iterator[Row]:
    source, options = request.source, request.options
    part = _choice(request, "part", PARTS)
    longest = int(_digits(request, "longest", MAX_ROW_CHARACTERS))
    skips = _choice(request, "incomplete", INCOMPLETE) == "skip"
    if "turns" in options and (also := options.keys() & {"prompt", "response"}):
        raise ExamplesError(
            f"{source}: turns={options['turns']!r} has question and answer, so take"
            f" {' and '.join(sorted(also))} out"
        )
    for number, item in enumerate(hub_items(request.name, options, token)):
        texts = _hub_texts(item, request, skips=skips)
        if skips and not all(text.strip() for text in texts):
            continue
        prompt, response = (options.get("ask", "") + texts[0], *texts[1:], "")[:2]
        choices = _choices(item, request) if request.answered else ()
        if len(prompt) > longest or not _belongs(row := Row(prompt, response, choices), part):
            continue
        place = f"{source}, row {number}"
        if len(response) + sum(map(len, choices)) > MAX_ROW_CHARACTERS:
            raise ExamplesError(
                f"{place}: its answer has more than {MAX_ROW_CHARACTERS:,} characters"
            )
        # an answer may be the letter of a choice
        advice = "; name the column of the answer's text, or leave the choices out by `choices=`"
        yield check_row(row, place, advice)


def _hub_texts(item: Mapping[str, Any], request: Request, *, skips: bool) -> list[str]:
    """The prompt of an item, and its answer if the request asks for one.

    With `skips` a missing text is empty; else it is an error.
    """
    options, names = request.options, ("prompt", "response")[: 1 + request.answered]
    if turns := options.get("turns"):
        if missing := [column for column in turns.split(",") if column not in item]:
            advice = "name the column of the turns with ?turns=…"
            raise no_column(request.name, missing[0], item, advice)
        texts = exchange_in(item, turns)[: len(names)]
        if not skips and not all(text.strip() for text in texts):
            raise ExamplesError(
                f"{request.source}: a row has no question with an answer as text in its column"
                f" {turns!r}; leave such rows out with incomplete=skip"
            )
        return list(texts)
    return [text_in(item, options.get(n, n), request.name, may_miss=skips) for n in names]


def _choices(item: Mapping[str, Any], request: Request) -> tuple[str, ...]:
    column = request.options.get("choices", "choices")
    if column and "choices" in request.options and column not in item:
        advice = "name the column of the choices with ?choices=…"
        raise no_column(request.name, column, item, advice)
    texts = item.get(column)
    # ARC has a table of texts and their labels
    texts = texts.get("text", texts) if isinstance(texts, dict) else texts
    return _texts(texts, f"{request.source}: its column {column!r} (choices= leaves it out)")


HUB_OPTIONS = {
    "config", "split", "revision", "prompt", "response", "turns", "choices", "ask", "part",
    "longest", "incomplete",
}  # fmt: skip
READERS: dict[str, tuple[set[str], Callable[[Request], Iterable[Row]]]] = {
    "jsonl": (set(), _jsonl),
    "bigbench": ({"split"}, _bigbench),
    "reasoning_gym": ({"seed"}, _reasoning_gym),
    "hf": (HUB_OPTIONS, _hub),
}
"""For each kind of source, its options, and the function that reads it."""
