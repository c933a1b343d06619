"""Where there is no GPU, Triton kernels are tested by Triton's interpreter. It must be asked for before Triton is
imported. Tests run side by side, and each has a thread unless it asks for more."""
import os

os.environ.setdefault('OMP_NUM_THREADS', '1')

import torch  # noqa: E402 - reads the variable

if not torch.cuda.is_available():
    os.environ.setdefault('TRITON_INTERPRET', '1')
