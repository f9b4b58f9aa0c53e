"""`meteora import`: make a recipe from a folder of PEFT adapters, with defaults to change."""

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path

import yaml

from meteora.adapters import reader
from meteora.adapters.files import CONFIG
from meteora.artifacts import REPO_ID, MeteoraError
from meteora.base.sources import GGUF, PATH, path_from
from meteora.untrusted.strict_yaml import parse_yaml
from pipelines.recipe.benchmark import MIX
from pipelines.recipe.recipe import LONGEST_NAME, Recipe
from store.files import replace_text

EXAMPLES = ("train.jsonl", "examples.jsonl")
TESTS = ("test.jsonl", "eval.jsonl")
"""Files of rows beside an adapter, or in another folder, in a subfolder with the adapter's name."""


class ImportingError(MeteoraError):
    """No recipe can be made from a folder."""


@dataclass(frozen=True)
class Found:
    """An adapter in the folder, its rows, and the reason if it is refused."""

    folder: Path
    name: str
    base: str
    refusal: str = ""
    examples: Path | None = None
    test: Path | None = None
    note: str = ""
    """A change of its rows, for a comment in the recipe."""
    rows: str = ""
    """The content of its file of examples, if that is to be written beside the recipe."""


def write_recipe(
    folder: Path,
    out: Path,
    base: str = "",
    examples: Path | None = None,
    pool: Path | None = None,
    prepare: Callable[[Sequence[Found]], Sequence[Found]] = tuple,
) -> Recipe:
    """Write a recipe of every adapter under `folder` that can be an expert.

    Args:
        out: The recipe's file, a new one; paths in it are relative to its folder.
        base: A folder, or as in a recipe. Default: the base that most adapters' configs name.
        examples: A folder with rows for the adapters; see `find_rows`. Default: beside each.
        pool: A file of prompts without labels, for adapters without examples.
        prepare: Called with all adapters, refused ones among them; may change their rows. Files
            of rows are written right before the recipe, when nothing is left to refuse.

    Raises:
        ImportingError: There is no folder, or no usable adapter in it; no base is named, or `base`
            has another form; `examples` has no rows for the adapters; there is no file `pool`; or
            `out` or a file of rows exists already, or its folder is a file.
    """
    if pool is not None and not pool.is_file():
        raise ImportingError(f"{pool}: there is no such file of prompts")
    if not folder.is_dir():
        raise ImportingError(f"{folder}: there is no such folder of adapters")
    _refuse_taken(out)
    if examples is not None and not examples.is_dir():
        raise ImportingError(f"{examples}: there is no such folder of rows; check its path")
    adapters = [one if one.refusal else find_rows(one, examples) for one in find_adapters(folder)]
    usable = [adapter for adapter in adapters if not adapter.refusal]
    if not usable:
        refusals = "; ".join(f"{one.folder}: {one.refusal}" for one in adapters[:5])
        raise ImportingError(
            f"{folder}: no adapter in it can be an expert ({refusals or 'no ' + CONFIG})"
        )
    if examples is not None and not any(one.examples or one.test for one in usable):
        names = ", ".join(_called(one.folder) for one in usable[:5])
        raise ImportingError(
            f"{examples}: it has no rows for {names}; {EXAMPLES[0]} and {TESTS[0]} in a folder with"
            f" the adapter's name are needed, or NAME.{EXAMPLES[0]} and NAME.{TESTS[0]}"
        )
    base = _given_base(base, out.parent) if base else _base_of(usable, folder, out.parent)
    prepared = prepare(adapters)
    text = recipe_text(prepared, base, out.parent, pool)
    recipe = Recipe.parse(text.encode(), out)
    files = {one.examples: one.rows for one in prepared if one.examples and one.rows}
    for path in files:
        _refuse_taken(path)
    for path, content in (files | {out: text}).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, content)
    return recipe


def _refuse_taken(path: Path) -> None:
    """Raise `ImportingError` if something is there, or a file in place of a folder around it."""
    if path.exists():
        raise ImportingError(f"{path} is there already; give another name with -o")
    around = next(one for one in path.parents if one.exists())
    if not around.is_dir():
        raise ImportingError(
            f"{around} is no folder, so {path} cannot be written; give another name with -o"
        )


def find_adapters(folder: Path) -> list[Found]:
    """The adapter in a folder, or every one right below it, sorted by name, each judged.

    A folder that may not be opened is judged, too, since it may hold one.
    """
    here = folder / CONFIG
    closed = (one / CONFIG for one in folder.glob("*/") if not os.access(one, os.R_OK | os.X_OK))
    configs = [here] if here.is_file() else sorted({*folder.glob(f"*/{CONFIG}"), *closed})
    adapters: list[Found] = []
    for config in configs:
        verdict = reader.check(config.parent)
        refusal = ""
        if verdict.verdict == "refuse":
            refusal = "; ".join(reason.message for reason in verdict.reasons)
        revision = verdict.facts.get("base_revision") or ""
        base = verdict.facts.get("base_model") or ""
        name = _name(_called(config.parent), {one.name for one in adapters})
        at = f"@{revision}" if base and revision else ""
        adapters.append(Found(config.parent, name, f"{base}{at}", refusal))
    return adapters


def adapters_below(folder: Path) -> list[Path]:
    """The folders of adapters that `find_adapters` leaves out since they lie deeper, sorted.

    An adapter's own checkpoints of its training are not meant by anybody.
    """
    depth = "*" if (folder / CONFIG).is_file() else "*/*"
    below = sorted(path.parent for path in folder.glob(f"{depth}/{CONFIG}"))
    return [
        path
        for path in below
        if not (path.name.startswith("checkpoint-") and (path.parent / CONFIG).is_file())
    ]


def find_rows(adapter: Found, folder: Path | None) -> Found:
    """The adapter with its files of rows: `train.jsonl` and `test.jsonl`, or their other names.

    Args:
        folder: Holds the files in a subfolder with the adapter's name, or itself, as
            `<name>.train.jsonl`. None: they are beside the adapter.
    """
    name = _called(adapter.folder)

    def first(names: Sequence[str]) -> Path | None:
        if folder is None:
            paths = [adapter.folder / one for one in names]
        else:
            paths = [folder / name / one for one in names]
            paths += [folder / f"{name}.{one}" for one in names]
        return next((path for path in paths if path.is_file()), None)

    return replace(adapter, examples=first(EXAMPLES), test=first(TESTS))


def recipe_text(found: Sequence[Found], base: str, folder: Path, pool: Path | None) -> str:
    """The recipe as YAML, with comments where a person has to decide."""
    without = 'no examples were found: a file of {"prompt", "response"} a line, for a gate'
    if pool:
        without = "its examples come from the pool"
    untested = "no tests were found: held-out rows, which are scored"
    lines = [f"base: {_text(base)}", "experts:"]
    for one in found:
        if one.refusal:
            where = _line(_path(one.folder, folder))
            lines.append(f"  # left out, {where}: {_line(one.refusal)}")
            continue
        lines += [
            f"  - name: {_text(one.name)}",
            f"    adapter: {_text(PATH + _path(one.folder, folder))}",
        ]
        if one.base and one.base != base and not base.startswith(PATH):
            lines.append(f"    # its config says that its base is {_line(one.base)}")
        if one.note:
            lines.append(f"    # {_line(one.note)}")
        rows = (("examples", one.examples, without), ("test", one.test, untested))
        for key, path, absent in rows:
            text = f"{key}: {_text('jsonl:' + _path(path, folder))}" if path else f"# {absent}"
            lines.append(f"    {text}")
    router = "router: {kind: gate, top_k: 1}"
    if all(one.examples for one in found if not one.refusal):
        lines.append(router)
    elif pool:
        lines += [router, "gates:", f"  pool: {_text('jsonl:' + _path(pool, folder))}"]
    else:
        lines += [
            "# prompt needs no examples; a gate routes each token, where every expert has some:",
            f"# {router}",
            "router: {kind: prompt, top_k: 1}",
        ]
    return "\n".join([*lines, ""])


def _given_base(base: str, beside: Path) -> str:
    """The base that the user names; a folder is relative to the working folder."""
    local = path_from(Path(), base.removeprefix(PATH))
    if local.is_dir():
        return f"{PATH}{_path(local, beside)}"
    if base.startswith(GGUF) or REPO_ID.fullmatch(base.partition("@")[0]):
        return base
    raise ImportingError(
        f"--base {base}: it is no folder here, no owner/name[@revision], and no"
        " gguf:<package>/<file>"
    )


def _base_of(usable: Sequence[Found], folder: Path, beside: Path) -> str:
    """The base that most adapters name: a Hub id, or a folder on this machine."""
    named = Counter(one.base for one in usable if one.base)
    if not named:
        raise ImportingError(
            f"{folder}: no adapter's config names its base; say it with --base owner/name"
        )
    base = named.most_common(1)[0][0]
    if REPO_ID.fullmatch(base.partition("@")[0]) and not Path(base).is_dir():
        return base
    local = Path(base.partition("@")[0])
    if local.is_dir():
        return f"{PATH}{_path(local, beside)}"
    raise ImportingError(
        f"{folder}: its adapters name the base {base!r}, which is no owner/name and no folder here;"
        " say where it is with --base"
    )


def _path(path: Path, folder: Path) -> str:
    """A path relative to a folder; links to the folder are resolved, so `..` leaves its target.

    Raises:
        ImportingError: It is not UTF-8, which a recipe is.
    """
    resolved = path.parent.resolve() / path.name  # a link in the folder keeps its own name
    relative = Path(os.path.relpath(resolved, folder.resolve())).as_posix()
    named = os.fsencode(relative).decode(errors="backslashreplace")
    if named != relative:
        raise ImportingError(f"{named}: its name is not UTF-8, as a recipe is; rename it")
    return relative


def _called(folder: Path) -> str:
    """The name that a folder has here; a link's target may have another."""
    return Path(os.path.abspath(folder)).name  # noqa: PTH100  (without links, without `..`)


def _name(text: str, taken: set[str]) -> str:
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", text).lstrip("_.-")[: LONGEST_NAME - 6] or "adapter"
    name = f"adapter-{name}" if MIX.fullmatch(name) else name
    numbered = (f"{name}-{n}" for n in count(2))
    return next(one for one in chain([name], numbered) if one not in taken)


def _text(value: str) -> str:
    """A string in YAML: bare if a recipe reads that as it is, else in quotes, with escapes."""
    bare = yaml.safe_dump(value, width=math.inf)
    style = None if parse_yaml(bare, typed=True) == value else "'"  # such as 1e-4
    return yaml.safe_dump(value, width=math.inf, default_style=style).removesuffix("...\n").strip()


def _line(text: str) -> str:
    """Untrusted text for a YAML comment: on one line, without control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:300]
