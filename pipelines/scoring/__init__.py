"""From answers to values, intervals, tests and differences.

metrics      what one answer is worth
row_scores   the values of every row
intervals    intervals and paired tests
compare      one system against another, row by row
regressions  one checkpoint against the one before
outputs      all answers of a measurement, as one Parquet file
recompute    recorded scores computed again from recorded answers
"""
