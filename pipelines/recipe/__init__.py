"""Recipes: the YAML files in which a user describes a run; some ship with the program.

recipe       the whole recipe, read and checked
gates        its section `gates`
benchmark    its section `benchmark`
publish      its section `publish`
stage        the names of a run's stages
faults       what is wrong in one, with its place
keys         the reference of all keys, from the schema
from_folder  make a recipe from a folder of adapters
"""
