"""The last step of the gradients of parameters. Programs leave sums of their own, lest they add to one place in an
order that changes, and this kernel adds them up. Operators share it: it is compiled once or twice for a whole network.
"""
import triton
import triton.language as tl


@triton.jit(do_not_specialize=['programs', 'dim', 'taps'])
def add_up(partials, weight, bias, programs, dim, taps, UNIT: tl.constexpr, BLOCK_R: tl.constexpr,
           BLOCK_S: tl.constexpr):
    """The sums over ``programs`` rows of ``partials``, always in the same order. A row holds the first of the ``taps``
    of all channels, then the second, and last the biases. ``weight`` is (channels, taps), ``bias`` (channels,); what
    is None is left out. There are ``dim * UNIT`` channels."""
    DIM = dim * UNIT
    column = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    total = tl.zeros((BLOCK_R, BLOCK_S), tl.float32)
    for start in range(0, programs, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)[:, None]
        total += tl.load(partials + row * ((taps + 1) * DIM) + column[None, :],
                         mask=(row < programs) & (column < (taps + 1) * DIM)[None, :], other=0.0)
    total = tl.sum(total, 0)
    if weight is not None:
        tl.store(weight + column % DIM * taps + column // DIM, total.to(weight.dtype.element_ty),
                 mask=column < taps * DIM)
    if bias is not None:
        tl.store(bias + (column - taps * DIM), total.to(bias.dtype.element_ty),
                 mask=(column >= taps * DIM) & (column < (taps + 1) * DIM))
