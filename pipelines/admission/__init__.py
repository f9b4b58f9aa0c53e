"""From a name in a recipe to an accepted or refused expert.

experts         an adapter of a recipe: read and accepted, refused, or missing
sources         where bases and adapters come from, pinned and fetched
verdicts        verdicts on adapters, printed and recorded
base_identity   whether the base that an adapter names is the recipe's
silent_experts  experts that change nothing on a probe prompt, recorded
checkpoints     the checkpoint that a user names, and its base
card_examples   examples from a data set that an adapter's card names
own_prompts     prompts that an adapter writes itself
candidate       an adapter to add to a checkpoint
check           `meteora check`: the verdict without a base
"""
