"""The sources of a recipe's base and adapters: each name is pinned, then its files are fetched."""

import os
import re
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from functools import partial
from pathlib import Path

from meteora.artifacts import AdapterRef, BaseSpec, MeteoraError, canonical_sha256, file_sha256
from meteora.base.sources import (
    GGUF,
    PATH,
    SourceError,
    find_gguf,
    is_reference,
    path_from,
    require_config,
    weights_sha256,
)
from meteora.checkpoint.manifest import SOURCE
from pipelines.hub import repositories
from pipelines.hub.adapter import adapter_bytes, download, downloaded, is_downloaded
from pipelines.hub.client import hub_for, hub_of
from pipelines.recipe.recipe import LONGEST_NAME, ExpertSection, FoundExpert, HubSection, Recipe
from pipelines.workspace.context import RunContext


class NoExpertsError(MeteoraError):
    """Not one adapter can be used."""


class NotHereError(MeteoraError):
    """A base or an adapter is not downloaded or made yet."""


def token_of_rows(section: HubSection) -> Callable[[str], str | None]:
    """A function from a data set's `owner/name` to its token, by the rule of `hub_of`.

    Rows come from the Hub of the environment; a recipe's `hub.endpoint` does not apply to them.
    """

    def token_of(repo_id: str) -> str | None:
        hub = hub_for(repo_id, section.token_for, allow_http=section.allow_http)
        hub.url()  # refuses an endpoint that anyone on the network could answer for
        return hub.token

    return token_of


def resolve_base(context: RunContext) -> BaseSpec:
    """The base, pinned: to its commit on the Hub, or to the hash of its local weights.

    Raises:
        SourceError: There are no such weights, or a checkpoint cannot name their folder.
        HubError: The Hub does not answer, or has no such repository.
    """
    recipe, folder = context.recipe, context.folder
    source, quantise = recipe.base, recipe.quantise or ""
    if source.startswith(GGUF):
        return BaseSpec(source, f"sha256:{file_sha256(find_gguf(source))}", quantise)
    if source.startswith(PATH):
        local = path_from(folder, source.removeprefix(PATH))
        spec = BaseSpec(PATH + local.name, f"sha256:{weights_sha256(local)}", quantise)
        require_config(local)
        if not is_reference(spec.base_model, spec.base_revision):
            raise _unnameable(local, "folder of its base")
        return spec
    _refuse_folder(source, folder)

    def spec_of(ref: AdapterRef) -> BaseSpec:
        return BaseSpec(ref.repo_id, ref.revision, quantise)

    hub = hub_of(recipe, source.partition("@")[0])
    return spec_of(
        repositories.resolve(
            source, hub=hub, is_here=lambda ref: context.base_folder(spec_of(ref)).is_dir()
        )
    )


def discover(recipe: Recipe) -> Recipe:
    """The recipe with the adapters that `discover` finds among its experts, each pinned.

    They are sorted by repository. The Hub's own order changes with every download, and the order of
    the experts is part of a stack's id.

    Raises:
        HubError: The Hub does not answer.
        NoExpertsError: It finds none, and the recipe names none.
    """
    section = recipe.discover
    if section is None:
        return recipe
    base = section.base or recipe.base.partition("@")[0]
    hub = hub_of(recipe, base)
    refs = repositories.discover(base, tags=section.tags, limit=section.limit, hub=hub)
    named = {expert.adapter.partition("@")[0] for expert in recipe.experts}
    taken = {expert.name for expert in recipe.experts}
    found = []
    for ref in sorted(refs, key=lambda ref: ref.repo_id):
        if ref.repo_id not in named:
            name = name_of(ref.repo_id, taken)
            taken.add(name)
            found.append(FoundExpert(name=name, adapter=f"{ref.repo_id}@{ref.revision}"))
    experts = (*recipe.experts, *found)
    if not experts:
        raise NoExpertsError(
            "no adapter was found, so there is nothing to stack; ask for other tags, or none"
        )
    return recipe.model_copy(update={"experts": experts, "discover": None})


def name_of(repo_id: str, taken: AbstractSet[str]) -> str:
    """The name of a found adapter: `owner--name`, with a hash if that is too long or taken."""
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", repo_id.replace("/", "--"))
    if len(name) > LONGEST_NAME or name in taken:
        digest = canonical_sha256(repo_id)[:8]
        name = f"{name[: LONGEST_NAME - len(digest) - 1]}-{digest}"
    return name


def resolve_adapter(context: RunContext, expert: ExpertSection) -> AdapterRef:
    """An expert's adapter, pinned to its commit or its hash."""
    if isinstance(expert, FoundExpert):
        repo_id, _, revision = expert.adapter.partition("@")
        return AdapterRef(repo_id, revision)
    if expert.adapter.startswith(PATH):
        return pin_folder(_named_folder(context, expert), expert.subfolder)
    _refuse_folder(expert.adapter, context.folder)
    hub = hub_of(context.recipe, expert.adapter.partition("@")[0])
    is_here = partial(is_downloaded, cache_dir=context.adapters_folder)
    return repositories.resolve(
        expert.adapter, subfolder=expert.subfolder, hub=hub, is_here=is_here
    )


def _unnameable(folder: Path, what: str) -> SourceError:
    return SourceError(
        f"{str(folder)!r}: a checkpoint names the {what}, and cannot name this one; rename it to"
        " letters, digits, spaces, _ . -"
    )


def _refuse_folder(name: str, folder: Path) -> None:
    """Refuse a folder that is named without `path:`: the Hub may have a repository of that name."""
    if "@" not in name and (folder / name).is_dir():
        raise SourceError(
            f"{name} could be the folder here or a repository on the Hub; write path:{name} for"
            f" the folder, or {name}@main for the Hub"
        )


def require_folder(adapter: Path) -> Path:
    """The folder of an adapter; raises a `SourceError` if there is none."""
    if not adapter.is_dir():
        raise SourceError(
            f"{adapter}: there is no such folder; check the path of the adapter, or train one there"
            " with `meteora train`"
        )
    return adapter


def pin_folder(folder: Path, subfolder: str = "") -> AdapterRef:
    """The adapter in a folder, pinned to the hash of its weights, or of its file names if none.

    Args:
        subfolder: Inside `folder`, where the adapter lies.

    Raises:
        SourceError: There is no such folder, or a checkpoint cannot name it.
    """
    inner = require_folder(folder / subfolder)
    repo_id = PATH + Path(os.path.abspath(folder)).name  # noqa: PTH100  (without links, without `..`)
    source = f"{repo_id}/{subfolder}"
    if not source.isprintable() or not SOURCE.fullmatch(source):
        raise _unnameable(inner, "folders of its experts")
    weights = [*inner.glob("*.safetensors")]
    if weights and all(path.is_file() for path in weights):  # reading a pipe would never end
        sha256 = weights_sha256(inner)
    else:
        inside = [path.name for path in inner.iterdir()]
        # a file name need not be UTF-8, but JSON must be
        names = sorted(os.fsencode(path).decode(errors="backslashreplace") for path in inside)
        sha256 = canonical_sha256(names)
    return AdapterRef(repo_id, f"sha256:{sha256}", subfolder)


def fetch_adapter(context: RunContext, expert: ExpertSection, ref: AdapterRef) -> Path:
    """The folder with an adapter's files; downloaded at its commit if it is on the Hub.

    Raises:
        AdapterError: Its config alone is refused, so its weights are not downloaded.
        HubError: The Hub does not deliver it.
    """
    if expert.adapter.startswith(PATH):
        return local_folder(context, expert)
    hub, policy = hub_of(context.recipe, ref.repo_id), context.recipe.policy
    return download(ref, context.adapters_folder, hub=hub, modules_to_save=policy.modules_to_save)


def adapter_at_hand(context: RunContext, expert: ExpertSection, ref: AdapterRef) -> Path:
    """As `fetch_adapter`, but nothing is downloaded.

    Raises:
        AdapterError: An earlier download refused its config.
        NotHereError: It must be downloaded; the message gives the size.
        HubError: It cannot be downloaded.
    """
    if expert.adapter.startswith(PATH):
        return local_folder(context, expert)
    policy = context.recipe.policy
    here = downloaded(ref, context.adapters_folder, modules_to_save=policy.modules_to_save)
    if here is None:
        num_bytes = adapter_bytes(ref, hub=hub_of(context.recipe, ref.repo_id))
        raise NotHereError(f"{num_bytes / 1e6:,.1f} MB to download")
    return here


def local_folder(context: RunContext, expert: ExpertSection) -> Path:
    """The folder with the files of an adapter that the recipe names by `path:`."""
    return _named_folder(context, expert) / expert.subfolder


def _named_folder(context: RunContext, expert: ExpertSection) -> Path:
    return path_from(context.folder, expert.adapter.removeprefix(PATH))
