"""GPU kernels of Vashista: rotary embedding with cache write, paged decode attention, paged prefill attention.

Called by `vashista.engine` alone; imports torch, Triton and cuda-bindings alone. Importing any module here works
without the latter two and without a GPU; calling a kernel's door without Triton or a GPU raises
`KernelUnavailableError`, and without cuda-bindings the kernels of `cuda/` are left out.
"""
