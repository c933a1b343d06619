"""The two re-orderings in plain PyTorch: what every backend is compared with. Any dtype, any device,
differentiable."""
from .orders import tables


def quadtree_reference(x, selected, height, width, shift, token_order, inverse):
    """See :func:`mmvssm.kernels.to_quadtree` and, for ``inverse``, :func:`mmvssm.kernels.from_quadtree`; ``x`` and
    the result are (batch, L, D)."""
    t = tables(height, width, tuple(shift), token_order, x.device)
    inside = selected[:, t.window].unsqueeze(-1)  # of the selected window, by token
    outside = 1 - inside
    if inverse:
        return outside * x[:, t.coarse_position] + inside * x[:, t.fine_position]
    return (outside * x)[:, t.coarse] + (inside * x)[:, t.fine]
