"""An adapter that is to join a checkpoint, through the door that a recipe's adapters come through.

It is read, compared with the base and with the experts that are there, and heard; the verdict on it
is recorded, whether it comes in or not.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from meteora.adapters.compatibility import IncompatibleAdaptersError, check_duplicates, check_memory
from meteora.adapters.update_norm import check_proportion
from meteora.artifacts import BaseSpec
from meteora.base import loading
from meteora.base.sources import PATH
from meteora.checkpoint import edit
from meteora.model.silent_experts import silent_experts
from meteora.untrusted.findings import AdapterError, Findings
from pipelines.admission import silent_experts as heard
from pipelines.admission import verdicts
from pipelines.admission.base_lookup import looking_up
from pipelines.admission.experts import Ground, Refusal, read_expert
from pipelines.admission.sources import pin_folder
from pipelines.hub import repositories
from pipelines.hub.adapter import download
from pipelines.hub.client import hub_for
from pipelines.hub.errors import UnusableRepositoryError
from pipelines.recipe.recipe import PolicySection
from pipelines.workspace.console import say
from pipelines.workspace.machine import memory_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from meteora.adapters.config import OnExtras
    from meteora.artifacts import AdapterRef
    from meteora.checkpoint.manifest import Manifest
    from pipelines.admission.experts import Expert
    from pipelines.hub.client import Hub
    from store.ledger import Ledger


@dataclass(frozen=True)
class Newcomer:
    """What a person asks to have in a checkpoint."""

    name: str
    adapter: str
    """A folder, or `owner/name[@revision]`."""
    subfolder: str = ""
    modules_to_save: OnExtras = "refuse"
    token_for: tuple[str, ...] = ()
    """Owners, or `owner/name`, to whom the saved token is sent."""

    def hub_at(self, repo_id: str) -> Hub:
        return hub_for(repo_id, self.token_for)


@dataclass(frozen=True)
class Door:
    """Where newcomers to one checkpoint are judged, and what is found is recorded."""

    ledger: Ledger
    run_id: str
    folder: Path
    """Of the checkpoint."""
    manifest: Manifest

    def read(
        self, asked: Newcomer, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> Expert:
        """The adapter, read and fitted to the base.

        Args:
            model: the base of the checkpoint, without experts

        Raises:
            AdapterError: It cannot be an expert here, which is recorded; or it is one already, or
                together with the others it would take more memory than there is.
            UnusableRepositoryError: Its repository cannot be used, which is recorded, too.
            HubError: A fault of the Hub, which says nothing about the adapter.
        """
        sizes = {path: size for path, m in model.named_modules() if (size := loading.sizes_of(m))}
        cache = self.ledger.home / "adapters"
        spec = BaseSpec(self.manifest.base.repo_id, self.manifest.base.revision)
        policy = PolicySection(modules_to_save=asked.modules_to_save)
        ref, fetch = _resolve(asked, cache)
        with tempfile.TemporaryDirectory() as ours:
            model.config.save_pretrained(ours)
            tokenizer.save_pretrained(ours)
            look_up = looking_up(cache, spec, Path(ours), asked.hub_at)
            try:
                folder = fetch()
                ground = Ground(spec, sizes, policy, look_up, in_layers=True)
                expert = read_expert(asked.name, asked.adapter, ref, folder, ground)
            except (AdapterError, UnusableRepositoryError) as error:
                self._refuse(asked, ref, error)
                raise
        expert = self._beside_the_others(expert)
        for reason in expert.adapter.reasons:
            say(f"{asked.name}: {reason.message}", "note")
        norms = loading.norms_of(model, (module.path for module in expert.adapter.spec.modules))
        reasons = check_proportion(expert.adapter, norms)
        return verdicts.warned(verdicts.described(expert, cache, asked.hub_at), reasons)

    def hear(
        self,
        asked: Newcomer,
        expert: Expert,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        """Record that the adapter comes in, if it says anything at all.

        Args:
            model: with the new expert in it

        Raises:
            AdapterError: Forced on a probe prompt it changes nothing, which is recorded.
        """
        silent = silent_experts(model, tokenizer, [asked.name])
        if asked.name in silent:
            reason = heard.no_effect(silent[asked.name])
            error = AdapterError(asked.name, (reason,))
            self._refuse(asked, expert.ref, error)
            raise error
        verdicts.record(self.ledger, self.run_id, expert, expert.adapter.reasons)

    def _beside_the_others(self, expert: Expert) -> Expert:
        found = Findings()
        others = {
            entry.name: (entry.adapter_id, entry.weights_sha256) for entry in self.manifest.experts
        }
        check_duplicates(expert.name, expert.adapter.spec, others, found)
        check_memory(
            len(others) + 1,
            edit.larger_bytes(self.folder, expert.adapter),
            memory_bytes(),
            found,
            advice="let another go first (`meteora drop`), or take a machine with more",
        )
        if found.refusals:
            raise IncompatibleAdaptersError(expert.source, tuple(found.refusals))
        reasons = (*expert.adapter.reasons, *found.warnings)
        return replace(expert, adapter=replace(expert.adapter, reasons=reasons))

    def _refuse(
        self, asked: Newcomer, ref: AdapterRef, error: AdapterError | UnusableRepositoryError
    ) -> None:
        about = verdicts.about_of(ref, self.ledger.home / "adapters", asked.hub_at)
        refusal = Refusal(ref, error, left_out=False)
        verdicts.refuse(self.ledger, self.run_id, asked.name, asked.adapter, refusal, about)


def _resolve(asked: Newcomer, cache: Path) -> tuple[AdapterRef, Callable[[], Path]]:
    """Where the adapter is, pinned, and how to get at its folder."""
    local = Path(asked.adapter.removeprefix(PATH)) / asked.subfolder
    if local.exists() or asked.adapter.startswith(PATH):
        return pin_folder(local, asked.subfolder), lambda: local
    asked_hub = asked.hub_at(asked.adapter.partition("@")[0])
    ref = repositories.resolve(asked.adapter, subfolder=asked.subfolder, hub=asked_hub)
    return ref, partial(download, ref, cache, hub=asked_hub, modules_to_save=asked.modules_to_save)
