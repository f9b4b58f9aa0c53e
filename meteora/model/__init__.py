"""A fused model in transformers: load it, generate with it, trace it.

fused            load a checkpoint; routed layers in a base; force one expert
saving           save a fused model as a checkpoint
prompt_choice    one expert for a whole prompt, without examples
shared_prefix    the common beginning of a batch's prompts, read once
generate         an answer to a prompt
chat             a conversation: answers that stream, each token with its expert
trace            the expert of each token, layer by layer
opening_offsets  offsets, which make up for an opening that all experts computed together
silent_experts   experts that change nothing on a probe
update_sizes     how strongly each expert acts on prompts, and which prompts are alike
auto_classes     transformers' auto classes for fused checkpoints
registration     register these classes with transformers, without importing it
"""
