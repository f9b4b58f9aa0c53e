"""From a folder with a LoRA adapter to an `Adapter`, or to the reasons why not.

reader         read an adapter, or say what is wrong with it
files          which files of a folder are the config and the weights
config         what `adapter_config.json` claims
tensors        which tensors are the A and B of which module
modules        rank and scaling of each module
finite         NaN, infinity and numbers out of all proportion
weights        the numbers themselves, read where they are needed
compatibility  does it fit this base, and the other adapters?
update_norm    how large the update is beside the weight that it changes
"""
