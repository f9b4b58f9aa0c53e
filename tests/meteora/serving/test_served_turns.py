"""Many requests in one pass: each turn has the decision that it has in a pass of its own."""

import pytest
import torch

from meteora.base.chat_template import Template
from meteora.routing.passes import PassInput, UnreadPromptError
from meteora.routing.turns import Turns
from meteora.serving.served_turns import Requests, ServedTurns

OPENING, CLOSING = (1, 50, 51, 52), (53, 54)
TEMPLATE = Template(OPENING, CLOSING, header=OPENING[1:])
SINGLE = [*OPENING, 7, 8, 9, *CLOSING]
TWO = [*OPENING, 3, 4, *CLOSING, 9, 9, *OPENING[1:], 5, *CLOSING]
PLAIN = [11, 12, 13]  # of no template: all of it asks


def logits_of(tokens):
    """Logits [T, 3] of tokens [T, 1], which are their ids."""
    return torch.cat([(tokens * k).sin() * 3 for k in (0.7, 1.3, 2.9)], dim=1)


def served(num_held):
    return ServedTurns(TEMPLATE, num_choices=3, num_held=num_held, num_tokens=64)


def alone(ids):
    """What a gate decides for the tokens of one prompt, and for those of its answer."""
    turns = Turns(TEMPLATE)
    gate, prompt = turns.at_gate(), torch.tensor([ids])
    turns.see(PassInput(prompt, torch.ones_like(prompt, dtype=torch.bool), goes_on=False))
    own = gate.decide(logits_of, prompt.T.float())
    return own, own[-1]


def ask(turns, gate, *asked, filled=0):
    """What a gate decides in one pass; each request is (key, ids, number of tokens before)."""
    rows = [ids for _, ids, _ in asked]
    ids = torch.tensor([token for row in rows for token in row] + [0] * filled)
    starts = [sum(map(len, rows[:i])) for i in range(len(rows) + 1)]
    lengths = [len(ids) + before for _, ids, before in asked]
    turns.see(ids, Requests(starts, lengths, [key for key, _, _ in asked]))
    return gate.decide(logits_of, ids[:, None].float())


def test_requests_that_begin_and_go_on_together_are_decided_as_each_alone():
    turns = served(8)
    gate = turns.at_gate()
    single, two, plain = map(alone, (SINGLE, TWO, PLAIN))
    torch.testing.assert_close(ask(turns, gate, (4, SINGLE, 0)), single[0])
    found = ask(turns, gate, (6, TWO, 0), (4, [20], len(SINGLE)), (2, PLAIN, 0), filled=3)
    expected = torch.cat([two[0], single[1][None], plain[0]])
    torch.testing.assert_close(found[:-3], expected)
    found = ask(turns, gate, (2, [21], len(PLAIN)), (6, [21], len(TWO)), (4, [21], len(SINGLE) + 1))
    torch.testing.assert_close(found, torch.stack([plain[1], two[1], single[1]]))


def test_a_request_of_a_used_number_or_one_that_begins_again_is_read_anew():
    turns = served(2)
    gate = turns.at_gate()
    ask(turns, gate, (4, SINGLE, 0), (6, TWO, 0))
    torch.testing.assert_close(ask(turns, gate, (4, TWO, 0)), alone(TWO)[0])
    again = [*TWO, 20, 21]  # what was answered is computed again with the prompt
    expected = torch.cat([alone(TWO)[0], alone(TWO)[1].expand(2, -1)])
    torch.testing.assert_close(ask(turns, gate, (6, again, 0)), expected)


def test_decisions_are_held_of_the_last_requests_and_others_are_refused():
    turns = served(2)
    gate = turns.at_gate()
    for key in (1, 2, 3):
        ask(turns, gate, (key, SINGLE, 0))
    for key in (2, 3):
        torch.testing.assert_close(ask(turns, gate, (key, [9], 9))[0], alone(SINGLE)[1])
    for key, ids in ((1, [9]), (3, [9, 9])):  # an unknown one, and one that comes in parts
        with pytest.raises(UnreadPromptError, match="whole prompt was not read"):
            ask(turns, gate, (key, ids, 9))


def test_a_server_tries_out_its_memory_with_tokens_of_nobody():
    turns = served(2)
    turns.see(torch.zeros(5, dtype=torch.long), None)
    tokens = torch.arange(5.0)[:, None]
    assert turns.at_gate().decide(logits_of, tokens).equal(logits_of(tokens).log_softmax(-1))


def test_what_a_gate_does_is_one_graph():
    turns = served(2)
    gate, ids = turns.at_gate(), torch.tensor([*SINGLE, 20])
    turns.see(ids, Requests([0, 9, 10], [9, 1], [1, 2]))
    compiled = torch.compile(gate.decide, fullgraph=True, backend="eager", dynamic=True)
    tokens = ids[:, None].float()
    assert compiled(logits_of, tokens).equal(gate.decide(logits_of, tokens))
