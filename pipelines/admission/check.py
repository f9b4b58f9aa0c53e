"""`meteora check`: the verdict on one adapter, in a folder or on the Hub, without its base."""

from collections.abc import Collection
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from meteora.adapters import reader
from meteora.adapters.config import OnExtras
from meteora.adapters.reader import Verdict
from meteora.artifacts import Reason
from meteora.base.sources import PATH, names_path, path_from
from meteora.untrusted.findings import AdapterError
from pipelines.hub import repositories
from pipelines.hub.about import facts_of
from pipelines.hub.adapter import download, is_downloaded
from pipelines.hub.card import licence_of
from pipelines.hub.client import hub_for
from pipelines.hub.errors import HubError


def inspect(
    where: str,
    cache: Path,
    *,
    subfolder: str = "",
    modules_to_save: OnExtras = "refuse",
    token_for: Collection[str] = (),
) -> Verdict:
    """The verdict on the adapter at `where`; its faults become reasons, not exceptions.

    Args:
        where: A folder, a config, weights, or `owner/name[@revision]`, as in `names_path`.
        cache: The folder of downloaded adapters.
        subfolder: The adapter's folder inside the folder or the repository.
        modules_to_save: What to do with whole modules beside the LoRA, as in a recipe's policy.
        token_for: Owners, or `owner/name`, to whom the saved token is sent.
    """
    if names_path(where):
        path = path_from(Path(), where.removeprefix(PATH)) / subfolder
        verdict = reader.check(path, modules_to_save=modules_to_save)
        return replace(verdict, facts=verdict.facts | {"licence": licence_of(path)})
    repo_id = where.partition("@")[0]
    hub = hub_for(repo_id, token_for)
    facts: dict[str, Any] = {"repo_id": repo_id, "subfolder": subfolder}
    try:
        is_here = partial(is_downloaded, cache_dir=cache)
        ref = repositories.resolve(where, subfolder=subfolder, hub=hub, is_here=is_here)
        facts["revision"] = ref.revision
        about = facts_of(ref, cache, hub=hub)
        facts |= asdict(about) if about else {}
        folder = download(ref, cache, hub=hub, modules_to_save=modules_to_save)
    except AdapterError as error:
        return Verdict(where, "refuse", error.reasons, facts | {"judged_by": "claims"})
    except HubError as error:
        text = f"there is no such folder here; and as a repository, {error}"
        reason = Reason("hub_unavailable" if error.retry else "hub", text)
        return Verdict(where, "refuse", (reason,), facts)
    except OSError as error:
        problem = f"{error.filename or cache} cannot be written: {error.strerror or error}"
        return Verdict(where, "refuse", (Reason("disk", f"{problem}; give another --home"),), facts)
    verdict = reader.check(folder, modules_to_save=modules_to_save)
    facts["licence"] = licence_of(folder) or facts.get("licence", "")
    return Verdict(where, verdict.verdict, verdict.reasons, verdict.facts | facts)


def describe(verdict: Verdict) -> list[str]:
    """The lines to print for a verdict: verdict and path, facts of the adapter, each reason."""
    facts = verdict.facts
    lines = []
    if "num_modules" in facts:
        lines.append(
            f"r {_span(facts['r_min'], facts['r_max'])}, scaling"
            f" {_span(facts['scaling_min'], facts['scaling_max'])}, on {facts['num_modules']}"
            f" modules ({', '.join(facts['targets'])}); {facts['dtype']},"
            f" {facts['weights_bytes'] / 1e6:,.1f} MB; base {facts['base_model'] or 'not named'}"
        )
    elif facts.get("judged_by") == "claims" and "revision" in facts:
        lines.append("judged by what its config claims: its weights were not downloaded")
    elif facts.get("judged_by") == "claims" and "format" in facts:
        lines.append("judged by what its config claims: there are no weights beside it")
    if "revision" in facts:
        lines.append(
            f"at commit {facts['revision']}, licence {facts.get('licence') or 'not stated'}"
        )
    lines += [f"{reason.message} [{reason.code}]" for reason in verdict.reasons]
    return [f"{verdict.verdict:7} {verdict.path}", *(f"        {line}" for line in lines)]


def _span(low: float, high: float) -> str:
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
