import importlib.util

import pytest
import torch

from mmvssm.kernels._core.triton_support import INTERPRETED

if INTERPRETED and importlib.util.find_spec('triton'):
    import interpreter
    interpreter.mend()


@pytest.fixture(autouse=True)
def threads(request):
    """Runs the test on one thread, or as many as its parameter ``threads`` says."""
    before = torch.get_num_threads()
    torch.set_num_threads(getattr(request, 'param', 1))
    yield torch.get_num_threads()
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def full_float32():
    """Products and convolutions of PyTorch read every digit of float32."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
