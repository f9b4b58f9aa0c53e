"""Who is asked what, and how the answers come.

measurements    every pair of a system and a task that a recipe asks for
tasks           a task: rows, composites, or one that lm-eval brings
systems         the systems that are compared, each as a context around a model
oracle_routing  controls that know whose each token is
ask             one system asked one task
harness         lm-eval as the one that generates
lm_eval_tasks   tasks that lm-eval brings itself
lm_eval_model   fused models for lm-eval's own command
resume          answers kept as they come, so that a stopped run goes on
routing_stats   routing accuracy, entropy, tokens until a switch
speed           a routed model's speed beside its base
"""
