"""Claims: the expert that got each prompt of a pool. `pool` makes them, and plans use them."""

import json
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass

from meteora.artifacts import Noun, PoolShare, canonical_json
from meteora.untrusted.findings import MOST_NAMED, listed
from pipelines.data.rows import Row


@dataclass(frozen=True)
class Claim(Noun):
    """A prompt of a pool, and the expert that got it."""

    prompt: str
    expert: str
    """Empty if no expert got it."""
    cluster: int
    """Negative if the prompt was not read, since it does not fit into the base's context."""
    score: float
    """By how many standard deviations the expert's updates are larger on this cluster than on the
    whole pool. For a prompt that the expert wrote: how much likelier it is for the expert than for
    the base, in nats a token."""
    lead: float
    """The score minus that of the next expert. For a prompt that the expert wrote: how much
    likelier it is in the user's turn than its answer, in nats a token."""
    response: str | None = None
    """The expert's own answer, if the prompt is an example."""


def shares_of(claims: Sequence[Claim], names: Sequence[str]) -> tuple[PoolShare, ...]:
    """The part of each expert, in the order of `names`, and of the prompts that no expert got."""
    shares = []
    for name in (*names, ""):
        own = [claim for claim in claims if claim.expert == name]
        read = [claim for claim in own if claim.cluster >= 0]
        score, lead = (
            round(sum(values) / len(read), 3) if read else 0.0
            for values in ([claim.score for claim in read], [claim.lead for claim in read])
        )
        shares.append(PoolShare(name, len(own), len({c.cluster for c in read}), score, lead))
    return tuple(shares)


def describe_shares(shares: Iterable[PoolShare], known: Container[str] = ()) -> str:
    """Who got how many prompts: `64 to dates, 60 to sums; 5 to no expert`.

    Only the first few experts are named. One that has examples (`known`) needs no prompts, and is
    left out if it got none.
    """
    nobodys, given = 0, []
    for share in shares:
        if not share.expert:
            nobodys = share.num_prompts
        elif share.num_prompts or share.expert not in known:
            given.append(f"{share.num_prompts:,} to {share.expert}")
    return f"{listed(given, MOST_NAMED)}; {nobodys:,} to no expert"


def examples_of(claims: Iterable[Claim]) -> dict[str, list[Row]]:
    """The prompts that experts have answered, as examples, by expert."""
    examples: dict[str, list[Row]] = {}
    for claim in claims:
        if claim.response is not None:
            examples.setdefault(claim.expert, []).append(Row(claim.prompt, claim.response))
    return examples


def rows_without_expert(claims: Iterable[Claim]) -> list[Row]:
    """The prompts that were read and went to no expert, without an answer."""
    return [Row(claim.prompt, "") for claim in claims if not claim.expert and claim.cluster >= 0]


def write_claims(claims: Sequence[Claim]) -> str:
    """A line of JSON for each claim."""
    return "".join(canonical_json(claim.to_dict()) + "\n" for claim in claims)


def read_claims(text: str) -> list[Claim]:
    """Read the claims that `write_claims` wrote."""
    lines = text.split("\n")  # `splitlines` also splits at characters that JSON may hold
    return [Claim.from_dict(json.loads(line)) for line in lines if line]
