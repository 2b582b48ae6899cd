"""What runs fastest on the chip? Triton kernels, each with a plain-PyTorch reference of the same numbers.

Importing this module registers the folder's operators in torch.ops.shardwright.

The folder has no __init__.py on purpose: started at the top of a checkout, Python finds it before Hugging Face's
package `kernels`, and prefers a package proper that stands later on its path to a folder without one.
"""

from .attention import attention, attention_backward
from .generator import make_key
from .random import bernoulli, dropout, rand_keep, rand_normal, rand_uniform
from .rms_norm import add_rms_norm, add_rms_norm_backward, rms_norm

__all__ = [
    "add_rms_norm",
    "add_rms_norm_backward",
    "attention",
    "attention_backward",
    "bernoulli",
    "dropout",
    "make_key",
    "rand_keep",
    "rand_normal",
    "rand_uniform",
    "rms_norm",
]
