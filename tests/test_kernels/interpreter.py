"""Triton's interpreter, made to round as GPUs do, and to scan all places at once."""
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


def scan(self, values):
    """As before, in log2(size) passes over whole tensors instead of one call for each element."""
    shape = values[0].handle.data.shape
    place = np.arange(shape[self.axis]).reshape([-1 if i == self.axis else 1 for i in range(len(shape))])
    distance = 1
    while distance < place.size:
        before = [self.to_tensor(np.roll(v.handle.data, distance, self.axis), v.dtype) for v in values]
        after = self.combine_fn.fn(*before, *values)
        after = after if isinstance(after, tuple) else (after,)
        values = [self.to_tensor(np.where(place < distance, v.handle.data, a.handle.data), v.dtype)
                  for v, a in zip(values, after)]
        distance *= 2
    return values


def mend():
    interpreter.ScanOps.generic_scan = scan
    interpreter.InterpreterBuilder.cast_impl = cast
    interpreter.InterpreterBuilder.create_fp_trunc = cast
