"""The stages that build: base, stack, gates, checkpoint.

Each is a plain function that does nothing if the ledger has its artifact. Else it puts the bytes
into the blobs, and then writes the record. So a stopped run continues with the unfinished stage.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from meteora.adapters.compatibility import stack_bytes
from meteora.artifacts import NULL, BuiltBase, LinearSize, MeteoraError, RouterBuild
from meteora.base import loading
from meteora.base.chat_template import Template
from meteora.base.shapes import fingerprint_of, linear_sizes, weight_norms
from meteora.base.sources import GGUF, weights_sha256
from meteora.checkpoint import tensors
from meteora.checkpoint.manifest import EXPERTS, GATES, STATISTICS
from meteora.checkpoint.resolve import find_packaged
from meteora.checkpoint.stack import stack_adapters
from meteora.fitting import calibrate
from meteora.fitting.background import fit_to_background
from meteora.fitting.sequences import UNLABELLED, LabelledSequence
from meteora.fitting.statistics import write_statistics
from meteora.routing.gates import gates_of
from meteora.untrusted.findings import MOST_NAMED, counted, listed
from pipelines.admission import silent_experts
from pipelines.admission.card_examples import licences_of_data_sets
from pipelines.admission.sources import token_of_rows
from pipelines.data.composites import require_places
from pipelines.data.conversations import Conversation, converse, takes, within
from pipelines.data.labels import Labeller, background_ids
from pipelines.data.pool import known_shares
from pipelines.evaluation.harness import room_of
from pipelines.hub import repositories
from pipelines.hub.card import licence_of
from pipelines.hub.client import hub_of
from pipelines.hub.snapshot import locked
from pipelines.planning.examples import LEAST_EXAMPLES
from pipelines.planning.fit_estimate import bytes_while_fitting
from pipelines.planning.overlaps import say_shared
from pipelines.planning.room import with_room, without_too_long
from pipelines.reports.summary import summarise
from pipelines.stages import train_processes
from pipelines.stages.checkpoint import (
    not_fitted,
    place_checkpoint,
    record_router,
    record_stack,
    stays_as_signed,
)
from pipelines.stages.open_model import (
    describe,
    map_to_divide,
    map_to_fit,
    opened,
    tokenizer_of_gates,
)
from pipelines.workspace.bases import require_sound, seal, unfinished
from pipelines.workspace.checkpoints import is_whole
from pipelines.workspace.console import bar, progress_bar, say
from pipelines.workspace.context import RunContext, put_in_place
from pipelines.workspace.faults import require_space
from pipelines.workspace.machine import choose_device
from store.files import locked as hold

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from meteora.artifacts import BaseSpec, RouterSpec
    from meteora.fitting.statistics import Fit
    from pipelines.data.rows import Row
    from pipelines.planning.plan import Plan
    from pipelines.recipe.recipe import Recipe


LEAST_KNOWN = 0.5
"""The least share of prompts of a card's data set that an expert should know. Six experts knew all
prompts of the right data sets, and at most 0.38 of wrong and of mixed ones
(`tests/benchmarks/results/cards.md`)."""
LEAST_EXPERTS = 3
"""Of two experts each stands out on what the other one does not know."""


def build_base(work: RunContext, spec: BaseSpec) -> BuiltBase:
    """Provide the base as safetensors: a local folder, a download, or a dequantised GGUF file."""
    folder = work.base_folder(spec)
    known = work.ledger.built_as(BuiltBase, spec.id)
    if known is not None and folder.is_dir():
        return known
    if spec.quantise:  # its files are those of the full base
        built = replace(build_base(work, spec.stored), spec=spec)
        loading.refuse_quantised(folder)
    else:
        if not folder.is_dir():
            _bring_base(work, spec, folder)
        require_sound(work.ledger, spec)
        sizes = linear_sizes(folder)
        norms = weight_norms(folder, sizes)
        built = BuiltBase(
            spec,
            weights_sha256(folder),
            fingerprint_of(folder),
            tuple(LinearSize(path, *size, norms.get(path, 0.0)) for path, size in sizes.items()),
            licence_of(folder),
        )
    work.ledger.record_artifact(
        spec, weights_sha256=built.weights_sha256, built=built, run_id=work.run_id
    )
    return built


def _bring_base(work: RunContext, spec: BaseSpec, folder: Path) -> None:
    """Put the base into its folder, whole or not at all; of two runs one waits for the other."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(work.home / "runs" / folder.name, work.recipe.deadlines.base):
        if folder.is_dir():
            return
        with work.scratch() as scratch:
            if work.recipe.base.startswith(GGUF):
                made = scratch / "base"
                _dequantise(work.recipe.base, spec, made)
            else:
                made = unfinished(folder)
                hub = hub_of(work.recipe, spec.base_model)
                repositories.download_base(spec, made, hub=hub)
            seal(made, work.home)
            put_in_place(made, folder)


def _dequantise(source: str, spec: BaseSpec, out: Path) -> None:
    say(f"dequantising {source.removeprefix(GGUF)}, once")
    model, tokenizer = loading.load_gguf(find_packaged(spec))
    num_bytes = sum(tensor.nbytes for tensor in model.state_dict().values())
    require_space(out.parent, num_bytes, f"the dequantised {source}")
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def stack(work: RunContext, plan: Plan) -> None:
    """Concatenate the adapters in one file; the base is not loaded."""
    if work.holds(plan.fused.id):
        return
    specs = [expert.adapter.spec for expert in plan.experts]
    require_space(work.home, stack_bytes(specs), f"the stack of {counted(len(specs), 'expert')}")
    with work.scratch() as scratch:
        out = scratch / EXPERTS
        stack_adapters([expert.adapter for expert in plan.experts], out)
        sha256 = work.ledger.blobs.put(out, move=True)
    record_stack(work, plan.fused, sha256)


def fit_gates(work: RunContext, plan: Plan) -> RouterBuild:
    """Fit the gates with the recipe's settings; a router without gates is only recorded.

    Another recipe with the same gates waits, and takes them from the ledger.
    """
    folder = work.training_folder(plan.router.id)
    lock = work.home / "locks" / f"gates-{folder.name}.lock"
    with hold(lock, deadline_seconds=work.recipe.deadlines.gates):
        return _recorded_gates(work, plan, folder)


def _recorded_gates(work: RunContext, plan: Plan, folder: Path) -> RouterBuild:
    known = work.ledger.built_as(RouterBuild, plan.router.id)
    if known is not None and work.holds(plan.router.id):
        return known
    if plan.router.router == "prompt":
        made = _compare_with_background(work, plan)
    elif plan.router.router == "gate":
        made = _make_gates(work, plan)
    else:
        made = not_fitted(work, plan.router)
    record_router(work, made)
    shutil.rmtree(folder, ignore_errors=True)
    return made


def _make_gates(work: RunContext, plan: Plan) -> RouterBuild:
    if plan.router.mixed_prompts or plan.spans:  # told before the base is loaded
        require_places(loading.load_tokenizer(work.base_folder(plan.base)))
    require_space(work.home, _bytes_of_fit(plan), "a fit of these gates")
    with work.scratch() as scratch:
        out = scratch / GATES
        fit = _fit_here if train_processes.num_processes(work.recipe) == 1 else _fit_together
        found = fit(work, plan, out)
        sha256, statistics_sha256 = work.ledger.blobs.put(out, move=True), ""
        if found.statistics:
            write_statistics(scratch / STATISTICS, found.statistics)
            statistics_sha256 = work.ledger.blobs.put(scratch / STATISTICS, move=True)
        licences = licences_of_data_sets(
            [*plan.card_examples.values(), *plan.hub_examples.values()],
            token_of_rows(work.recipe.hub),
        )
        return RouterBuild(
            spec=plan.router,
            weights_sha256=sha256,
            num_tokens=found.num_tokens,
            heldout_accuracy=found.heldout_accuracy,
            wall_seconds=found.wall_seconds,
            device=choose_device(),
            statistics_sha256=statistics_sha256,
            card_examples=tuple(f"{name}: {s}" for name, s in plan.card_examples.items()),
            hub_examples=tuple(f"{name}: {s}" for name, s in plan.hub_examples.items()),
            example_licences=tuple(f"{name}: {s}" for name, s in licences.items()),
            not_crossed=found.not_crossed,
        )


def _compare_with_background(work: RunContext, plan: Plan) -> RouterBuild:
    """Fit a router of whole prompts, to texts that belong to no expert; it needs no examples."""
    started, router = time.perf_counter(), plan.router
    device_map = map_to_fit(work, plan)
    with opened(work, plan, device_map) as (model, tokenizer), work.scratch() as scratch:
        silent_experts.probe(work, plan.experts, model, tokenizer)
        encoding = tokenizer_of_gates(tokenizer, router.template)
        texts = background_ids(encoding)
        layers = model.config.get_text_config().num_hidden_layers
        with progress_bar("reading background texts", layers, "layers") as show:
            gates = fit_to_background(
                model,
                texts,
                router.options,
                Template.of(encoding),
                scratch=scratch,
                progress=show,
            )
        tensors.write_prompt_gates(scratch / GATES, gates)
        sha256 = work.ledger.blobs.put(scratch / GATES, move=True)
    return RouterBuild(
        spec=router,
        weights_sha256=sha256,
        num_tokens=sum(map(len, texts)),
        heldout_accuracy=None,
        wall_seconds=time.perf_counter() - started,
        device=choose_device(),
    )


def _bytes_of_fit(plan: Plan) -> float:
    """The most disk space, in bytes, for gates until they are recorded."""
    modules = [module for expert in plan.experts for module in expert.adapter.spec.modules]
    inputs = {module.path: module.in_features for module in modules}
    share, is_joint = plan.router.options.share, plan.router.joint is not None
    return bytes_while_fitting(inputs, len(plan.experts), share, is_joint=is_joint)


def _fit_here(work: RunContext, plan: Plan, out: Path) -> Fit:
    router = plan.router
    device_map = map_to_fit(work, plan)
    with opened(work, plan, device_map) as (model, tokenizer), work.scratch() as scratch:
        sequences, template = _labelled(work, plan, model, tokenizer)
        if router.joint is None:
            found = _calibrate(work, router, model, sequences, template, scratch)
        else:
            with progress_bar("training the gates", router.joint.steps, "steps") as show:
                found = train_processes.train(
                    work, router, model, sequences, template, scratch, show
                )
        tensors.write_gates(out, gates_of(model))
    return found


def _fit_together(work: RunContext, plan: Plan, out: Path) -> Fit:
    """Label with one model, release it, and train in processes with a model each."""

    def labelled() -> tuple[list[LabelledSequence], Template | None]:
        with opened(work, plan, map_to_divide(work, plan)) as (model, tokenizer):
            return _labelled(work, plan, model, tokenizer)

    assert plan.router.joint is not None  # noqa: S101  (no other gates take several processes)
    sequences, template = labelled()
    torch.cuda.empty_cache()
    with progress_bar("training the gates", plan.router.joint.steps, "steps") as show:
        return train_processes.train_together(work, plan, sequences, template, out, show)


def _labelled(
    work: RunContext, plan: Plan, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[LabelledSequence], Template | None]:
    """The sequences to fit the gates to, and the template of a router that looks ahead."""
    router = plan.router
    silent_experts.probe(work, plan.experts, model, tokenizer)
    tokenizer = tokenizer_of_gates(tokenizer, router.template)
    room = room_of(model.config)
    fitting = without_too_long(plan.examples, plan.card_examples, room, tokenizer)
    for name, source in plan.card_examples.items():
        num, too_long = len(fitting[name]), len(plan.examples[name]) - len(fitting[name])
        more = f"; {too_long} more are longer than the base's context" if too_long else ""
        say(
            f"{name}: {counted(num, 'example')} of the data set that its card names, {source}{more}"
        )
    say_shared(fitting)
    is_here = all(one.device.type != "meta" for one in model.parameters())
    if plan.card_examples and is_here:
        _say_unknown(plan, fitting, model, tokenizer)
    plan = replace(plan, examples=fitting)
    names = plan.fused.names
    shared = router.opening == "shared"
    nobody = len(names) if shared else UNLABELLED
    labeller = Labeller(tokenizer, names, nobody)
    talks = _conversations(work.recipe, plan, tokenizer, room)
    sequences = labeller.spans(talks) or labeller.examples(plan.examples)
    mixed = labeller.composites(
        plan.examples, router.mixed_prompts, seed=router.seed, digits=not router.crossed
    )
    mixed += labeller.spans(plan.spans)
    sequences += with_room(room, mixed)
    if router.null:
        rows = plan.examples[NULL]
        base = len(names) + shared
        with bar("asking the base", len(rows), "texts") as advance:
            sequences += labeller.background(model, rows, base, advance)
    return sequences, Template.of(tokenizer) if router.opening == "prompt" else None


def _say_unknown(
    plan: Plan,
    examples: Mapping[str, Sequence[Row]],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Print whose card names a data set that seems to be of another task.

    Not if these are half of the experts or more: adapters of one task do not stand out from each
    other. Nor for a base that is read from the disk, since this would read it several times.
    """
    names = plan.fused.names
    if len(names) < LEAST_EXPERTS:
        return
    own = {name: [row.prompt for row in rows] for name, rows in examples.items() if name != NULL}
    shares = known_shares(model, tokenizer, own, names)
    unknown = [name for name, share in shares.items() if share < LEAST_KNOWN]
    if 2 * len(unknown) >= len(names):
        return
    for name in unknown:
        if name in plan.card_examples:
            say(
                f"{name}: by its weights it knows {shares[name]:.0%} of the first prompts of the"
                " data set that its card names, which seem to be of another task: look at them, or"
                " name examples in the recipe",
                "note",
            )


def _conversations(
    recipe: Recipe, plan: Plan, tokenizer: PreTrainedTokenizerBase, room: int
) -> list[Conversation]:
    """The examples as conversations of at most `room` tokens, with system prompts.

    Empty if the router asks for neither, or the base can have neither. Its chat template may take
    only one of the two.
    """
    lengths, systems = plan.router.conversations, plan.router.system_prompts
    if not (lengths or systems):
        return []
    lacking = "" if tokenizer.is_fast else "the base's tokenizer gives no places of its tokens"
    if not tokenizer.chat_template:
        lacking = "the base has no chat template"
    if lacking:
        if recipe.gates.conversations or recipe.gates.system_prompts:  # not only by default
            say(f"{lacking}: gates are fitted without conversations and system prompts", "note")
        return []
    if systems and not takes(tokenizer, system="Be brief."):
        say("the base's chat template takes no system prompt: gates are fitted without", "note")
        systems = ()
    names = [name for name in plan.fused.names if plan.examples.get(name)]
    if lengths and not takes(tokenizer, turns=2):
        say("the base's chat template takes one turn alone: gates are fitted to these", "note")
        lengths = ()

    def deal(lengths: Sequence[int]) -> list[Conversation]:
        dealt = converse(plan.examples, names, lengths, systems, seed=plan.router.seed)
        return within(room, dealt, tokenizer)

    talks = deal(lengths or (1,))
    number = Counter(name for talk in talks for name in {turn.expert for turn in talk.turns})
    if plan.router.composites or plan.spans or min(number.values()) >= LEAST_EXAMPLES:
        return talks
    return deal((1,))  # else an expert has all its examples in one conversation


def _calibrate(
    work: RunContext,
    router: RouterSpec,
    model: PreTrainedModel,
    sequences: Sequence[LabelledSequence],
    template: Template | None,
    scratch: Path,
) -> Fit:
    layers = model.config.get_text_config().num_hidden_layers
    with progress_bar("fitting the gates", layers, "layers") as show:
        found = calibrate.calibrate(
            model,
            sequences,
            router.options,
            template=template,
            refined=router.refined,
            crossed=router.crossed,
            offsets=router.offsets,
            seed=router.seed,
            scratch=scratch,
            folder=work.training_folder(router.id),
            progress=show,
        )
    if found.not_crossed:
        names = listed(found.not_crossed, MOST_NAMED)
        say(
            f"too few examples of {names} to divide them into two halves, so the gates were fitted"
            " without; lists of several questions may be routed worse: give these experts more",
            "note",
        )
    return found


def write_checkpoint(work: RunContext, plan: Plan, gates: RouterBuild) -> Path:
    """Write the checkpoint's folder; one that is signed stays as it is.

    Raises:
        MeteoraError: The benchmark is not complete.
    """
    summary = summarise(work.ledger, plan, work.base_folder(plan.base))
    if summary is None:
        raise MeteoraError("a measurement is missing, so no card can be written; run again")
    folder = work.checkpoint_folder(plan.router.id)
    if is_whole(folder) and stays_as_signed(folder):
        return folder
    manifest = describe(work, plan, gates)
    if gates.statistics_sha256:
        files = manifest.files | {STATISTICS: gates.statistics_sha256}
        manifest = replace(manifest, files=files)
    return place_checkpoint(work, manifest, work.name, summary)
