"""A fused model in transformers: load it, generate with it, trace it.

fused            load a checkpoint; routed layers in a base; force one expert
prompt_choice    one expert for a whole prompt, without examples
shared_prefix    the common beginning of a batch's prompts, read once
generate         an answer to a prompt
chat             a conversation: answers that stream, each token with its expert
trace            which expert each token went to, layer by layer
opening_offsets  offsets: what experts miss behind an opening that all of them computed
silent_experts   experts that change nothing on a probe
update_sizes     how strongly each expert acts on prompts, and which prompts are alike
auto_classes     transformers' auto classes for fused checkpoints
registration     registers them with transformers, without importing it
"""
