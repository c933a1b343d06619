import torch
from torch import nn


class DropPathScale(nn.Module):
    """Stochastic depth (arXiv 1603.09382) as a factor for each image, so that the addition of the branch can be fused
    into what follows: in training 0 with probability ``drop_prob``, else 1 / (1 - ``drop_prob``); None otherwise."""

    def __init__(self, drop_prob):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x, branches):
        """Factors for as many ``branches``, a tuple: (batch,) in float32 for ``x`` (batch, ...), or None where nothing
        is dropped."""
        if not self.training or not self.drop_prob:
            return (None,) * branches
        keep = 1 - self.drop_prob
        factors = torch.empty((branches, x.shape[0]), dtype=torch.float32, device=x.device)
        return factors.bernoulli_(keep).div_(keep).unbind()


def add_branch(x, branch, scale):
    """``x + scale * branch``, ``scale`` (batch,) or None, in the dtype of ``x``."""
    if scale is None:
        return x + branch
    return x + (scale.view(-1, *[1] * (x.dim() - 1)) * branch).to(x.dtype)
