"""Read rows of text, and make prompts and labels from them.

rows           a row, its hash, and the check that no test is also an example
row_sources    JSONL files, BIG-bench, reasoning-gym, the Hub
hub_rows       a data set of the Hub, and the prompt and the answer in its rows
pinned         data sets of the Hub, asked for in a child process; a cache of their rows
spans          rows whose parts belong to different experts
conversations  several turns, made from single examples
dialogues      questions for conversations in a benchmark
composites     several questions in one prompt
background     texts that belong to no expert
labels         rows as token ids, each with its expert
pool           prompts without labels, divided among the experts
claims         which expert got each prompt of a pool
"""
