"""YAML with one meaning: no key twice, no deep nesting, and nothing that makes a bomb."""

import re
from collections import Counter
from typing import Any

import yaml

from meteora.untrusted.findings import shortened

# libyaml's are ten times as fast, and PyYAML can be built without them
_BASE: Any = getattr(yaml, "CBaseLoader", yaml.BaseLoader)
_SAFE: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

TEXT_TAG = "tag:yaml.org,2002:str"
NULL_TAG = "tag:yaml.org,2002:null"
MAX_DEPTH = 50
MAX_BITS = 1_000
"""Most bits of a whole number."""
DECIMAL = re.compile(r"[-+]?[0-9]+")
INDENTATION = (
    "mapping values",
    "indentation",
    "expected key",
    "expected '-'",
    "cannot start any token",
)
"""Parts of parser messages that mostly come from a wrong indentation."""
MAX_NODES = 100_000
"""Half a second and 35 MB. Model cards that list hundreds of benchmarks have 20,000."""


class StrictYAMLError(ValueError):
    """The text is not YAML with exactly one meaning; the message is a clause that says why."""


def parse_yaml(text: str, *, typed: bool) -> object:
    """Read the value that `text` holds.

    Args:
        typed: whether to read numbers, booleans and dates, for a user's own files. Else every
            scalar is a text, or None for `null`: YAML reads `1:1:1` as a number, and a megabyte of
            it takes minutes. Such text may have aliases, as programs write them for a value that
            they use twice. Each is the same object again, so a walk through all of the value may
            take for ever.
    """
    try:
        _check_events(text, typed=typed)
        return yaml.load(text, _TypedLoader if typed else _TextLoader)  # noqa: S506
    except yaml.MarkedYAMLError as error:
        raise StrictYAMLError(_explained(error, text)) from None
    except (yaml.YAMLError, ValueError) as error:  # a plain ValueError: the 99th of May
        message = str(error).partition("; use sys.")[0]  # advice for programmers
        raise StrictYAMLError(" ".join(message.split())) from None


def _check_events(text: str, *, typed: bool) -> None:
    """Refuse text that is too large to build; parsing its events takes no memory.

    Typed text may have no aliases, and no tags: `!!bool maybe` and the like raise many errors.
    """
    depth = num_nodes = 0
    for event in yaml.parse(text, _BASE):
        if typed and isinstance(event, yaml.AliasEvent):
            raise StrictYAMLError(f"aliases are not allowed ({_place(event.start_mark)})")
        if typed and getattr(event, "tag", None):
            place = _place(event.start_mark)
            raise StrictYAMLError(f"tags, which begin with !, are not allowed ({place})")
        if typed and "\0" in (getattr(event, "value", None) or ""):
            raise StrictYAMLError(f"a text has a NUL, as no path has ({_place(event.start_mark)})")
        num_nodes += isinstance(event, yaml.NodeEvent)
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise StrictYAMLError(f"it is nested more than {MAX_DEPTH} levels deep")
        if num_nodes > MAX_NODES:
            raise StrictYAMLError(f"it has more than {MAX_NODES} values")


class _TextKeys:
    """Keys are texts, each given once; else the keys `null` and `on` are None and True."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for key, count in keys.most_common(1):
            if count > 1:
                raise StrictYAMLError(f"the key {key!r} is given twice ({_place(node.start_mark)})")
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                key.tag = TEXT_TAG
        return super().construct_mapping(node, deep=deep)  # ty: ignore[missing-attribute]


class _TypedLoader(_TextKeys, _SAFE):
    pass


# YAML 1.2 reads 1e-3 as a number, as people do; PyYAML's 1.1 wants 1.0e-3
_TypedLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)[eE][-+]?[0-9]+\Z"),
    list("-+.0123456789"),
)


class _TextLoader(_TextKeys, _BASE):
    pass


_TextLoader.add_implicit_resolver(NULL_TAG, re.compile(r"(?:~|null|Null|NULL)\Z"), list("~nN"))
_TextLoader.add_constructor(NULL_TAG, lambda _loader, _node: None)


def _refuse_base_60(node: yaml.ScalarNode) -> None:
    if ":" in node.value:  # of YAML 1.1 alone: 1:30 is 90 there, and long ones take minutes
        raise StrictYAMLError(
            f"{node.value:.20} is read as a number in base 60 ({_place(node.start_mark)}); write a"
            " text in quotes, and a number without colons"
        )


def _plain_float(loader: Any, node: yaml.ScalarNode) -> float:  # noqa: ANN401  (one of two classes)
    _refuse_base_60(node)
    value: float = loader.construct_yaml_float(node)
    return value


def _bounded_int(loader: Any, node: yaml.ScalarNode) -> int:  # noqa: ANN401  (one of two classes)
    _refuse_base_60(node)
    is_decimal = DECIMAL.fullmatch(node.value)  # with YAML 1.1 and PyYAML 0100 is 64
    value: int = int(node.value) if is_decimal else loader.construct_yaml_int(node)
    if value.bit_length() > MAX_BITS:  # Python cannot print larger ones in a message
        raise StrictYAMLError(f"a number has more than {MAX_BITS} bits ({_place(node.start_mark)})")
    return value


_TypedLoader.add_constructor("tag:yaml.org,2002:int", _bounded_int)
_TypedLoader.add_constructor("tag:yaml.org,2002:float", _plain_float)


def _explained(error: yaml.MarkedYAMLError, text: str) -> str:
    """The line with a fault and the usual causes, in place of the parser's own terms."""
    problem = " ".join(str(error.problem or error.context or error).split())
    mark = error.problem_mark or error.context_mark
    if mark is None:
        return problem
    lines = text.splitlines()
    line = lines[mark.line] if mark.line < len(lines) else ""
    advice = ""
    if any(words in problem for words in INDENTATION):
        tab = ", and tabs are not allowed there" if "\t" in line else ""
        advice = f"; check how far it is indented: keys of one section begin in one column{tab}"
    shown = f": {shortened(line.strip())!r}" if line.strip() else ""
    return f"{problem} ({_place(mark)}{shown}){advice}"


def _place(mark: Any) -> str:  # noqa: ANN401  (libyaml has a type of its own)
    return f"line {mark.line + 1}, column {mark.column + 1}"
