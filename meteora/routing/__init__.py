"""The routed linear layer, and the routers that choose its experts.

layer           a frozen projection, a stack of experts, and a router
routers         gate, arrow, norm, fixed, uniform: logits to weights
prompt_router   one choice for all tokens of a prompt
gates           put gates into a model; which modules share a gate; gradient checkpointing
weight_scores   routing by the adapters' weights, for experts without examples
prompt_opening  route the tokens that open every prompt by the prompt
turns           one decision for a whole turn of a conversation
passes          the arguments of a forward pass, and watchers that see them
shared_input    modules that read one input share the first matmul
expert_cache    many experts on the host, the last used ones on the device
hooks           record the decisions of routers
"""
