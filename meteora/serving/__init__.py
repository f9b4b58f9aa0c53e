"""Serve fused models with vLLM, which computes the base itself.

served_folder  the folder that vLLM serves: base, config, checkpoint; written and checked
fused_experts  the experts of projections that a server computes as one
folded_experts  experts, gate and offsets as two matmuls
base_order     check that a server keeps the outputs in the order of the base's file
vllm_plugin    the entry point that vLLM calls in each of its processes
vllm_version   whether the installed vLLM serves experts
served_turns   one decision for each turn, where a pass has tokens of many requests
vllm_prompts   vLLM's embedding, which shows the tokens of each pass; imports vLLM
vllm_linear    vLLM's linear layers, with experts; imports vLLM
"""
