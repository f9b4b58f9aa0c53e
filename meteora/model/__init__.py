"""A fused model in transformers: load it, generate with it, trace it.

fused            load a checkpoint; routed layers in a base; force one expert
prompt_choice    one expert for a whole prompt, without examples
shared_prefix    what the prompts of a batch begin with is read once
generate         an answer to a prompt
chat             a conversation: answers that stream, each token with its expert
trace            which expert had which token, layer by layer
opening_offsets  offsets: what experts miss behind an opening that all of them computed
silent_experts   experts that change nothing on a probe
update_sizes     how strongly each expert acts on prompts, and which prompts are alike
auto_classes     transformers' auto classes for fused checkpoints
registration     how transformers learns of them, without importing it
"""
