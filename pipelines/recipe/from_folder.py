"""`meteora import`: a recipe from a folder of PEFT adapters, with defaults to change."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from meteora.adapters import reader
from meteora.artifacts import REPO_ID, MeteoraError
from pipelines.recipe.recipe import LONGEST_NAME, Recipe

if TYPE_CHECKING:
    from collections.abc import Sequence

CONFIG = "adapter_config.json"
EXAMPLES = ("train.jsonl", "examples.jsonl")
TESTS = ("test.jsonl", "eval.jsonl")


class ImportingError(MeteoraError):
    """No recipe can be made of a folder."""


@dataclass(frozen=True)
class Found:
    """An adapter in the folder, and why it is refused, if it is."""

    folder: Path
    name: str
    base: str
    refusal: str = ""


def write_recipe(folder: Path, out: Path, base: str = "") -> Recipe:
    """Write a recipe of every adapter under `folder` that can be an expert.

    Args:
        out: The recipe's file, a new one; paths in it are relative to its folder.
        base: As in a recipe. Default: the base that most adapters' configs name.

    Raises:
        ImportingError: There are no adapters, no base is named, or the file is there already.
    """
    if out.exists():
        raise ImportingError(f"{out} is there already; give another name with -o")
    found = find_adapters(folder)
    usable = [adapter for adapter in found if not adapter.refusal]
    if not usable:
        refusals = "; ".join(f"{one.folder}: {one.refusal}" for one in found[:5])
        raise ImportingError(
            f"{folder}: no adapter in it can be an expert ({refusals or 'no ' + CONFIG})"
        )
    if not base:
        base = _base_of(usable, folder, out.parent)
    text = recipe_text(found, base, out.parent)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    partial.write_text(text, encoding="utf-8")
    try:
        recipe = Recipe.load(partial)
    except MeteoraError:
        partial.unlink()
        raise
    partial.rename(out)
    return recipe


def find_adapters(folder: Path) -> list[Found]:
    """Every adapter in a folder or right below it, sorted by name, each judged."""
    configs = [folder / CONFIG] if (folder / CONFIG).is_file() else []
    configs += sorted(folder.glob(f"*/{CONFIG}"))
    found: list[Found] = []
    for config in configs:
        verdict = reader.check(config.parent)
        refusal = ""
        if verdict.verdict == "refuse":
            refusal = "; ".join(reason.message for reason in verdict.reasons)
        revision = verdict.facts.get("base_revision") or ""
        base = verdict.facts.get("base_model") or ""
        name = _name(config.parent.resolve().name, {one.name for one in found})
        at = f"@{revision}" if base and revision else ""
        found.append(Found(config.parent, name, f"{base}{at}", refusal))
    return found


def recipe_text(found: Sequence[Found], base: str, folder: Path) -> str:
    """The recipe as YAML, with comments where a person has to decide."""
    usable = [adapter for adapter in found if not adapter.refusal]
    with_examples = all(_rows(one, EXAMPLES, folder) for one in usable)
    lines = [f"base: {_text(base)}", "experts:"]
    for one in found:
        if one.refusal:
            lines.append(f"  # left out, {_path(one.folder, folder)}: {_line(one.refusal)}")
            continue
        lines += [
            f"  - name: {_text(one.name)}",
            f"    adapter: {_text('path:' + _path(one.folder, folder))}",
        ]
        if one.base and one.base != base and not base.startswith("path:"):
            lines.append(f"    # its config says that its base is {_line(one.base)}")
        examples, tests = _rows(one, EXAMPLES, folder), _rows(one, TESTS, folder)
        lines.append(
            f"    examples: {_text(examples)}"
            if examples
            else f"    # examples: jsonl:{one.name}/train.jsonl  # "
            '{"prompt", "response"} a line; a trained gate needs them'
        )
        lines.append(
            f"    test: {_text(tests)}"
            if tests
            else f"    # test: jsonl:{one.name}/test.jsonl  # held-out rows; what is scored"
        )
    router = "router: {kind: gate, top_k: 1}"
    if with_examples:
        return "\n".join([*lines, router, ""])
    return "\n".join(
        [
            *lines,
            "# arrow needs no examples; a gate chooses better where every expert has some:",
            f"# {router}",
            "router: {kind: arrow, top_k: 1}",
            "",
        ]
    )


def _base_of(usable: Sequence[Found], folder: Path, beside: Path) -> str:
    """The base that most adapters name: a Hub id, or a folder of this machine."""
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
        return f"path:{_path(local, beside)}"
    raise ImportingError(
        f"{folder}: its adapters name the base {base!r}, which is no owner/name and no folder here;"
        " say where it is with --base"
    )


def _rows(one: Found, names: Sequence[str], folder: Path) -> str:
    """The first of these files beside an adapter, as a recipe names it; empty if there is none."""
    path = next((one.folder / name for name in names if (one.folder / name).is_file()), None)
    return f"jsonl:{_path(path, folder)}" if path else ""


def _path(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path, folder)).as_posix()


def _name(text: str, taken: set[str]) -> str:
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", text).lstrip("_.-")[: LONGEST_NAME - 4] or "adapter"
    numbered = (name, *(f"{name}-{n}" for n in range(2, 1000)))
    return next(one for one in numbered if one not in taken)


def _text(value: str) -> str:
    """A string in YAML: bare if that is safe, else quoted as JSON, which YAML can read."""
    return (
        value
        if re.fullmatch(r"[A-Za-z][A-Za-z0-9_./:@-]*[A-Za-z0-9_/]", value)
        else json.dumps(value)
    )


def _line(text: str) -> str:
    """Text from strangers as a YAML comment: on one line, without control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:300]
