"""GPU kernels of Vashista: rotary embedding with cache write, paged decode attention, paged prefill attention.

Called by `vashista.engine` alone; imports torch and Triton alone. Importing any module here works without Triton and
without a GPU; calling a kernel's door without them raises `KernelUnavailableError`.
"""
