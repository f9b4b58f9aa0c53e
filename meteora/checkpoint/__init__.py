"""The files of a fused checkpoint: write, read, find, change and export them.

manifest    `meteora.json`, and the names of all files
tensors     the tensors of experts and gates
stack       several adapters into one file of experts
interleave  the order of the bytes in that file, at the speed of a copy
edit        one expert more or less in the file
export      one expert as an adapter that PEFT loads
resolve     from a folder or a Hub id to the files and the base
"""
