"""Fast versions of what `sqft.ops` defines. Nothing here is needed: without them everything works, slower.

choices          which kernel a shape gets on a GPU, by what was measured
tiles            Triton kernels of the adapted weight, for training on GPUs
packed_matrix    compiled kernels for CPUs (native/), for decoding with packed 4-bit weights
reference        what these compute, in plain torch
"""

from sqft.kernels.choices import Choice, Tiling, choose_kernels, choose_loss

__all__ = ["Choice", "Tiling", "choose_kernels", "choose_loss"]
