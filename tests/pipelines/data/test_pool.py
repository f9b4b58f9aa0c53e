"""A pool of prompts without labels, dealt to tiny experts that were trained on some of them."""

# ruff: noqa: PLC0415

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch

from meteora.artifacts import PoolShare
from pipelines.data.claims import (
    Claim,
    describe_shares,
    examples_of,
    read_claims,
    rows_without_expert,
    shares_of,
    write_claims,
)
from pipelines.data.rows import ExamplesError, Row
from pipelines.planning.examples import pool_prompts
from tests.pipelines.conftest import ALPHABETS, CHAT_TEMPLATE, Knowing, prompts_in

NOBODYS = "0123456789"


def test_each_prompt_goes_to_the_expert_that_knows_it(knowing: Knowing) -> None:
    import meteora
    from pipelines.data.pool import divide

    model, tokenizer = meteora.load(knowing.checkpoint, base_folder=knowing.base)
    of = {text: name for name, letters in ALPHABETS.items() for text in prompts_in(letters, 0, 24)}
    of |= dict.fromkeys(prompts_in(NOBODYS, 0, 24), "")
    prompts = random.Random(0).sample([*of], len(of))
    claims = divide(model, tokenizer, prompts, [*ALPHABETS], limit=10)
    assert [(claim.prompt, claim.expert) for claim in claims] == [(p, of[p]) for p in prompts]

    examples = examples_of(claims)
    assert {name: len(rows) for name, rows in examples.items()} == dict.fromkeys(ALPHABETS, 10)
    for name, rows in examples.items():
        with meteora.force_expert(model, name):
            said = meteora.generate(model, tokenizer, rows[0].prompt, max_new_tokens=8)
        assert rows[0].response == said
        assert sum(row.response == row.prompt[-1] * 3 for row in rows) >= 5
    assert {row.prompt for row in rows_without_expert(claims)} == {p for p in prompts if not of[p]}
    assert [(s.expert, s.num_prompts) for s in shares_of(claims, [*ALPHABETS])] == [
        ("low", 24),
        ("high", 24),
        ("", 24),
    ]
    again = divide(model, tokenizer, prompts, [*ALPHABETS], limit=10)
    assert again == claims


def test_an_expert_knows_the_prompts_of_its_task_and_no_others(knowing: Knowing) -> None:
    import meteora
    from pipelines.data.pool import known_shares

    model, tokenizer = meteora.load(knowing.checkpoint, base_folder=knowing.base)
    own = {name: prompts_in(letters, 0, 24) for name, letters in ALPHABETS.items()}
    names = [*ALPHABETS]
    assert known_shares(model, tokenizer, own, names) == {"low": 1.0, "high": 1.0}
    mixed = [text for pair in zip(own["low"], own["high"], strict=True) for text in pair]
    shares = known_shares(model, tokenizer, {"low": mixed, "high": own["high"]}, names)
    assert shares == {"low": 0.5, "high": 1.0}
    shares = known_shares(model, tokenizer, dict.fromkeys(names, own["high"]), names)
    assert shares["low"] == 0.0
    shares = known_shares(model, tokenizer, {"low": own["high"], "high": own["low"]}, names)
    assert shares == {"low": 0.0, "high": 0.0}


def test_the_number_for_no_expert_is_told_after_many_experts() -> None:
    """Experts with examples are named only if they got prompts."""
    names = [f"e{i}" for i in range(12)]
    claims = [Claim(f"{name} {i}", name, 0, 1.0, 1.0) for name in names[2:] for i in range(3)]
    shares = shares_of([*claims, Claim("7", "", 0, 0.1, 0.1)], names)
    first = ", ".join(f"3 to {name}" for name in names[2:9])
    assert describe_shares(shares, names[1:3]) == f"0 to e0, {first} (and 3 more); 1 to no expert"


def test_an_expert_with_examples_claims_nothing_of_a_pool_without_its_prompts(
    knowing: Knowing,
) -> None:
    """Its own prompts say what is standard for it, and it answers none of the pool's."""
    import meteora
    from pipelines.data.pool import divide

    model, tokenizer = meteora.load(knowing.checkpoint, base_folder=knowing.base)
    prompts = prompts_in(ALPHABETS["high"], 0, 24)
    own = {"low": prompts_in(ALPHABETS["low"], 0, 24)}
    asked: list[str] = []

    def once(key: str, ask: Callable[[], list[list[int]]]) -> list[list[int]]:
        asked.append(key)
        return ask()

    beside = divide(model, tokenizer, prompts, [*ALPHABETS], known=own, limit=10, once=once)
    assert {claim.expert for claim in beside} == {"high"}
    assert len(asked) == 1
    alone = divide(model, tokenizer, prompts, [*ALPHABETS], limit=10)
    assert {claim.expert for claim in alone} != {"high"}


def test_one_expert_and_few_prompts_are_no_error(knowing: Knowing) -> None:
    import meteora
    from pipelines.data.pool import divide

    model, tokenizer = meteora.load(knowing.checkpoint, base_folder=knowing.base)
    claims = divide(model, tokenizer, ["abc", "stu"], ["low"], limit=1)
    assert [claim.expert in {"low", ""} for claim in claims] == [True, True]
    assert [claim.lead for claim in claims] == [claim.score for claim in claims]  # nobody is next


def test_a_prompt_lies_where_its_own_tokens_do_and_not_those_of_the_template(
    knowing: Knowing,
) -> None:
    import meteora
    from meteora.base.chat_template import encode_prompt
    from meteora.model.fused import without_experts
    from meteora.model.update_sizes import read_prompts

    model, tokenizer = meteora.load(knowing.checkpoint, base_folder=knowing.base)
    tokenizer.chat_template = CHAT_TEMPLATE
    ids = encode_prompt(tokenizer, "abcd")
    own = tokenizer("abcd", add_special_tokens=False).input_ids
    start = next(i for i in range(len(ids)) if ids[i : i + len(own)] == own)
    assert 0 < start < len(ids) - len(own)
    with torch.inference_mode(), without_experts(model):
        states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    mean = states[len(states) // 2][0, start : start + len(own)].mean(0)
    longer = encode_prompt(tokenizer, "stuvwxyz")
    torch.testing.assert_close(read_prompts(model, tokenizer, [longer, ids], 2)[0][1], mean)


def test_a_prompt_is_read_up_to_so_many_of_its_own_tokens(knowing: Knowing) -> None:
    import meteora
    from meteora.base.chat_template import encode_prompt
    from meteora.model.update_sizes import read_prompts

    model, tokenizer = meteora.load(knowing.checkpoint, base_folder=knowing.base)
    tokenizer.chat_template = CHAT_TEMPLATE
    long, short, other = (encode_prompt(tokenizer, text) for text in ("abcdefgh", "abc", "ab"))
    cut = read_prompts(model, tokenizer, [long, other], 2, most_tokens=3)
    whole = read_prompts(model, tokenizer, [short, other], 2)
    torch.testing.assert_close(cut, whole)


def test_prompts_beyond_the_bases_context_are_nobodys_and_not_read(knowing: Knowing) -> None:
    import meteora
    from pipelines.data.pool import divide

    model, tokenizer = meteora.load(knowing.checkpoint, base_folder=knowing.base)
    long = "abcdefgh" * 512
    own = prompts_in(ALPHABETS["low"], 0, 4)
    claims = divide(model, tokenizer, [long, *own], [*ALPHABETS], limit=4)
    assert claims[0] == Claim(long, "", -1, 0.0, 0.0)
    assert [claim.prompt for claim in claims[1:]] == own
    assert long not in {row.prompt for row in rows_without_expert(claims)}
    assert sum(share.num_prompts for share in shares_of(claims, [*ALPHABETS])) == 5
    with pytest.raises(ExamplesError, match="none of its 1 prompts has 1 to 464 tokens"):
        divide(model, tokenizer, [long], [*ALPHABETS], limit=4)


def test_an_expert_is_compared_with_itself_and_not_with_larger_ones() -> None:
    from pipelines.data.pool import stand_out

    # the second expert's updates are larger everywhere; each stands out in its own cluster
    sizes = np.array([[3.0, 5.0], [3.2, 5.2], [1.0, 9.0], [1.2, 9.2], [0.9, 5.1]])
    scores = stand_out(sizes, np.array([0, 0, 1, 1]))  # the last one is an outsider
    assert scores.argmax(1).tolist() == [0, 1]
    assert (scores.min(1) < 0).all()


def test_a_cluster_goes_to_an_expert_that_stands_out_there_as_much_as_elsewhere() -> None:
    """Not where all have larger updates, nor where it stands out a little, here or at its best."""
    from pipelines.data.pool import claims_of

    larger = [[9, 0, 0, 0], [0, 9, 0, 0], [0, 0, 9, 0], [9, 9, 9, 1], [3, 0, 0, 0]]
    larger += [[0, 0, 0, 1]] * 11
    sizes = np.repeat(np.array(larger, dtype=np.float64), 2, axis=0)
    points = np.repeat(np.eye(16, dtype=np.float32), 2, axis=0)
    claims = claims_of([*map(str, range(32))], points, sizes, ["a", "b", "c", "d"])
    assert [claim.expert for claim in claims[::2]] == ["a", "b", "c", *[""] * 13]


def test_similar_points_share_a_cluster() -> None:
    from pipelines.data.pool import clusters_of

    rng = np.random.default_rng(0)
    centres = rng.normal(size=(3, 16))
    points = np.repeat(centres, 20, axis=0) + 0.1 * rng.normal(size=(60, 16))
    found = clusters_of(points.astype(np.float32), 3)
    assert [len(set(found[i : i + 20])) for i in (0, 20, 40)] == [1, 1, 1]
    assert len(set(found)) == 3
    assert clusters_of(points[:2].astype(np.float32), 3).tolist() == [0, 1]


def test_points_in_one_direction_from_the_mean_share_a_cluster() -> None:
    from pipelines.data.pool import clusters_of

    directions = np.array([[1, 0], [0, 1], [-1, -1]], dtype=np.float32)
    found = clusters_of(np.concatenate([directions, 20 * directions]) + 50, 3)
    assert found[:3].tolist() == found[3:].tolist()
    assert len(set(found)) == 3


def test_claims_are_the_same_from_their_file() -> None:
    claims = [Claim("a\nb\u2028c", "low", 0, 1.5, 0.5, "x"), Claim("d", "", 1, 0.0, 0.0)]
    claims.append(Claim("e", "low", 0, 1.5, 0.5, ""))  # an empty answer is one
    assert read_claims(write_claims(claims)) == claims
    assert shares_of(claims, ["low", "high"]) == (
        PoolShare("low", 2, 1, 1.5, 0.5),
        PoolShare("high", 0, 0, 0.0, 0.0),
        PoolShare("", 1, 1, 0.0, 0.0),
    )


def test_prompts_are_taken_once_and_not_where_they_are_examples() -> None:
    rows = [Row("a  b", ""), Row("a b", ""), Row("c", "x"), Row("d", "")]
    assert pool_prompts("pool.jsonl", rows, {"low": [Row("c", "y")]}) == ["a  b", "d"]
