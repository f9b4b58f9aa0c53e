"""Rows of text: where they come from, and how they become prompts and labels.

rows           a row, its hash, and the check that no test is also an example
row_sources    JSONL files, BIG-bench, reasoning-gym, the Hub
pinned         data sets of the Hub at one commit, and what was read of them
spans          rows whose parts belong to different experts
conversations  several turns, made from single examples
dialogues      questions for conversations in a benchmark
composites     several questions in one prompt
background     texts that belong to no expert
labels         rows as token ids, each with its expert
pool           prompts without labels, dealt to the experts that know them
claims         which expert got each prompt of a pool
"""
