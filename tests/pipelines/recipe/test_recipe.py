import os
from dataclasses import replace
from pathlib import Path

import pytest

from meteora.artifacts import JointSettings
from meteora.checkpoint.manifest import MAX_EXPERTS
from pipelines.planning.plan import joint_settings
from pipelines.recipe.gates import JointSection, numbers_of
from pipelines.recipe.recipe import SHIPPED, Recipe, RecipeError, locate, shipped

EXPERT = "{name: a, adapter: path:a, examples: jsonl:a.jsonl}"


def load(tmp_path: Path, text: str) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return Recipe.load(path)


def test_all_but_base_and_experts_may_be_left_out(tmp_path: Path) -> None:
    recipe = load(tmp_path, f"base: owner/name\nexperts: [{EXPERT}]\n")
    assert recipe.router.kind == "gate"
    assert recipe.gates.examples_per_expert == 64
    assert recipe.benchmark.compare == ("base", "oracle", "uniform", "arrow")


def test_an_emptied_section_or_list_counts_as_not_there(tmp_path: Path) -> None:
    text = f"base: a/b\nexperts: [{EXPERT}]\n"
    emptied = load(tmp_path, f"{text}gates:\n#  seed: 1\nbenchmark:\nrouter:\npublish:\n")
    assert emptied == load(tmp_path, text)
    inside = "gates: {composites: , method: }\nbenchmark:\n  tasks:\n#  - lm_eval: x\n  template:\n"
    assert load(tmp_path, f"{text}{inside}") == load(tmp_path, text)


@pytest.mark.parametrize(
    ("tag", "sound"),
    [(tag, True) for tag in ("v1", "release/2026-11", "1.0_a", "ä")]
    + [
        (tag, False)
        for tag in ("a b", "-a", "a..b", "a.", "a/", "/a", "a/.b", "a.lock", "a:b", "@{", "main")
    ],
)
def test_a_tag_is_a_name_that_git_takes(tag: str, sound: bool, tmp_path: Path) -> None:
    text = f"base: a/b\nexperts: [{EXPERT}]\npublish: {{repo: a/b, tag: '{tag}'}}"
    if sound:
        assert load(tmp_path, text).publish is not None
    else:
        with pytest.raises(RecipeError, match=r"publish.tag: .* is no name of a tag"):
            load(tmp_path, text)


def test_a_recipe_may_have_as_many_experts_as_a_checkpoint(tmp_path: Path) -> None:
    named = [EXPERT.replace("name: a", f"name: e{number}") for number in range(MAX_EXPERTS + 1)]
    recipe = load(tmp_path, f"base: a/b\nexperts: [{', '.join(named[:-1])}]")
    assert len(recipe.experts) == 4_096
    with pytest.raises(RecipeError, match=r"experts: has 4,097 items; at most 4,096$"):
        load(tmp_path, f"base: a/b\nexperts: [{', '.join(named)}]")


@pytest.mark.parametrize("count", ["0100", "+0100", "100", "1_00", "0x64"])
def test_a_number_with_a_zero_in_front_is_no_octal_one(tmp_path: Path, count: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"base: a/b\nexperts: [{EXPERT}]\ngates: {{examples_per_expert: {count}}}")
    assert Recipe.load(path).gates.examples_per_expert == 100


@pytest.mark.parametrize("rate", ["1e-3", "1E-3", "1.e-3", "+.1e-2", "0.001"])
def test_a_number_is_one_in_every_form_that_people_write(tmp_path: Path, rate: str) -> None:
    text = f"base: a/b\nexperts: [{EXPERT}]\ngates: {{method: joint, learning_rate: {rate}}}"
    gates = load(tmp_path, text).gates
    assert isinstance(gates, JointSection)
    assert gates.learning_rate == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param(f"experts: [{EXPERT}]", "base: Field required", id="no base"),
        pytest.param(
            f"base: ''\nexperts: [{EXPERT}]", "base is empty; name owner/name", id="nothing"
        ),
        pytest.param(
            "base: a/b\nexperts: [{name: a, adapter: '', examples: jsonl:a}]",
            "the adapter of 'a' is empty; name owner/name, or path:<folder>",
            id="no adapter",
        ),
        pytest.param(
            "base: a/b\nexperts: [{name: a, adapter: a/b, examples: 'hf:a/b?config=c'}]",
            "experts.0.examples: hf:a/b?config=c names no split, so its test rows would be read,"
            " and examples may not be those: add &split=train",
            id="test rows",
        ),
        pytest.param(
            f"base: a/b\nexperts: [{EXPERT}]\ngates: {{pool: hf:a/b}}",
            "add ?split=train",
            id="test prompts",
        ),
        pytest.param(
            f"base: a/b\nexperts: [{EXPERT}]\ndeadlines: {{base: 366d}}",
            "deadlines.base: 366d is too long; the most is 365d",
            id="no timer",
        ),
        pytest.param("base: a/b\nexperts: []", "no experts: name some", id="none"),
        pytest.param(
            "base: a/b\nexperts: []\nbenchmark: {conversation: [3]}",
            "no experts: name some",
            id="none, and a mix of their tasks",
        ),
        pytest.param(
            "base: a/b\ndiscover: {}",
            "adapters that `discover` finds may bring no examples",
            id="gate",
        ),
        pytest.param(
            "base: path:b\ndiscover: {}\nrouter: {kind: arrow}", "discover.base is missing", id="of"
        ),
        pytest.param(
            f"base: a/b\nexperts: [{EXPERT}]\nrouters: 1", "unknown key routers", id="unknown"
        ),
        pytest.param(
            f"base: a/b\nexperts: [{EXPERT}]\nrouter: {{top_k: 0}}",
            "router.top_k: Input should be greater than or equal to 1 (given: 0)",
            id="out of range",
        ),
        pytest.param(
            f"base: a/b\nexperts: [{EXPERT}]\nrouter: {{top_k: '2'}}",
            "a valid integer (given: the text '2'; write it without quotes)",
            id="wrong type",
        ),
        pytest.param(
            f"base: a/b\nexperts: [{EXPERT}]\nrouter: {{null: 'true'}}",
            "a valid boolean (given: the text 'true'; write it without quotes)",
            id="true in quotes",
        ),
        pytest.param(
            "base: a/b\nexperts: [{name: no, adapter: path:a, examples: jsonl:a}]",
            "experts.0.name: Input should be a valid string (given: false, which YAML reads as no"
            " text; write it in quotes)",
            id="a text that YAML reads as another value",
        ),
        pytest.param(
            "base: 2026-01-01\nexperts: []", "(given: 2026-01-01, which YAML reads as", id="a date"
        ),
        pytest.param(
            "base: [a/b]\nexperts: []",
            "base: Input should be a valid string (given: a list)",
            id="a list for a text",
        ),
        pytest.param(
            f"base: a/b\nexperts: [{EXPERT}]\nrouter: {{top_k: two}}",
            "router.top_k: Input should be a valid integer (given: 'two')",
            id="no number",
        ),
        pytest.param(
            "base: a/b\nexperts:\n  - {name: a, adaptr: path:a}",
            "unknown key experts.0.adaptr (did you mean experts.adapter?)",
            id="mistyped",
        ),
        pytest.param(
            f"base: a/b\nexperts: [{EXPERT}]\nrouter: {{seed: 1}}",
            "unknown key router.seed (did you mean gates.seed or benchmark.seed?)",
            id="in another section",
        ),
        pytest.param(
            "base: a/b\nrouter:\n  kind: gate\n   top_k: 1",
            "(line 4, column 9: 'top_k: 1'); check how far it is indented",
            id="indented",
        ),
        pytest.param(
            "base: a/b\nrouter:\n\tkind: gate", "and tabs are not allowed there", id="a tab"
        ),
        pytest.param(
            f"base: a/b\nexperts: [{EXPERT}]\nrouter: {{temperature: .nan}}",
            "router.temperature",
            id="not a number",
        ),
        pytest.param(
            f"base: a/b\nexperts: [{EXPERT}]\ngates: {{method: guess}}",
            "gates: method: Input should be 'calibrate' or 'joint'",
            id="another method",
        ),
        pytest.param(
            f"base: a/b\nexperts: [{EXPERT}]\ngates: joint",
            "gates: Input should be a section, with keys of its own (given: 'joint')",
            id="a method in place of the section",
        ),
        pytest.param(
            f"base: a/b\nexperts: [{EXPERT}]\ngates: {{steps: 5}}",
            "gates.steps goes with `method: joint`, which is not chosen: set it, or take gates.st",
            id="of the other method",
        ),
        pytest.param(
            f"base: a/b\nexperts: [{EXPERT}]\ngates: {{method: joint, by_layer: true}}",
            "gates.by_layer goes with `method: calibrate`, which is not chosen: set it, or take",
            id="of the default method",
        ),
        pytest.param(
            f"base: a/b\nexperts: [{EXPERT}]\ngates: {{method: joint, learning_rate: 0.0}}",
            "gates.learning_rate: Input should be greater than 0 (given: 0.0)",
            id="learns nothing",
        ),
        pytest.param(
            f"base: a/b\nexperts: [{EXPERT}, {EXPERT}]", "two experts are named 'a'", id="twice"
        ),
        pytest.param(
            "base: a/b\nexperts: [{name: ../a, adapter: path:a, examples: jsonl:a}]",
            "the name '../a' may hold",
            id="a path as a name",
        ),
        pytest.param(
            "base: a/b\nexperts: [{name: a, adapter: path:a}]",
            "expert 'a' has no examples",
            id="a gate without examples",
        ),
        pytest.param(
            f"base: a/b\nexperts: [{EXPERT}]\npublish: {{repo: model}}",
            "publish.repo: 'model' is not owner/name",
            id="published nowhere",
        ),
        pytest.param(
            f"base: a/b\nquantise: 4bit\nexperts: [{EXPERT}]\ngates: {{by_layer: true}}",
            "gates.by_layer takes a base as its files are, and `quantise: 4bit` asks for another",
            id="quantised and read by layer",
        ),
        pytest.param(
            f"base: a/b\nquantise: 2bit\nexperts: [{EXPERT}]",
            "quantise: Input should be '4bit' or '8bit'",
            id="no such bits",
        ),
        pytest.param(
            f"base: a/b\nexperts: [{EXPERT}]\nbenchmark: {{seed: {1 << 32}}}",
            "benchmark.seed: Input should be less than 4294967296",
            id="a seed that numpy does not take",
        ),
        pytest.param(
            f"base: a/b\nexperts: [{EXPERT}]\ngates: {{seed: {1 << 63}}}",
            "gates.seed: Input should be less than 9223372036854775808",
            id="a seed that the ledger does not take",
        ),
        pytest.param("base: a/b\nexperts: 5", "experts: Input should be a list", id="no list"),
        pytest.param("base: a/b\nexperts:", "no experts: name some", id="an emptied list"),
        pytest.param(
            f"base: a/b\nexperts: [{EXPERT}]\nrouters:", "unknown key routers", id="unknown, empty"
        ),
        pytest.param(
            f"base: a/b\nexperts: [{EXPERT}]\nrouter: gate",
            "router: Input should be a section, with keys of its own (given: 'gate')",
            id="no section",
        ),
        pytest.param("base: a/b\nbase: c/d", "the key 'base' is given twice", id="key twice"),
        pytest.param("base: &a a/b\nexperts: *a", "aliases are not allowed", id="alias"),
        pytest.param(
            "base: a/b\nexperts: !!bool maybe",
            "begin with !, are not allowed (line 2, column 10)",
            id="tag",
        ),
        pytest.param(
            "base: a/b\nexperts: !!int ''",
            "begin with !, are not allowed (line 2, column 10)",
            id="tag-empty",
        ),
        pytest.param("base: " + "[" * 99 + "]" * 99, "nested more than 50", id="deep"),
        pytest.param("base: 2020-99-99", "month must be in 1..12", id="no date"),
        pytest.param("base: ['x'\n", "expected ',' or ']' (line 2, column 1)", id="broken"),
        pytest.param("- base", "a recipe is a mapping", id="a list"),
        pytest.param("base: !!python/object:os.system {}", "not readable as YAML", id="an object"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(RecipeError) as refused:
        load(tmp_path, text)
    assert said in str(refused.value)
    assert str(refused.value).startswith(str(tmp_path / "recipe.yaml"))
    assert "\n" not in str(refused.value)


def test_a_recipe_in_another_encoding_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes("base: a/b\n# größer\n".encode("latin1"))
    with pytest.raises(RecipeError, match=r"recipe.yaml, line 2: not UTF-8; save .* `iconv -f"):
        Recipe.load(path)


def test_a_router_without_gates_needs_no_examples(tmp_path: Path) -> None:
    recipe = load(
        tmp_path,
        "base: a/b\nexperts: [{name: a, adapter: path:a}]\nrouter: {kind: arrow, top_k: 2}",
    )
    assert recipe.router.top_k == 2


def test_every_shipped_recipe_loads_and_finds_its_files() -> None:
    for name, path in shipped().items():
        recipe = Recipe.load(locate(name))
        if path.parent == SHIPPED:  # the user brings them
            continue
        for expert in recipe.experts:
            for source in (expert.adapter, expert.examples, expert.test):
                assert source is not None
                assert (path.parent / source.partition(":")[2]).exists()


def test_a_recipe_that_is_not_there_names_the_shipped_ones(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such recipe file; shipped: quickstart"):
        Recipe.load(tmp_path / "quikstart")


def test_a_benchmark_names_tasks_composites_and_controls(tmp_path: Path) -> None:
    text = """
base: a/b
experts:
  - {name: a, adapter: path:a, examples: jsonl:a.jsonl, test: jsonl:t.jsonl, metric: rougeL}
benchmark:
  composite: [3, {n: 5, tasks: [a, sums], count: 7}, {n: 3, num_fewshot: 2}]
  conversation: [3, {n: 10, tasks: [a, sums], count: 7}]
  compare: [base, oracle, one_expert, single, swap, alora, experts, random, linear, ties, dare_ties]
  system_prompt: ""
  speed: {rounds: 6}
  tasks:
    - {name: sums, rows: "reasoning_gym:chain_sum?seed=1", metric: [exact_match, verified]}
    - {lm_eval: hellaswag, limit: 50, num_fewshot: 5}
"""
    asked = load(tmp_path, text).benchmark
    assert [(c.n, c.tasks, c.count) for c in asked.composite] == [
        (3, (), None),
        (5, ("a", "sums"), 7),
        (3, (), None),
    ]
    assert asked.composite[2].called == "composite-3-2shot"
    assert [(c.n, c.tasks, c.count) for c in asked.conversation] == [
        (3, (), None),
        (10, ("a", "sums"), 7),
    ]
    assert asked.system_prompt == ""
    assert [task.num_fewshot for task in asked.tasks] == [0, 5]
    assert [task.called for task in asked.tasks] == ["sums", "hellaswag"]
    assert asked.speed is not None


def test_gates_may_be_fitted_to_composites_that_show_solved_ones(tmp_path: Path) -> None:
    text = "base: a/b\nexperts: [{name: a, adapter: path:a, examples: jsonl:a.jsonl}]\n"
    gates = load(tmp_path, text + "gates: {composites: [2, {n: 3, num_fewshot: 2}]}").gates
    assert numbers_of(gates.composites) == {"composites": (2, 3), "solved": (0, 2)}
    gates = load(tmp_path, text + "gates: {method: joint, composites: [2, 3]}").gates
    assert numbers_of(gates.composites) == {"composites": (2, 3), "solved": ()}  # an old id stays
    for wrong, said in (("[1]", "0.n: Input should be greater"), ("[[3]]", "0: Input should be a")):
        with pytest.raises(RecipeError, match=rf"gates\.composites\.{said}"):
            load(tmp_path, text + f"gates: {{composites: {wrong}}}")


@pytest.mark.parametrize(
    ("benchmark", "said"),
    [
        ("composite: [1]", "benchmark.composite.0.n: Input should be greater than or equal to 2"),
        ("composite: [3]", "composite-3: it is made of tasks' rows, and no task has rows"),
        ("composite: [{n: 3, tasks: [x]}]", "composite-3: there is no task 'x' with rows"),
        ("composite: [3, 3]", "two composites of 3 questions"),
        ("composite: [{n: 3, num_fewshot: 2}, {n: 3, num_fewshot: 2}]", "two composites of 3"),
        ("tasks: [{name: t}]", "a task has either `rows` or `lm_eval`"),
        ("tasks: [{rows: x, lm_eval: y}]", "a task has either `rows` or `lm_eval`"),
        ("tasks: [{name: t, rows: x, num_fewshot: 5}]", "`num_fewshot` is for tasks of `lm_eval`"),
        (
            "tasks: [{name: t, rows: x, folder: nope}]",
            "`folder` is for tasks of `lm_eval`; take it",
        ),
        ("tasks: [{lm_eval: x, num_fewshot: 65}]", "less than or equal to 64"),
        ("tasks: [{rows: x}]", "a task of rows needs a `name`"),
        ("tasks: [{name: t, rows: x, metric: bleu}]", "there is no metric 'bleu'; there are"),
        ("tasks: [{name: composite-2, rows: x}]", "'composite-2' is that of a mix of tasks"),
        ("tasks: [{name: t, rows: x}, {name: t, rows: y}]", "two tasks are named"),
        ("tasks: [{name: a, rows: x}]", "'a' is an expert's name; give these rows as its `test`"),
        ("conversation: [1]", "benchmark.conversation.0.n: Input should be greater than or equal"),
        ("conversation: [3]", "conversation-3: it is made of tasks' rows, and no task has rows"),
        ("conversation: [3, 3]", "two kinds of conversations of 3 turns; one of a size is enough"),
        (
            "tasks: [{name: t, rows: x}]\n  conversation: [3]",
            "conversation-3: its subject changes at each turn, and only one task takes part",
        ),
        ("compare: [swap]", "`swap` answers only conversations, and there are none; add"),
        ("compare: [one_expert]", "`one_expert` answers only composites and conversations"),
        (
            "template: plain\n  conversation: [3]",
            "`conversation` needs the roles of a chat template, and `template: plain` asks without",
        ),
        (
            "template: plain\n  system_prompt: Be brief.",
            "`system_prompt` needs a chat template, and `template: plain` asks without; take one",
        ),
        ("compare: [best]", "benchmark.compare.0"),
        (
            "batch_size: 0",
            "batch_size: Input should be greater than or equal to 1 or 'auto' .given: 0.$",
        ),
        (
            "tasks: [{name: t, rows: x, metric: 5}]",
            "benchmark.tasks.0.metric: Input should be a valid string or a list .given: 5, which",
        ),
        (
            "tasks: [{name: t, rows: x, metric: [acc, 5]}]",
            "recipe.yaml: benchmark.tasks.0.metric.1: Input should be a valid string .given: 5, ",
        ),
        ("tasks: [{lm_eval: x, leaderboard: a/b}]", "leaderboard: 'a/b' is not owner/dataset/task"),
    ],
)
def test_what_a_benchmark_cannot_be_asked_is_named(
    tmp_path: Path, benchmark: str, said: str
) -> None:
    with pytest.raises(RecipeError, match=said.replace("[", r"\[")):
        load(tmp_path, f"base: a/b\nexperts: [{EXPERT}]\nbenchmark:\n  {benchmark}\n")


def test_a_question_that_decides_for_its_turn_decides_for_the_opening_too(tmp_path: Path) -> None:
    text = f"base: a/b\nexperts: [{EXPERT}]\nrouter: {{share: turn"
    options = load(tmp_path, text + "}").router.options((), fitted=True)
    assert (options.share, options.opening) == ("turn", "prompt")
    with pytest.raises(RecipeError, match=r"router.opening is 'shared', and with `share: turn`"):
        load(tmp_path, text + ", opening: shared}")


@pytest.mark.parametrize("key", ["conversations: [3]", 'system_prompts: [""]'])
def test_gates_on_plain_text_have_no_roles(tmp_path: Path, key: str) -> None:
    text = f"base: a/b\nexperts: [{EXPERT}]\ngates: {{{key}}}\nbenchmark: {{template: plain}}"
    with pytest.raises(RecipeError, match=f"gates.{key.partition(':')[0]} needs a chat template"):
        load(tmp_path, text)


def test_what_decides_the_gates_is_in_their_id_and_what_does_not_is_not(tmp_path: Path) -> None:
    def settings(more: str) -> JointSettings | None:
        text = f"base: a/b\nexperts: [{EXPERT}]\ngates: {{method: joint{more}}}"
        return joint_settings(load(tmp_path, text).gates)

    assert joint_settings(load(tmp_path, f"base: a/b\nexperts: [{EXPERT}]").gates) is None
    plain = settings("")
    assert plain is not None
    assert plain.steps == 1000
    assert settings(", checkpoint_every: 7, gradient_checkpointing: true") == plain
    for name in ("steps", "batch_size", "accumulate"):
        assert settings(f", {name}: 7") == replace(plain, **{name: 7})
    for name in ("learning_rate", "warmup_ratio", "gate_loss_weight", "max_grad_norm"):
        assert settings(f", {name}: 0.125") == replace(plain, **{name: 0.125})
    assert settings(", start: zeros") == replace(plain, start="zeros")


@pytest.mark.parametrize(
    "more",
    [
        f"benchmark: {{limit: {'9' * 5_000}}}",
        f"benchmark: {{limit: 0x{'f' * 5_000}}}",
        f"benchmark: {{limit: '{'9' * 5_000}'}}",
        f"router: {{temperature: 1{'0' * 5_000}.5}}",
        f"gates: {{{'9' * 300}: 1}}",
        "\n".join(f"key{i}: 1" for i in range(8_000)),
        f"{'k' * 100_000}: 1",
    ],
    ids=["digits", "hex", "a text", "a fraction", "a key of digits", "unknown keys", "a long key"],
)
def test_an_absurd_recipe_gets_a_short_message(tmp_path: Path, more: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, f"base: a/b\nexperts: [{EXPERT}]\n{more}\n")
    assert len(str(caught.value)) < 5_000
    assert "sys." not in str(caught.value)


def test_what_is_no_file_of_a_recipes_size_is_one_sentence(tmp_path: Path) -> None:
    large, folder, pipe = (tmp_path / name for name in ("large.yaml", "folder", "pipe"))
    with large.open("wb") as file:
        file.truncate(1 << 30)
    folder.mkdir()
    os.mkfifo(pipe)
    for path, said in (
        (large, "larger than"),
        (folder, r"no such recipe file \(it is a folder; give the file in it\)"),
        (pipe, "no such recipe file"),
        (Path("/dev/zero"), "no such recipe file"),
        (tmp_path / "missing.yaml", "no such recipe file"),
    ):
        with pytest.raises(RecipeError, match=said) as refused:
            Recipe.load(locate(str(path)))
        assert "\n" not in str(refused.value)
