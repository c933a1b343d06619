"""Triton's interpreter, made to round as GPUs do."""
import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_cast = interpreter.InterpreterBuilder.cast_impl


def cast(self, source, dtype):
    """As before, but float32 becomes bfloat16 by rounding to nearest even, not by truncation."""
    if (source.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
        return _cast(self, source, dtype)
    bits = np.ascontiguousarray(source.data).view(np.uint32)
    rounded = ((bits + (0x7fff + ((bits >> 16) & 1)).astype(np.uint32)) >> 16).astype(np.uint16)
    is_nan = (bits & 0x7fffffff) > 0x7f800000
    return interpreter.TensorHandle(np.where(is_nan, np.uint16(0x7fc0), rounded), dtype.scalar)


def mend():
    interpreter.InterpreterBuilder.cast_impl = cast
    interpreter.InterpreterBuilder.create_fp_trunc = cast
