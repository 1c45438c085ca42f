"""One process, one accuracy: MKL's vector functions before several threads call them.

torch computes element-wise functions on CPU with oneMKL's VML, which chooses a function's kernel
at its first call. If two threads make that call together, the share of one of them may be done by
the kernel of least accuracy (errors of 1e-4; pytorch/pytorch#188792). Where that hits the
cosines and sines of rotary embeddings, which a model computes once, a process answers otherwise
than the others do for as long as it lives.
"""

import torch

FUNCTIONS = (
    torch.acos,
    torch.asin,
    torch.atan,
    torch.cos,
    torch.erf,
    torch.erfc,
    torch.erfinv,
    torch.exp,
    torch.log,
    torch.log10,
    torch.log2,
    torch.sin,
    torch.sqrt,
    torch.tan,
    torch.tanh,
    torch.trunc,
)
"""Those of `IMPLEMENT_VML_MKL` in ATen's `vml.h`."""


def settle() -> None:
    """Call each function on one element, which one thread does. Safe to call again."""
    for dtype in (torch.float32, torch.float64):
        element = torch.full((1,), 0.5, dtype=dtype, device="cpu")
        for function in FUNCTIONS:
            function(element)
