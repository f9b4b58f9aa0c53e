"""Parsers for text and files of unknown origin: strict, and bounded in time and memory.

findings            reasons against a file, collected while it is read, and their error
config_fields       the fields of a config, each read to its type
gguf_header         the fields of a GGUF file, without its tensors
links               a link that leads out of a folder
patterns            regular expressions, matched in linear time
safetensors_header  the header of a safetensors file, without its tensors
strict_json         JSON without NaN, duplicate keys or deep nesting
strict_yaml         YAML without aliases, duplicate keys or deep nesting
"""
