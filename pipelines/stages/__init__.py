"""The stages of a run as plain functions, and the process in which they compute.

build            base, stack, gates, checkpoint
measure          the benchmark
checkpoint       the texts of a checkpoint's folder
edit             one expert more or less in a checkpoint
open_model       a plan as a loaded model
train_processes  gates trained by several processes
worker           the process in which stages compute
worker_client    that process, as the run sees it
"""
