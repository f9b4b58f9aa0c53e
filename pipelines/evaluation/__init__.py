"""The measurement of systems on tasks: their list, the prompts, the answers and the scores.

measurements    every pair of a system and a task that a recipe asks for
tasks           a task: rows, composites, conversations, or one of lm-eval's own
systems         the systems to compare, each as a context around one model
oracle_routing  controls that know which question each token belongs to
conversations   dialogues with a live model, turn by turn, and their controls
evaluate        one system's answers to one task, and their scores
harness         prompts to a live model through lm-eval
lm_eval_tasks   tasks of lm-eval's own
lm_eval_model   fused models as a model type of lm-eval's command
resume          a log of answers, so that a stopped measurement continues
routing_stats   routing accuracy, entropy, tokens until routing switches
speed           the speed of a routed model against its base
"""
