"""The files of a fused checkpoint: write, read, find, edit and export them.

manifest     `meteora.json`, and the names of all files
tensors      the tensors of experts and gates
sound_file   a file of tensors, opened only if it is sound
stack        several adapters into one file of experts
interleave   the rows of stacked factors, as fast as a copy
edit         add or drop one expert in that file
copies       the files of a checkpoint in another folder, perhaps with other gates
export       one expert as an adapter that PEFT loads
gguf_export  experts as adapters that llama.cpp loads
resolve      find a checkpoint and its base, in a folder or on the Hub
"""
