"""Base models: find, load, measure and compare them, and turn text into their tokens.

loading           load a base and its tokenizer
shapes            its fingerprint, the sizes and the norms of its layers
config_checks     checks of a base's configs that transformers does not make
placement         where the parts of a base lie and compute, if they are spread over devices
download          the files of a base on the Hub
sources           where a base's files are, and their hashes
match             whether two bases are the same model
chat_template     text to token ids, in the chat template or plain
padding           token ids of different lengths as one batch
shared_block      settings of the whole process, for several threads at once
temporary_folder  a temporary folder; what killed processes left of theirs is removed
"""
