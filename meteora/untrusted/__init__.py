"""Parsers for text and files that strangers wrote: strict, and bounded in time and memory.

findings            reasons, each with a code, and the errors that carry them
config_fields       the fields of a config, each read to its type
patterns            a stranger's regular expressions, matched in linear time
safetensors_header  the header of a safetensors file, without its tensors
strict_json         JSON without NaN, duplicate keys or deep nesting
strict_yaml         YAML without aliases, duplicate keys or deep nesting
"""
