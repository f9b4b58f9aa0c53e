"""Compare the base that an adapter names with the base at hand, by configs and vocabularies.

Names do not tell: a mirror, a quantised copy and a renamed repository have other names and the same
shapes. Shapes alone do not tell either: all linear layers of Mistral-7B and Llama-3-8B have equal
sizes, so the tensors of an adapter fit both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import AutoConfig

from meteora.artifacts import MeteoraError
from meteora.base.config_checks import check_source, require_layers_of_text
from meteora.base.loading import load_tokenizer
from meteora.base.shapes import fingerprint
from meteora.untrusted.findings import Findings, brief, shortened

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

NOT_SIZES = ("architecture", "vocab_size", "vocabulary_sha256")
"""Fields of a fingerprint that copies of a base may differ in."""
LEAST_IN_COMMON = 0.9
"""Share of the smaller vocabulary that must agree. A fine-tuned copy changes a few hundred."""


class UnreadableBaseError(MeteoraError):
    """The config or the tokenizer of a base cannot be read."""


def compare_bases(named: str, folder: Path, ours: Path) -> Findings:
    """Compare the base that an adapter names with the base at hand.

    Args:
        named: The name of the base in the adapter's config.
        folder: Holds the config of that base, and perhaps its tokenizer; no weights are needed.
        ours: The folder of the base at hand.

    Returns:
        A refusal `other_base`, or a warning: `base_alias`, or `other_vocabulary`.

    Raises:
        UnreadableBaseError: transformers does not read its config.
    """
    found = Findings()
    their_config, their_tokenizer = _read(named, folder)
    our_config, our_tokenizer = _read("the base", ours)
    if our_tokenizer is None:
        raise UnreadableBaseError("the tokenizer of the base at hand cannot be read")
    mine = fingerprint(our_config, our_tokenizer)
    its = fingerprint(their_config, their_tokenizer or our_tokenizer)
    sizes = replace(its, **{name: getattr(mine, name) for name in NOT_SIZES})
    differences = sizes.differences(mine)
    if differences:
        _refuse(found, named, differences[0])
        return found
    alike = _compare_vocabularies(found, named, their_tokenizer, our_tokenizer)
    if its.architecture != mine.architecture and not alike and not found.refusals:
        _refuse(found, named, f"the architecture {its.architecture}, not {mine.architecture}")
    if not found.refusals and not found.warnings:
        found.warn(
            "base_alias",
            f"it was trained on {shortened(named)}, which has the sizes and the vocabulary of the"
            " base at hand and is taken for a copy of it; where their weights differ, its answers"
            " do",
        )
    return found


def _read(named: str, folder: Path) -> tuple[PretrainedConfig, PreTrainedTokenizerBase | None]:
    try:
        check_source(folder)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        require_layers_of_text(config)
    except Exception as error:  # an untrusted file: the library can raise anything
        raise UnreadableBaseError(
            f"the config of {shortened(named)} is not one that transformers reads: {brief(error)}"
        ) from error
    try:
        return config, load_tokenizer(folder)
    except Exception:  # as above; without a tokenizer the sizes count
        return config, None


def _refuse(found: Findings, named: str, difference: str) -> None:
    found.refuse(
        "other_base",
        f"it was trained on {shortened(named)}, which has {difference} as the base at hand; leave"
        " it out, or take the base that it was trained on",
    )


def _compare_vocabularies(
    found: Findings,
    named: str,
    theirs: PreTrainedTokenizerBase | None,
    ours: PreTrainedTokenizerBase,
) -> bool:
    """Return whether every token has the same id in both; refuse or warn if not."""
    if theirs is None:
        found.warn(
            "base_alias",
            f"it was trained on {shortened(named)}, which has the sizes of the base at hand; no"
            " tokenizer of it can be read, so whether they share a vocabulary is not known",
        )
        return False
    its, mine = theirs.get_vocab(), ours.get_vocab()
    if its == mine:
        return True
    common = its.keys() & mine.keys()
    num_same = sum(its[token] == mine[token] for token in common)
    if num_same < LEAST_IN_COMMON * min(len(its), len(mine)):
        _refuse(found, named, _first_moved(its, mine))
    else:
        found.warn(
            "other_vocabulary",
            f"it was trained on {shortened(named)}, whose vocabulary has {len(its)} tokens where"
            f" the base at hand has {len(mine)}, {num_same} of them the same; texts with the others"
            " mean something else to it",
        )
    return False


def _first_moved(its: Mapping[str, int], mine: Mapping[str, int]) -> str:
    by_id = {at: token for token, at in its.items()}
    token = min((t for t in mine if its.get(t) != mine[t]), key=lambda t: mine[t])
    old = by_id.get(mine[token])
    return (
        f"the token {shortened(repr(old), 40)} at {mine[token]}, not {shortened(repr(token), 40)}"
    )
