"""Cards, pages and charts of what was measured.

summary        what a run came to: one set of numbers for all that show it
report         one page that opens offline
queries        the questions of a report, in SQL
charts         its figures
svg            matplotlib's figures as SVG with themes
html           the templates
palette        one colour an expert
trace          who had which token, in a terminal and on a page
examples       test prompts shown with their trace
card           the model card
card_metadata  the metadata on top of the card
eval_results   scores as the Hub's leaderboards take them
"""
