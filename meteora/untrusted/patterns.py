r"""Match the patterns of an untrusted config against module paths, in linear time.

PEFT matches the keys of `rank_pattern` and `alpha_pattern`, and a text in `target_modules`, with
`re`, which backtracks: one key such as `(a+)+x` keeps it busy for years. RE2 takes time linear in
the text, whatever the pattern. It agrees with `re` on the syntax that `_SHARED` describes, which
excludes look-around, back references and inline flags.
Other patterns raise `PatternError`, and the caller decides what that means.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import re2

from meteora.untrusted.findings import shortened

MAX_LENGTH = 2_000
"""Characters of a pattern. The longest seen in a published config has 359."""
MAX_MEMORY = 1 << 18
"""Bytes of one compiled pattern; `re2` keeps the last 128 patterns."""
MAX_NANOSECONDS = 1_000_000_000
"""For all patterns of one config. A path for each of 560 modules in both tables, as EVA writes them
for a 70B model, takes a third."""

# Measured on the worst patterns found. Time is counted from sizes and never from a clock, so that
# an adapter gets the same verdict on every machine.
NS_PER_COMPILE = 40_000
NS_PER_INSTRUCTION = 500
"""To compile one instruction of a pattern."""
NS_PER_MATCH = 3_000
"""To bring one match from RE2 to Python."""
NS_PER_STEP = 10
"""To run one instruction of a pattern on one byte."""
NS_PER_STEP_OF_PATH = 2
"""The same for a path without operators, per dot and byte."""
NS_PER_NAME = 100
"""To compare a name with a text."""

_OPTIONS = re2.Options()
_OPTIONS.max_mem = MAX_MEMORY
_OPTIONS.never_capture = True
_OPTIONS.never_nl = True  # no dot and no class reaches into the next line
_OPTIONS.log_errors = False

_OPERATORS = frozenset("^$*+?{}[]\\|()")
_WHOLE = re.compile(r"\^((?:[0-9A-Za-z_]|\\[^0-9A-Za-z])*+)")
"""A whole path, such as `^model\\.layers\\.0`, as `export_expert` writes it."""
_SHARED = re.compile(
    r"""(?:
        [^\\(\[{^$]                                     # a literal, ., |, ), *, + or ?
      | \( (?: \?: | (?!\?) )                           # a group, without flags or a name
      | (?: [$^] | \\b ) (?![*+?{])
      | \{ (?: 0 | [1-9][0-9]* ) (?: , (?: 0 | [1-9][0-9]* )? )? \}
      | \\ (?: [dDsSwW] | [^0-9A-Za-z] )
      | \[ \^?+ \]?+ (?:                                  # a class
            [^\\\[\]] | \[ (?!:) | \\ (?: [dDsSwW] (?! -[^\]] ) | [^0-9A-Za-z] )
        )*+ \]
    )*+""",  # possessive repetitions, so that this check takes linear time itself
    re.VERBOSE | re.DOTALL,
)


class PatternError(ValueError):
    """The pattern cannot be matched here; the message is a clause that says why."""


@dataclass
class Budget:
    """Time that all patterns of one config may take together."""

    nanoseconds: int = MAX_NANOSECONDS

    def spend(self, nanoseconds: int) -> None:
        """Raise `PatternError` where less is left."""
        self.nanoseconds -= nanoseconds
        if self.nanoseconds < 0:
            raise PatternError("matching all its patterns against the modules takes too long")


def matching(
    source: str, names: Sequence[str], budget: Budget, *, anywhere: bool = False
) -> set[str]:
    r"""Return the names that a pattern matches.

    Semantics:
        anywhere:  re.match(rf"(.*\.)?({source})$", name), PEFT's rule for pattern keys
        otherwise: re.fullmatch(source, name), its rule for `target_modules`

    Args:
        names: module paths, of ASCII characters without a line break

    Raises:
        PatternError: the pattern is too long or too large, is not of the syntax that RE2 and `re`
            share, or the budget is used up.
    """
    if len(source) > MAX_LENGTH:
        raise PatternError(f"it has {len(source)} characters, more than {MAX_LENGTH}")
    if whole := _WHOLE.fullmatch(source):
        budget.spend(NS_PER_NAME * len(names))
        return {re.sub(r"\\(.)", r"\1", whole[1])}.intersection(names)
    shared = _SHARED.match(source)
    if shared is None or shared.end() < len(source):
        rest = source[shared.end() if shared else 0 :]
        raise PatternError(f"the part that begins with {shortened(rest, 10)!r} is not matched here")
    if ")" in source:
        _compile(source)  # alone, so that no `)` of it closes the group around it
    # one search through all names at once, a line each
    before = r"(?:.*\.)?" if anywhere else ""
    pattern = _compile(rf"(?m)^{before}(?:{source})$")
    budget.spend(NS_PER_COMPILE + NS_PER_INSTRUCTION * pattern.programsize)
    text = "\n".join(names).encode("ascii", "replace")
    if _OPERATORS.isdisjoint(source):  # a path: a match can begin after any dot
        budget.spend(NS_PER_STEP_OF_PATH * (1 + source.count(".")) * len(text))
    else:
        budget.spend(NS_PER_STEP * pattern.programsize * len(text))
    matches = set()
    for match in pattern.finditer(text):
        budget.spend(NS_PER_MATCH)
        matches.add(match.group().decode("ascii"))
    return matches


def _compile(source: str) -> re2._Regexp:
    try:
        return re2.compile(source, _OPTIONS)
    except UnicodeEncodeError:
        raise PatternError("it is not valid Unicode") from None
    except re2.error as error:
        reason = error.args[0].decode("utf-8", "replace")
        raise PatternError(f"RE2 refuses it: {shortened(reason)}") from None
