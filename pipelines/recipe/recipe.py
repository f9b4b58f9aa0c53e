"""The recipe: a YAML file that describes a run; it is read and checked here."""

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal, Self, get_args

from pydantic import (
    BeforeValidator,
    Field,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from meteora.artifacts import MeteoraError, RouterOptions, Unfitted
from meteora.checkpoint.manifest import MAX_EXPERTS, MAX_MARGIN, MAX_TEMPERATURE, MIN_FACTOR
from meteora.untrusted.findings import did_you_mean, not_utf8
from meteora.untrusted.strict_yaml import StrictYAMLError, parse_yaml
from pipelines.recipe.benchmark import MIX, BenchmarkSection, Section, known_metrics
from pipelines.recipe.faults import explain
from pipelines.recipe.gates import CalibrateSection, Examples, GatesSection
from pipelines.recipe.keys import TIME
from pipelines.recipe.publish import PublishSection

LONGEST_NAME = 64
AUTO = "auto"
"""Examples from the adapter's card, or written by the adapter itself."""
NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9_.-]{{0,{LONGEST_NAME - 1}}}")
NAME_RULE = (
    f"may hold letters from a to z, digits, '_', '.' and '-', at most {LONGEST_NAME}, and begins"
    " with a letter or a digit"
)
MAX_BYTES = 1 << 20
SHIPPED = Path(__file__).parent / "shipped"
"""Recipes that come with the program. Those directly in this folder need adapters and rows."""


class RecipeError(MeteoraError):
    """A recipe cannot be read, or asks for something that does not exist."""


def refuse_name(name: str) -> None:
    """Raise `ValueError` if no expert or task of a recipe can have this name."""
    if not NAME.fullmatch(name):
        raise ValueError(f"the name {name!r} {NAME_RULE}")
    if MIX.fullmatch(name):
        raise ValueError(f"the name {name!r} is that of a mix of tasks; choose another")


class ExpertSection(Section):
    """One expert: its adapter, its examples, its tests."""

    name: str
    """Unique; shown in tables, and used in `--expert`."""
    adapter: str
    """`owner/name`, `owner/name@<commit, tag or branch>`, or `path:<folder>`."""
    subfolder: str = ""
    """The adapter's folder inside the repository or folder, if it is not at the top."""
    examples: Examples | None = None
    """`jsonl:<file>` of {"prompt", "response"}, or another source of rows; a gate needs them.
    `auto`: rows of a data set that the adapter's card names; if there is none (and no
    `gates.pool`), prompts that the adapter writes itself."""
    test: str | None = None
    """A source of held-out rows; they are a benchmark task with this expert's name."""
    metric: str | tuple[str, ...] = "exact_match"
    """The score of answers: one metric or more; tables show the first."""
    max_new_tokens: Annotated[int, Field(ge=1, le=100_000)] | None = None
    """Greatest length of an answer. Default: as in `benchmark`."""

    @field_validator("metric")
    @classmethod
    def _metric_is_known(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        known_metrics(value)
        return value


class FoundExpert(ExpertSection):
    """An expert that `discover` found; if it is refused, it is left out."""

    examples: Examples | None = AUTO


class DiscoverSection(Section):
    """Adapters to find on the Hub, most downloaded first."""

    base: str = ""
    """The `owner/name` that their cards name as their base. Default: the recipe's base."""
    tags: tuple[str, ...] = ()
    """Tags that each adapter must have on the Hub."""
    limit: Annotated[int, Field(ge=1, le=256)] = 20
    """Greatest number of adapters."""


class HubSection(Section):
    """The Hub, and the repositories to which the saved token is sent."""

    endpoint: str = ""
    """The URL of the Hub for bases and adapters; rows of `hf:` come from `HF_ENDPOINT`. Default:
    `HF_ENDPOINT`, or huggingface.co. The saved token goes to another URL only if `HF_ENDPOINT`
    names it, too."""
    allow_http: bool = False
    """Allow plain http for an endpoint on another machine."""
    token_for: tuple[str, ...] = ()
    """Owners, or `owner/name`, for whose repositories the saved token is sent."""


Temperature = Annotated[float, Field(ge=MIN_FACTOR, le=MAX_TEMPERATURE, allow_inf_nan=False)]


class RouterSection(Section):
    """How tokens are routed to experts."""

    kind: Literal["gate", "prompt", Unfitted] = "gate"
    """`gate` is fitted to examples and routes each token. Without examples, `prompt` routes each
    prompt to the expert with unusually large updates on it, `arrow` and `norm` route each token by
    the weights, and `uniform` is the mean."""
    top_k: Annotated[int, Field(ge=1, le=MAX_EXPERTS)] = 1
    """Number of experts for each token."""
    temperature: Temperature = 1.0
    """Temperature of the softmax over the chosen experts' logits."""
    margin: Annotated[float, Field(ge=0, le=MAX_MARGIN, allow_inf_nan=False)] | None = None
    """A chosen expert gets no weight if its logit is more than this below the best, in nats."""
    opening: Literal["prompt", "own", "shared"] = "shared"
    """The route of tokens that do not show the task, such as a system prompt. `shared`: to all
    experts together, each with weight 1 / E. `own`: each token by itself. `prompt`: by the prompt
    that follows; then answers depend on the cache, the chunks and the prefix."""
    null: bool = False
    """Whether the base without an expert is one of the choices."""
    share: Literal["module", "point", "layer", "token", "turn"] = "point"
    """The modules that share one gate: none (`module`), modules with one input (`point`), a layer,
    or all layers from a third of the depth on (`token`). `turn`: as `point`, but each question as a
    whole decides for its turn of a conversation, with its answer; then answers depend on the chunks
    and the prefix."""
    without_examples: Literal["refuse", "arrow", "norm"] = "refuse"
    """For an expert without examples: refuse the recipe, or route to it by its weights, as this
    kind of router does."""

    def options(self, stand_ins: tuple[str, ...], *, fitted: bool) -> RouterOptions:
        """The routing options of a model with or without fitted gates.

        Args:
            stand_ins: the experts without examples
        """
        options = RouterOptions(**self.model_dump(exclude={"without_examples"}))
        if not fitted:
            return replace(options, opening="own", share="module")
        if options.share == "turn":
            options = replace(options, opening="prompt")
        if not stand_ins:
            return options
        share = options.share if options.share == "turn" else "module"
        stand_in = self.without_examples
        return replace(options, share=share, stand_in=stand_in, stand_ins=stand_ins)

    @model_validator(mode="after")
    def _a_turn_has_its_opening(self) -> Self:
        if self.share == "turn" and "opening" in self.model_fields_set and self.opening != "prompt":
            raise ValueError(
                f"router.opening is {self.opening!r}, and with `share: turn` a question decides for"
                " what precedes it, too; take it out"
            )
        return self


class PolicySection(Section):
    """What to do with adapters that are not sound."""

    modules_to_save: Literal["refuse", "strip"] = "refuse"
    """For an adapter with whole modules beside the LoRA: refuse it, or leave the modules out."""
    unreachable_base: Literal["warn", "refuse"] = "warn"
    """For an adapter that names another base which cannot be compared with ours."""
    on_refused: Literal["fail", "skip"] = "fail"
    """Whether a refused adapter ends the run, or is left out."""


DURATION = re.compile(r"(\d{1,6}(?:\.\d{1,3})?)([smhd])")
UNIT_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
MOST_SECONDS = 365 * UNIT_SECONDS["d"]
"""Timers of the system end at some 290 years."""


def _seconds(text: object) -> float:
    match = DURATION.fullmatch(text) if isinstance(text, str) else None
    if match is None or float(match[1]) == 0:
        raise ValueError("a time is a number and a unit, such as 90s, 30m, 2h or 1d")
    seconds = float(match[1]) * UNIT_SECONDS[match[2]]
    if seconds > MOST_SECONDS:
        raise ValueError(f"{text} is too long; the most is 365d")
    return seconds


Seconds = Annotated[
    float, BeforeValidator(_seconds), WithJsonSchema({"type": "string", "format": TIME})
]


class DeadlinesSection(Section):
    """The time after which a stage is stopped, so that no stage blocks a schedule.

    Requests to the Hub have separate limits.
    """

    base: Seconds = 12 * 3600.0
    """To download the base, or to read it."""
    stack: Seconds = 2 * 3600.0
    """To check and to stack the experts."""
    gates: Seconds = 24 * 3600.0
    """To fit the gates."""
    benchmark: Seconds = 24 * 3600.0
    """To measure everything."""
    publish: Seconds = 12 * 3600.0
    """To publish."""


class Recipe(Section):
    """All settings of a run."""

    base: str
    """`owner/name`, `owner/name@<commit, tag or branch>`, `path:<folder>`, or
    `gguf:<python package>/<file>`."""
    quantise: Literal["4bit", "8bit"] | None = None
    """Load the base with linear layers of 4 or 8 bits, by bitsandbytes. Gates and measurements use
    this base. Default: as in its files."""
    expert_cache_bytes: Annotated[int, Field(ge=0)] | None = None
    """Leave the experts in their file, and keep at most this many bytes of them on the device, the
    last used ones. Default: all are on the device."""
    experts: Annotated[tuple[ExpertSection, ...], Field(max_length=MAX_EXPERTS)] = ()
    """The experts, in the order of the stack."""
    discover: DiscoverSection | None = None
    """Adapters to find on the Hub, in addition to `experts`."""
    router: RouterSection = RouterSection()
    """How tokens are routed to experts."""
    gates: GatesSection = CalibrateSection()
    """The fit of the gates, if `router.kind` is `gate`."""
    benchmark: BenchmarkSection = BenchmarkSection()
    """The measurements, and the systems to compare with."""
    publish: PublishSection | None = None
    """The repository for the finished model. Without this section it is not published."""
    policy: PolicySection = PolicySection()
    """What to do with adapters that are not sound."""
    hub: HubSection = HubSection()
    """The Hub, and the repositories to which the saved token is sent."""
    deadlines: DeadlinesSection = DeadlinesSection()
    """The time after which a stage is stopped; downloads have separate limits."""

    @property
    def task_names(self) -> list[str]:
        """The names of all tasks of the benchmark: the experts' own, then the others."""
        own = [expert.name for expert in self.experts if expert.test]
        return own + [one.called for one in (*self.benchmark.tasks, *self.benchmark.mixes)]

    @property
    def mixable_names(self) -> list[str]:
        """The names of the tasks that composites and conversations can be made of: with rows."""
        own = [expert.name for expert in self.experts if expert.test]
        return own + [task.called for task in self.benchmark.tasks if task.rows]

    @model_validator(mode="after")
    def _sources_are_named(self) -> Self:
        adapters = {f"the adapter of {one.name!r}": one.adapter for one in self.experts}
        for what, source in {"base": self.base, **adapters}.items():
            if not source.strip():
                raise ValueError(f"{what} is empty; name owner/name, or path:<folder>")
        return self

    @model_validator(mode="after")
    def _there_are_experts(self) -> Self:
        if not self.experts and self.discover is None:
            raise ValueError("no experts: name some, or let them be found with `discover`")
        if self.discover is not None and not self.discover.base and ":" in self.base:
            raise ValueError(
                f"discover.base is missing: adapters are found by the `owner/name` of their base,"
                f" and {self.base!r} is none"
            )
        return self

    @model_validator(mode="after")
    def _only_gates_learn(self) -> Self:
        for_gates = self.router.model_fields_set - {"kind", "top_k", "temperature"}
        if self.router.kind == "prompt":
            for_gates -= {"null"}
        if self.router.kind != "gate" and for_gates:
            raise ValueError(
                f"router.{min(for_gates)} is for gates; take it out, or choose `kind: gate`"
            )
        if self.router.kind == "uniform" and (self.router.top_k, self.router.temperature) != (1, 1):
            raise ValueError(
                "`kind: uniform` has the mean of all experts, so router.top_k and"
                " router.temperature change nothing; take them out"
            )
        return self

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        names = [expert.name for expert in self.experts]
        for name in [*names, *(task.called for task in self.benchmark.tasks)]:
            refuse_name(name)
        for kind, all_names in (("expert", names), ("task", self.task_names)):
            if twice := [name for name, count in Counter(all_names).items() if count > 1]:
                raise ValueError(f"two {kind}s are named {twice[0]!r}; names must be unique")
        with_rows = [task.called for task in self.benchmark.tasks if task.rows]
        if of_experts := [name for name in with_rows if name in names]:
            raise ValueError(
                f"benchmark.tasks: {of_experts[0]!r} is an expert's name; give these rows as its"
                " `test`, or give the task another name"
            )
        return self

    @model_validator(mode="after")
    def _mixes_are_made_of_tasks(self) -> Self:
        with_rows = set(self.mixable_names)
        for section in self.benchmark.mixes:
            if strange := set(section.tasks) - with_rows:
                raise ValueError(f"{section.called}: there is no task {strange.pop()!r} with rows")
            if not with_rows:
                raise ValueError(
                    f"{section.called}: it is made of tasks' rows, and no task has rows"
                )
        for section in self.benchmark.conversation:
            if len(set(section.tasks) or with_rows) < 2:
                raise ValueError(
                    f"{section.called}: its subject changes at each turn, and only one task takes"
                    " part; add another"
                )
        return self

    @model_validator(mode="after")
    def _roles_need_a_template(self) -> Self:
        for key in ("conversations", "system_prompts"):
            if getattr(self.gates, key) and self.benchmark.template == "plain":
                raise ValueError(
                    f"gates.{key} needs a chat template, and `benchmark.template: plain` means that"
                    " gates are fitted to plain text; take one of them out"
                )
        return self

    @model_validator(mode="after")
    def _quantised_bases_are_whole(self) -> Self:
        for key in ("by_layer", "sharded"):
            if self.quantise and getattr(self.gates, key, None):
                raise ValueError(
                    f"gates.{key} takes a base as its files are, and `quantise: {self.quantise}`"
                    " asks for another; take one of them out"
                )
        return self

    @model_validator(mode="after")
    def _a_pool_is_used(self) -> Self:
        # `auto` does not count: a card may name no usable examples
        have_examples = [one.examples not in {None, "", AUTO} for one in self.experts]
        if self.gates.pool and self.discover is None and all(have_examples):
            raise ValueError(
                "gates.pool is for experts without examples, and every expert has some; take it"
                " out, or take out the examples of those that are to get theirs from it"
            )
        return self

    @model_validator(mode="after")
    def _gates_have_examples(self) -> Self:
        if self.router.kind == "gate" and not self.gates.pool:
            if self.router.without_examples != "refuse":
                return self._some_have_examples()
            if self.discover is not None:
                raise ValueError(
                    "adapters that `discover` finds may bring no examples, and a gate is fitted"
                    " to them; name a pool of prompts (gates.pool), or choose router.kind: prompt,"
                    " which needs none"
                )
            if without := [expert.name for expert in self.experts if not expert.examples]:
                raise ValueError(
                    f"expert {without[0]!r} has no examples, and a gate is fitted to them; name"
                    " some, or a pool of prompts (gates.pool), or choose router.kind: prompt, which"
                    " needs none"
                )
        return self

    def _some_have_examples(self) -> Self:
        if self.gates.method != "calibrate":
            raise ValueError(
                "router.without_examples goes with gates.method: calibrate; take one of them out"
            )
        if not any(expert.examples for expert in self.experts):
            raise ValueError(
                "no expert has examples, and a gate is fitted to some; give one of them examples,"
                f" or choose a router that needs none ({', '.join(get_args(Unfitted))})"
            )
        return self

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read and check a recipe; see `parse`."""
        return cls.parse(read_recipe(path), path)

    @classmethod
    def parse(cls, text: bytes, path: Path) -> Self:
        """Check a recipe; its path is for messages.

        Raises:
            RecipeError: It cannot be read, or has faults; the message names each with its place.
        """
        try:
            body = parse_yaml(text.decode(), typed=True)
        except UnicodeDecodeError as error:
            raise RecipeError(f"{path}, {not_utf8(path, error)}") from error
        except StrictYAMLError as error:
            raise RecipeError(f"{path}: not readable as YAML: {error}") from error
        if not isinstance(body, dict):
            raise RecipeError(f"{path}: a recipe is a mapping with `base` and `experts`")
        try:
            return cls.model_validate(_tuples(body))
        except ValidationError as error:
            raise RecipeError(f"{path}: {explain(error, cls)}") from error


def read_recipe(path: Path) -> bytes:
    """The text of a recipe; `RecipeError` if there is no such file, or it is too large."""
    if not path.is_file():
        is_folder = " (it is a folder; give the file in it)"
        guess = is_folder if path.is_dir() else did_you_mean(str(path), shipped())
        raise RecipeError(
            f"{path}: there is no such recipe file{guess}; shipped: {', '.join(shipped())}"
        )
    if path.stat().st_size > MAX_BYTES:
        raise RecipeError(f"{path}: larger than {MAX_BYTES:,} bytes, which no recipe needs")
    return path.read_bytes()


def _tuples(value: object) -> object:
    """Lists as tuples, which strict frozen sections need."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def shipped() -> dict[str, Path]:
    """The recipes that come with the program, by the name that `meteora run` takes."""
    others = {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}
    return {"quickstart": SHIPPED / "quickstart" / "recipe.yaml", **others}


def find_shipped(name: str) -> Path:
    """The file of a shipped recipe; `RecipeError` if there is none of this name."""
    recipes = shipped()
    if name not in recipes:
        raise RecipeError(
            f"there is no shipped recipe {name!r}{did_you_mean(name, recipes)}; there are"
            f" {', '.join(recipes)}"
        )
    return recipes[name]


def locate(name: str) -> Path:
    """A recipe's file: a shipped name, or a path."""
    return shipped().get(name, Path(name))


def folder_of(path: Path) -> Path:
    """The folder that paths in a recipe are relative to.

    It is the recipe's own folder. For a shipped recipe without one it is the working folder, since
    the user adds adapters and rows.
    """
    return Path.cwd() if path.parent == SHIPPED else path.parent
