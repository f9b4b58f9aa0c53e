"""What a user asks for, in YAML; and the recipes that ship with the program.

recipe       the whole recipe, read and checked
gates        its section `gates`
benchmark    its section `benchmark`
publish      its section `publish`
stage        the names of a run's stages
keys         every key of a recipe, from its schema
from_folder  a recipe made from a folder of adapters
"""
