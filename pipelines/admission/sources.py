"""Where a recipe's base and adapters come from: each name pinned, each adapter's folder found."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from meteora.artifacts import AdapterRef, BaseSpec, MeteoraError, canonical_sha256
from meteora.base.sources import GGUF, PATH, SourceError, file_sha256, find_gguf, weights_sha256
from pipelines.hub import repositories
from pipelines.hub.adapter import adapter_bytes, download, downloaded
from pipelines.hub.client import Hub, hub_for
from pipelines.recipe.recipe import LONGEST_NAME, FoundExpert

if TYPE_CHECKING:
    from collections.abc import Set as AbstractSet
    from pathlib import Path

    from pipelines.recipe.recipe import ExpertSection, Recipe


class NotHereError(MeteoraError):
    """An adapter was not downloaded yet."""


def hub_of(recipe: Recipe, repo_id: str) -> Hub:
    """The Hub to ask for a repository; the saved token goes along only where the recipe says so."""
    asked = recipe.hub
    return hub_for(repo_id, asked.token_for, endpoint=asked.endpoint, allow_http=asked.allow_http)


def resolve_base(recipe: Recipe, folder: Path) -> BaseSpec:
    """The base at one revision; the weights are hashed where they are local."""
    source = recipe.base
    if source.startswith(GGUF):
        return BaseSpec(source, f"sha256:{file_sha256(find_gguf(source))}")
    if source.startswith(PATH):
        local = folder / source.removeprefix(PATH)
        return BaseSpec(PATH + local.name, f"sha256:{weights_sha256(local)}")
    ref = repositories.resolve(source, hub=hub_of(recipe, source.partition("@")[0]))
    return BaseSpec(ref.repo_id, ref.revision)


def discover(recipe: Recipe) -> Recipe:
    """The recipe with the adapters that it lets be found among its experts, each pinned.

    They come sorted by their repositories: the Hub's own order moves with every download, and the
    order of the experts is part of what a stack is.

    Raises:
        HubError: The Hub does not say what there is.
    """
    asked = recipe.discover
    if asked is None:
        return recipe
    base = asked.base or recipe.base.partition("@")[0]
    refs = repositories.discover(base, tags=asked.tags, limit=asked.limit, hub=hub_of(recipe, base))
    named = {expert.adapter.partition("@")[0] for expert in recipe.experts}
    taken = {expert.name for expert in recipe.experts}
    found = []
    for ref in sorted(refs, key=lambda ref: ref.repo_id):
        if ref.repo_id not in named:
            name = name_of(ref.repo_id, taken)
            taken.add(name)
            found.append(FoundExpert(name=name, adapter=f"{ref.repo_id}@{ref.revision}"))
    return recipe.model_copy(update={"experts": (*recipe.experts, *found), "discover": None})


def name_of(repo_id: str, taken: AbstractSet[str]) -> str:
    """What a found adapter is called: `owner--name`, with a hash where that is long or taken."""
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", repo_id.replace("/", "--"))
    if len(name) > LONGEST_NAME or name in taken:
        digest = canonical_sha256(repo_id)[:8]
        name = f"{name[: LONGEST_NAME - len(digest) - 1]}-{digest}"
    return name


def resolve_adapter(recipe: Recipe, expert: ExpertSection, folder: Path) -> AdapterRef:
    """Where an expert's adapter lies, pinned."""
    if isinstance(expert, FoundExpert):
        repo_id, _, revision = expert.adapter.partition("@")
        return AdapterRef(repo_id, revision)
    if expert.adapter.startswith(PATH):
        return pin_folder(local_folder(expert, folder), expert.subfolder)
    repo_id = expert.adapter.partition("@")[0]
    return repositories.resolve(
        expert.adapter, subfolder=expert.subfolder, hub=hub_of(recipe, repo_id)
    )


def pin_folder(folder: Path, subfolder: str = "") -> AdapterRef:
    """A folder's adapter, by the hash of its weights; by its files' names where it has none.

    Raises:
        SourceError: There is no such folder.
    """
    if not folder.is_dir():
        raise SourceError(f"{folder}: there is no such folder; check the path of the adapter")
    weights = [*folder.glob("*.safetensors")]
    if weights and all(path.is_file() for path in weights):  # to read a pipe would never end
        sha256 = weights_sha256(folder)
    else:
        sha256 = canonical_sha256(sorted(path.name for path in folder.iterdir()))
    return AdapterRef(PATH + folder.absolute().name, f"sha256:{sha256}", subfolder)


def fetch_adapter(
    recipe: Recipe, expert: ExpertSection, ref: AdapterRef, folder: Path, cache: Path
) -> Path:
    """The folder that holds an adapter's files; downloaded at its commit where it is remote.

    Raises:
        AdapterError: Its config alone is a refusal, so its weights were not downloaded.
        HubError: The Hub does not deliver them.
    """
    if expert.adapter.startswith(PATH):
        return local_folder(expert, folder)
    asked, policy = hub_of(recipe, ref.repo_id), recipe.policy
    return download(ref, cache, hub=asked, modules_to_save=policy.modules_to_save)


def adapter_at_hand(
    recipe: Recipe, expert: ExpertSection, ref: AdapterRef, folder: Path, cache: Path
) -> Path:
    """The same without downloading anything.

    Raises:
        AdapterError: Its config was refused when its weights would have been downloaded.
        NotHereError: It would have to be downloaded.
        HubError: It could not be.
    """
    if expert.adapter.startswith(PATH):
        return local_folder(expert, folder)
    here = downloaded(ref, cache, modules_to_save=recipe.policy.modules_to_save)
    if here is None:
        num_bytes = adapter_bytes(ref, hub=hub_of(recipe, ref.repo_id))
        raise NotHereError(f"{num_bytes / 1e6:,.1f} MB to download")
    return here


def local_folder(expert: ExpertSection, folder: Path) -> Path:
    return folder / expert.adapter.removeprefix(PATH) / expert.subfolder
