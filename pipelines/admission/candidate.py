"""An adapter to add to a checkpoint: the same checks as for the adapters of a recipe.

It is read, compared with the base and with the experts of the checkpoint, and tried on a probe
prompt. Either verdict is recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from meteora.adapters.compatibility import IncompatibleAdaptersError, check_duplicates, check_memory
from meteora.adapters.update_norm import check_proportion
from meteora.base.shapes import norms_of, sizes_of
from meteora.base.sources import PATH, names_path, path_from
from meteora.checkpoint import edit
from meteora.model.silent_experts import silent_experts
from meteora.untrusted.findings import AdapterError, Findings
from pipelines.admission import verdicts
from pipelines.admission.base_identity import look_up_on_hub
from pipelines.admission.experts import Expert, Refusal, Requirements, read_expert
from pipelines.admission.silent_experts import no_effect
from pipelines.admission.sources import (
    fetch_adapter,
    pin_folder,
    require_folder,
    resolve_adapter,
)
from pipelines.hub.errors import UnusableRepositoryError
from pipelines.recipe.recipe import ExpertSection, HubSection, PolicySection, Recipe
from pipelines.workspace.console import say
from pipelines.workspace.machine import memory_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from meteora.adapters.config import OnExtras
    from meteora.artifacts import AdapterRef, Reason
    from meteora.checkpoint.manifest import Manifest
    from pipelines.workspace.context import RunContext


@dataclass(frozen=True)
class Candidate:
    """An adapter that a person wants in a checkpoint, and the name of its expert."""

    name: str
    adapter: str
    """A folder, or `owner/name[@revision]`, as in `names_path`."""
    subfolder: str = ""
    modules_to_save: OnExtras = "refuse"
    token_for: tuple[str, ...] = ()
    """Owners, or `owner/name`, to whom the saved token is sent."""

    @property
    def recipe(self) -> Recipe:
        """The parts of a recipe that its admission reads."""
        return Recipe.model_construct(
            hub=HubSection(token_for=self.token_for),
            policy=PolicySection(modules_to_save=self.modules_to_save),
        )

    def find_folder(self) -> Path | None:
        """The folder that it names; None for a repository, `SourceError` if there is none."""
        if not names_path(self.adapter):
            return None
        return require_folder(path_from(Path(), self.adapter.removeprefix(PATH)) / self.subfolder)


@dataclass(frozen=True)
class Admission:
    """Reads and judges a candidate for a checkpoint, and records the verdict."""

    context: RunContext
    """Its recipe is the candidate's."""
    folder: Path
    """Of the checkpoint."""
    manifest: Manifest
    candidate: Candidate
    source: tuple[AdapterRef, Callable[[], Path]]
    """The candidate's, by `resolve`."""
    device: str
    """Of the model, by `choose_device`."""

    def read(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Expert:
        """The candidate's adapter, read and fitted to the base.

        Args:
            model: the base of the checkpoint, without experts

        Raises:
            AdapterError: It is refused, and the refusal recorded. Or, without a record, it is an
                expert of the checkpoint already, or all experts need more memory than there is.
            UnusableRepositoryError: Its repository cannot be used; this is recorded, too.
            HubError: A fault of the Hub itself, which is no verdict on the adapter.
        """
        sizes = {path: size for path, m in model.named_modules() if (size := sizes_of(m))}
        candidate, context = self.candidate, self.context
        spec, policy = self.manifest.base.spec, context.recipe.policy
        ref, fetch = self.source
        with context.scratch() as ours:
            model.config.save_pretrained(ours)
            tokenizer.save_pretrained(ours)
            look_up = look_up_on_hub(context, spec, ours)
            try:
                folder = fetch()
                requirements = Requirements(spec, sizes, policy, look_up, in_layers=True)
                expert = read_expert(candidate.name, candidate.adapter, ref, folder, requirements)
            except (AdapterError, UnusableRepositoryError) as error:
                self._refuse(ref, error)
        warnings = self._compare_with_others(expert)
        for reason in expert.adapter.reasons:
            say(f"{candidate.name}: {reason.message}", "note")
        norms = norms_of(model, (module.path for module in expert.adapter.spec.modules))
        warnings += check_proportion(expert.adapter, norms)
        return verdicts.with_warnings(verdicts.with_hub_facts(context, expert), warnings)

    def admit(
        self, expert: Expert, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """Record that the candidate is accepted, if it changes anything on a probe prompt.

        Args:
            model: with the new expert in it

        Raises:
            AdapterError: It changes nothing there; the refusal is recorded.
        """
        silent = silent_experts(model, tokenizer, [expert.name])
        if expert.name in silent:
            reason = no_effect(silent[expert.name])
            self._refuse(expert.ref, AdapterError(expert.name, (reason,)))
        verdicts.record_accepted(self.context, expert)

    def _compare_with_others(self, expert: Expert) -> list[Reason]:
        """Warnings; refuses an expert that is there already, or needs too much memory."""
        findings = Findings()
        others = {
            entry.name: (entry.adapter_id, entry.weights_sha256) for entry in self.manifest.experts
        }
        check_duplicates(expert.name, expert.adapter.spec, others, findings)
        check_memory(
            len(others) + 1,
            edit.larger_bytes(self.folder, expert.adapter),
            memory_bytes(self.device),
            findings,
            advice="drop another expert first (`meteora drop`), or use a machine with more memory",
        )
        if findings.refusals:
            raise IncompatibleAdaptersError(expert.source, tuple(findings.refusals))
        return findings.warnings

    def _refuse(self, ref: AdapterRef, error: AdapterError | UnusableRepositoryError) -> NoReturn:
        refusal = Refusal(self.candidate.name, self.candidate.adapter, ref, error, left_out=False)
        verdicts.refuse(self.context, refusal)
        raise error


def resolve(context: RunContext, candidate: Candidate) -> tuple[AdapterRef, Callable[[], Path]]:
    """The adapter, pinned, and a function that returns its folder, downloaded if need be.

    Raises:
        SourceError: There is no such folder.
        HubError: The Hub has no such repository or revision, or does not answer.
    """
    name, adapter, subfolder = candidate.name, candidate.adapter, candidate.subfolder
    if (folder := candidate.find_folder()) is not None:
        local = path_from(Path(), adapter.removeprefix(PATH))
        return pin_folder(local, subfolder), lambda: folder
    section = ExpertSection(name=name, adapter=adapter, subfolder=subfolder)
    ref = resolve_adapter(context, section)
    return ref, partial(fetch_adapter, context, section, ref)
