"""Kernels of the device, written in Triton: attention, 8-bit linears, INT4 experts, rows between them.

`mla`, `flash`, `linear8`, `experts`, `rows` and `split` check, choose tiles and launch. What they launch lies
in `jit/`, whose modules alone import Triton, when a kernel first runs: without a device the package needs
none. No kernel uses an instruction of one maker's cards alone.
"""
