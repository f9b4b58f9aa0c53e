"""Cards, pages and charts of what was measured.

summary       the results of a run, read from the ledger: one set of numbers for all outputs
report        the report pages, which open offline
side_by_side  what differs between two checkpoints
queries       the SQL queries of a report
charts        its charts
lineage       its graph of the parts of a checkpoint
svg           matplotlib figures as SVG with light and dark themes
html          the templates
trace         which expert each token went to, in a terminal and on a page
examples      test prompts shown with their trace
card          the model card
hub_metadata  what the Hub reads: the card's metadata, and scores for leaderboards
"""
