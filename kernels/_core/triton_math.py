"""Functions that Triton kernels share; float32 in, float32 out, by the GPU's special function unit."""
import triton
import triton.language as tl

from .triton_support import INTERPRETED

LN2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)
#: Numbers are divided by one that is the same for all by a product and a shift by so many bits, see ``magic_of``.
DIVISION = tl.constexpr(30)
_INTERPRETED = tl.constexpr(INTERPRETED)


def magic_of(divisor):
    """``m`` so that ``n * m >> DIVISION`` is ``n // divisor`` for all ``n`` with ``n * divisor < 2**DIVISION``."""
    return -(-(1 << DIVISION.value) // divisor)


@triton.jit
def _unit(x, FUNCTION: tl.constexpr):
    """One instruction of the special function unit; numbers below 1e-38 count as 0."""
    return tl.inline_asm_elementwise(FUNCTION + '.approx.ftz.f32 $0, $1;', '=f,f', [x], tl.float32, True, 1)


@triton.jit
def exp2(x):
    """``2**x``; relative error 2e-7."""
    if _INTERPRETED:
        return tl.exp2(x)
    else:
        return _unit(x, 'ex2')


@triton.jit
def exp2_of_product(x, y):
    """``2**(x * y)`` for products that are negative and mostly small, as those of decays are.

    An H100's exponential is too small in the mean, by 1.6e-8 to 2.2e-8 for products between -0.01 and -1 and by 6e-9
    above, which a recurrence adds up over hundreds of steps. 2.4e-8 more in the exponent is 1.7e-8 of the result, and
    takes no instruction more."""
    if _INTERPRETED:
        return tl.exp2(x * y)
    else:
        return _unit(x * y + 2.4e-8, 'ex2')


@triton.jit
def exp2_minus_abs(x):
    """``2**-|x|``; as ``exp2``, which takes both signs at no cost, where the compiler would not see that."""
    if _INTERPRETED:
        return tl.exp2(-tl.abs(x))
    else:
        return tl.inline_asm_elementwise(
            '{ .reg .f32 t; abs.f32 t, $1; neg.f32 t, t; ex2.approx.ftz.f32 $0, t; }', '=f,f', [x], tl.float32, True, 1)


@triton.jit
def exp(x):
    """``exp(x)``; relative error 2e-7 + 1e-7 |x|."""
    return exp2(x * LOG2_E)


@triton.jit
def log2(x):
    """Logarithm to base 2; absolute error 3e-7 between 1/2 and 2, relative error 1e-7 elsewhere."""
    if _INTERPRETED:
        return tl.log2(x)
    else:
        return _unit(x, 'lg2')


@triton.jit
def reciprocal(x):
    """``1 / x``; relative error 1e-7."""
    if _INTERPRETED:
        return 1 / x
    else:
        return _unit(x, 'rcp')


@triton.jit
def let_next_start():
    """The kernel launched next may start, if it was launched so that it waits itself."""
    tl.inline_asm_elementwise('griddepcontrol.launch_dependents; mov.b32 $0, 0;', '=r', [], tl.int32, False, 1)


@triton.jit
def wait_for_previous():
    """Until the kernel launched before has ended, and what it wrote can be read."""
    tl.inline_asm_elementwise('griddepcontrol.wait; mov.b32 $0, 0;', '=r', [], tl.int32, False, 1)


@triton.jit
def sigmoid(x):
    """``1 / (1 + exp(-x))``."""
    return reciprocal(1 + exp(-x))


@triton.jit
def soft_step(v):
    """``softplus(-v) / log(2)`` for ``v`` in units of log(2), good to 5e-7 of its value, however small it is:
    exponentials are to base 2 here, and ``exp2(A * step)`` is the decay."""
    u = exp2_minus_abs(v)
    # log2(1 + u) / u on [0, 1], by least relative error
    p = -0.0123194744810462 * u + 0.06360790133476257
    p = ((p * u - 0.1553519070148468) * u + 0.2560097575187683) * u - 0.35339483618736267
    p = ((p * u + 0.48006370663642883) * u - 0.7213100790977478) * u + 1.4426947832107544
    return p * u - tl.minimum(v, 0.0)


@triton.jit
def slope_of(v):
    """The derivative of ``softplus`` at ``-v`` for ``v`` in units of log(2)."""
    return reciprocal(1 + exp2(v))
