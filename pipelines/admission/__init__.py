"""From a name in a recipe to an accepted or refused expert.

experts         each adapter fetched, read and judged
sources         where bases and adapters come from, each pinned to a commit
verdicts        what was found, recorded and said
base_identity   is the base that an adapter names the base of the recipe?
base_lookup     what the Hub says of that other base
silent_experts  experts that change nothing, recorded
candidate       an adapter that is to join a checkpoint
check           `meteora check`: the verdict without a base
"""
