"""Computes values, intervals, tests and differences from answers.

metrics      the value of one answer
outputs      all answers of a measurement, in one Parquet file, and the value of each
intervals    confidence intervals and paired tests
compare      two systems on the same rows
judges       whether recorded scores were judged by the recipe's present metrics
regressions  a checkpoint against the previous one of its recipe
recompute    recorded scores, computed again from recorded answers
served       asks a server for recorded answers again
"""
