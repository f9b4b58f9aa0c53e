"""The routed linear layer, and the routers that choose its experts.

layer           a frozen projection, a stack of experts, and a router
routers         gate, arrow, norm, fixed, uniform: logits to weights
prompt_router   one choice for all tokens of a prompt
gates           put gates into a model; which modules share a decision, also computed again
weight_scores   routing by the adapters' weights, where there are no examples
prompt_opening  how the tokens that open every prompt are routed
turns           one decision for a whole turn of a conversation
passes          the arguments of a forward pass
shared_input    modules that read one input share the first matmul
expert_cache    many experts on the host, the last used ones on the device
hooks           watch what routers decide, from outside
"""
