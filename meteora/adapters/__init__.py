"""A folder with a LoRA adapter becomes an `Adapter`, or the reasons why it cannot be used.

reader         read an adapter, or say what is wrong with it
files          which files of a folder are the config and the weights
config         what `adapter_config.json` claims
tensors        which tensors are the A and B of which module
modules        rank and scaling of each module
finite         NaN, infinity and numbers that are too large
weights        the weights themselves, read when they are needed
compatibility  whether an adapter fits the base and the other adapters
update_norm    how large the update is, compared with the weight that it changes
"""
