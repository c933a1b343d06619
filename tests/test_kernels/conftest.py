import pytest
import torch


@pytest.fixture(autouse=True)
def threads(request):
    """Runs the test on one thread, or as many as its parameter ``threads`` says."""
    before = torch.get_num_threads()
    torch.set_num_threads(getattr(request, 'param', 1))
    yield torch.get_num_threads()
    torch.set_num_threads(before)
