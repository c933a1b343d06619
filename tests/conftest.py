"""Where there is no GPU, Triton kernels are tested by Triton's interpreter. It must be asked for before Triton is
imported."""
import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault('TRITON_INTERPRET', '1')
