"""Compute the update of the chosen experts: one definition, and faster kernels that equal it.

stack           the experts of one layer, and the choices of a router
reference       the definition, and the legend of all axes
dispatch        choose the fastest kernel for a shape
gather_grouped  kernels in plain torch operations
onednn          float32 products on a CPU by the faster library
addmm           a 16-bit projection and its experts as one matmul
triton_launch   the Triton kernels as differentiable functions
triton_kernels  the Triton kernels themselves
"""
