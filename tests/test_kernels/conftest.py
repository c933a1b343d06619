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
