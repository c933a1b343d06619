"""How Mamba-style mixers initialise the parameters of their scans."""
import math

import torch


@torch.no_grad()
def reset_scan_parameters(x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds, dt_min=1e-3, dt_max=1e-1,
                          dt_floor=1e-4):
    """Draw the parameters of one direction, or of K stacked ones, afresh (Mamba, arXiv 2312.00752, section 3.6).

    Args:
        x_proj_weight (Tensor): ([K,] rank + 2 * d_state, dim), PyTorch's default for linear layers.
        dt_projs_weight (Tensor): ([K,] dim, rank), uniform within rank**-0.5 of 0.
        dt_projs_bias (Tensor): ([K,] dim); the softplus of it is log-uniform in [``dt_min``, ``dt_max``], at
            least ``dt_floor``.
        A_logs (Tensor): (..., d_state), logarithms of 1 to d_state.
        Ds (Tensor): ones.
    """
    for weight in (x_proj_weight, dt_projs_weight):
        bound = weight.shape[-1]**-0.5
        weight.uniform_(-bound, bound)
    dt = torch.empty_like(dt_projs_bias).uniform_(math.log(dt_min), math.log(dt_max)).exp()
    dt.clamp_(min=dt_floor)
    dt_projs_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse softplus
    A_logs.copy_(torch.arange(1, A_logs.shape[-1] + 1).log().expand_as(A_logs))
    Ds.fill_(1)
