"""The stages of a run as plain functions, and the process that runs them.

build            base, stack, gates, checkpoint
pool             prompts without labels, divided among the experts without examples
measure          the benchmark
benchmark        the benchmark of a checkpoint without its recipe
adopt            a checkpoint that was made elsewhere, added to the ledger
checkpoint       a checkpoint's folder with its texts, and the records of its stack and router
edit             add an expert to a checkpoint, or drop one
open_model       a plan as a loaded model
train_processes  gates trained by several processes
train_adapters   missing adapters of a recipe, trained on its rows
worker           the process in which stages run
worker_client    the run's side of that process
"""
