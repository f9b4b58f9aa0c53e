"""Patterns from a stranger's config, matched in bounded time.

PEFT hands the keys of `rank_pattern` and `alpha_pattern`, and a text in `target_modules`, to `re`,
which backtracks: one key such as `(a+)+x` stalls a load for ever. Refusing every pattern is no
answer either, since PEFT documents them and its EVA writes one key for each module. So the part of
`re`'s language that such keys use (literals, `.`, classes, groups, `|`, repetition, `^`, `$`) is
compiled here to a nondeterministic automaton (Thompson 1968), whose set of states moves on once
for each character: it says what `re` says, in time that grows with pattern times text. What does
not fit an automaton of modest size (lookaround, back references, large counted repetitions) raises
`PatternError`, and the caller decides whether it can do without.
"""

from __future__ import annotations

from dataclasses import dataclass, field

MAX_LENGTH = 2_000
"""Characters of a pattern. The longest seen in a published config has 359."""
MAX_STATES = 4_000
MAX_DEPTH = 50
MAX_WORK = 800_000
"""Steps of all automata of one `Budget`; half a second. A path for each of 560 modules in both
tables, as EVA writes them for a model of 70B, needs 320,000."""
STEPS_PER_STATE = 10
"""What making a state costs: a thousand keys of a thousand states each would take longer to compile
than to match."""

_CLASSES = {
    "d": frozenset("0123456789"),
    "w": frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_"),
    "s": frozenset(" \t\n\r\f\v"),
}
_SPECIAL = frozenset("^$*+?{}[]\\|()")


class PatternError(ValueError):
    """The pattern is not one that is matched here; the message is a clause that says why."""


@dataclass
class Budget:
    """Work that all the patterns of one config may spend together, to be compiled and to match."""

    left: int = MAX_WORK

    def spend(self, steps: int) -> None:
        self.left -= steps
        if self.left < 0:
            raise PatternError("matching all its patterns against the modules takes too long")


@dataclass(eq=False, slots=True)
class _State:
    """One place in the automaton. `chars` None: no character is read, `on` is entered at once."""

    chars: frozenset[str] | None = None
    negated: bool = False
    at: str = ""
    """`^` or `$` where the state may be passed only at the beginning or the end."""
    on: list[_State] = field(default_factory=list)

    def takes(self, char: str) -> bool:
        return self.chars is not None and (char in self.chars) != self.negated


@dataclass(frozen=True)
class Pattern:
    """A compiled pattern. `anywhere`: a match may also begin after any dot, as PEFT has it."""

    source: str
    anywhere: bool
    automaton: tuple[_State, _State] | None
    """Its first and its last state; none for a plain path."""

    def matches(self, name: str, budget: Budget) -> bool:
        """Whether the whole of `name` matches, or its part after some dot if `anywhere`."""
        if self.automaton is None:
            budget.spend(1)
            return self._matches_plain(name)
        start, accept = self.automaton
        states = _enter({start}, 0, len(name), budget)
        for i, char in enumerate(name):
            moved = {after for state in states if state.takes(char) for after in state.on}
            if self.anywhere and char == ".":
                moved.add(start)
            states = _enter(moved, i + 1, len(name), budget)
        return accept in states

    def _matches_plain(self, name: str) -> bool:
        """A plain path, the usual key (EVA writes hundreds): its dots stand for any character."""
        begin = len(name) - len(self.source)
        if begin < 0 or not (begin == 0 or (self.anywhere and name[begin - 1] == ".")):
            return False
        tail = name[begin:]
        return tail == self.source or all(
            wanted in (char, ".") for wanted, char in zip(self.source, tail, strict=True)
        )


def _enter(states: set[_State], position: int, end: int, budget: Budget) -> set[_State]:
    """The states reachable without reading a character."""
    waiting = list(states)
    for state in waiting:
        barred = (state.at == "^" and position) or (state.at == "$" and position != end)
        if state.chars is not None or barred:
            continue
        waiting += [following for following in state.on if following not in states]
        states.update(state.on)
    budget.spend(1 + len(waiting))
    return states


def compile_pattern(source: str, budget: Budget, *, anywhere: bool = False) -> Pattern:
    r"""Compile a pattern that is to match a whole name; raises `PatternError`.

    Semantics:
        anywhere:  re.match(rf"(.*\.)?({source})$", name), PEFT's rule for pattern keys
        otherwise: re.fullmatch(source, name), its rule for `target_modules`
    """
    if len(source) > MAX_LENGTH:
        raise PatternError(f"it has {len(source)} characters, more than {MAX_LENGTH}")
    if not _SPECIAL & set(source):
        return Pattern(source, anywhere, None)
    parser = _Parser(source, budget)
    automaton = parser.alternatives(0)
    if parser.at < len(source):
        raise PatternError(f"a `)` at {parser.at} closes nothing")
    return Pattern(source, anywhere, automaton)


class _Parser:
    """Recursive descent; each rule returns the first and the last state of its part."""

    def __init__(self, source: str, budget: Budget) -> None:
        self.source = source
        self.budget = budget
        self.at = 0
        self.num_states = 0

    def alternatives(self, depth: int) -> tuple[_State, _State]:
        if depth > MAX_DEPTH:
            raise PatternError(f"it nests more than {MAX_DEPTH} groups")
        first, last = self._state(), self._state()
        while True:
            start, end = self._sequence(depth)
            first.on.append(start)
            end.on.append(last)
            if self._peek() != "|":
                return first, last
            self.at += 1

    def _sequence(self, depth: int) -> tuple[_State, _State]:
        first = last = self._state()
        while self._peek() not in ("", "|", ")"):
            start, end = self._repeated(depth)
            last.on.append(start)
            last = end
        return first, last

    def _repeated(self, depth: int) -> tuple[_State, _State]:
        begin = self.at
        part = self._atom(depth)
        resume = self.at
        low, high = self._counts()
        if resume == self.at:
            return part
        if self.source[begin] in "^$":
            raise PatternError(f"it repeats the `{self.source[begin]}` at {begin}")
        follow = self.at
        if self._peek() and self._peek() in "*+?{":
            raise PatternError(f"it repeats a repetition at {follow}")
        first = last = self._state()
        for copy in range(high if high is not None else max(low, 1)):
            if copy:
                self.at = begin
                part = self._atom(depth)
            start, end = part
            last.on.append(start)
            done = self._state()
            end.on.append(done)
            if copy >= low:
                last.on.append(done)
            if high is None and copy == max(low, 1) - 1:
                done.on.append(start)
            last = done
        self.at = follow
        return first, last

    def _counts(self) -> tuple[int, int | None]:
        """How often the part before is repeated, with the `?` of a lazy one, which is the same."""
        char = self._peek()
        counts: tuple[int, int | None] = (1, 1)
        if char and char in "*+?":
            counts = {"*": (0, None), "+": (1, None), "?": (0, 1)}[char]
            self.at += 1
        elif char == "{":
            close = self.source.find("}", self.at)
            parts = self.source[self.at + 1 : close].split(",")
            if close < 0 or len(parts) > 2 or not all(p.isdecimal() and len(p) < 4 for p in parts):
                raise PatternError(f"it has a `{{` at {self.at} that is not a count")
            counts = (int(parts[0]), int(parts[-1]))
            self.at = close + 1
        if counts != (1, 1) and self._peek() == "?":
            self.at += 1
        return counts

    def _atom(self, depth: int) -> tuple[_State, _State]:
        char = self._take()
        if char == "(":
            return self._group(depth)
        if char in "^$":
            return self._single(_State(at=char))
        if char == ".":
            return self._single(_State(frozenset("\n"), negated=True))
        if char == "[":
            return self._single(self._char_class())
        if char == "\\":
            chars, negated = self._escape()
            return self._single(_State(chars, negated))
        if char in "*+?{":
            raise PatternError(f"nothing precedes the `{char}` at {self.at - 1}")
        return self._single(_State(frozenset(char)))

    def _group(self, depth: int) -> tuple[_State, _State]:
        if self._peek() == "?":
            if self.source[self.at : self.at + 2] != "?:":
                raise PatternError(f"it has a `(?` at {self.at - 1} that is not a plain group")
            self.at += 2
        part = self.alternatives(depth + 1)
        if self._peek() != ")":
            raise PatternError("a `(` is not closed")
        self.at += 1
        return part

    def _escape(self) -> tuple[frozenset[str], bool]:
        char = self._take()
        if char.lower() in _CLASSES:
            return _CLASSES[char.lower()], char.isupper()
        if char.isalnum():
            raise PatternError(f"it has an escape \\{char} that is not matched here")
        return frozenset(char), False

    def _char_class(self) -> _State:
        negated = self._peek() == "^"
        self.at += negated
        chars: set[str] = set()
        while (char := self._take()) != "]" or not chars:
            if char == "\\":
                escaped, inverse = self._escape()
                if inverse:
                    raise PatternError("it has a negated class inside a class")
                if self._ranges():
                    raise PatternError("it has a range that begins with an escape")
                chars |= escaped
            elif self._ranges():
                self.at += 1
                last = self._take()
                if last == "\\" or ord(last) < ord(char) or ord(last) > 127:
                    raise PatternError(f"it has a range {char}-{last} that is not matched here")
                chars |= {chr(code) for code in range(ord(char), ord(last) + 1)}
            else:
                chars.add(char)
        return _State(frozenset(chars), negated)

    def _ranges(self) -> bool:
        """Whether what comes next inside a class is the `-` of a range."""
        return self._peek() == "-" and self.source[self.at + 1 : self.at + 2] not in ("]", "")

    def _single(self, state: _State) -> tuple[_State, _State]:
        self._count_state()
        end = self._state()
        state.on.append(end)
        return state, end

    def _state(self) -> _State:
        self._count_state()
        return _State()

    def _count_state(self) -> None:
        self.num_states += 1
        self.budget.spend(STEPS_PER_STATE)
        if self.num_states > MAX_STATES:
            raise PatternError(f"it needs an automaton of more than {MAX_STATES} states")

    def _peek(self) -> str:
        return self.source[self.at : self.at + 1]

    def _take(self) -> str:
        if not (char := self._peek()):
            raise PatternError("it ends in the middle of a group, a class or an escape")
        self.at += 1
        return char
