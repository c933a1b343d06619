"""Runs the CUDA kernels of selective_scan_fn on the CPU, see cuda_emulator.h, as the extension's op.cpp does."""
import ctypes
import pathlib
import subprocess
from ctypes import c_bool, c_int32, c_int64, c_void_p

import torch

HERE = pathlib.Path(__file__).resolve().parent
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CHUNK = 256
#: Behind every tensor that kernels write.
GUARD = 32


def fields(kind, names):
    return [(name, kind) for name in names.split()]


class Walked(ctypes.Structure):
    _fields_ = fields(c_void_p, 'data') + fields(c_int64, 'batch channel')


class Projection(ctypes.Structure):
    _fields_ = (fields(c_void_p, 'data') + fields(c_int64, 'batch group state') + fields(c_void_p, 'constant')
                + fields(c_int32, 'span'))


class Plan(ctypes.Structure):
    _fields_ = fields(c_int32, 'warps turns span span_blocks blocks chunks segments segment_chunks')


class Args(ctypes.Structure):
    _fields_ = (fields(c_int32, 'batch dim length d_state') + fields(c_bool, 'softplus')
                + fields(c_int32, 'alignment projection_alignment') + fields(Plan, 'plan')
                + fields(Walked, 'u delta z') + fields(c_void_p, 'A D bias') + fields(Projection, 'B C')
                + fields(c_void_p, 'states segment_steps segment_states out') + fields(Walked, 'grad')
                + fields(c_void_p, 'grad_u grad_delta grad_z grad_A grad_D grad_bias grad_B grad_C'))


class SumArgs(ctypes.Structure):
    _fields_ = fields(c_void_p, 'parts total') + fields(c_int32, 'outer count d_state length pitch')


def build(folder):
    """The emulated kernels as a library, compiled once into ``folder``."""
    path = folder / 'emulated_scan.so'
    subprocess.run(['c++', '-std=c++17', '-O1', '-fno-strict-aliasing', '-fPIC', '-shared', '-I',
                    HERE.parents[1] / 'kernels' / 'selective_scan_fn' / 'csrc' / 'cuda', '-I', HERE,
                    HERE / 'emulated_scan.cpp', '-o', path], check=True)
    library = ctypes.CDLL(str(path))
    assert (library.scan_sizes(0), library.scan_sizes(1)) == (ctypes.sizeof(Args), ctypes.sizeof(SumArgs))
    return library


def alignment_of(tensors):
    """Bytes to which the eight steps of a thread are aligned in all ``tensors``, as far as it matters."""
    distances = [t.data_ptr() for t in tensors] + [s * t.element_size() for t in tensors for s in t.stride()[:-1]]
    return next(n for n in (16, 8, 1) if all(d % n == 0 for d in distances))


class Run:
    """One call of the kernels. ``processors``: multiprocessors of the GPU, which decide into how many segments the
    sequence is cut; ``descending``: the order of threads."""

    def __init__(self, library, processors=0, descending=False, softplus=False, **tensors):
        self.library, self.processors, self.descending = library, processors, descending
        self.tensors, self.guarded = tensors, []
        u, A = tensors['u'], tensors['A']
        self.dtype = DTYPES.index(u.dtype)
        self.args = a = Args(*u.shape, A.shape[1], softplus)
        walked = {name: tensors[name] for name in ('u', 'delta', 'z') if tensors[name] is not None}
        for name, t in walked.items():
            setattr(a, name, Walked(t.data_ptr(), *t.stride()[:2]))
        for name, t in dict(A=A, D=tensors['D'], bias=tensors['delta_bias']).items():
            setattr(a, name, None if t is None else t.data_ptr())
        for name in 'BC':
            t = tensors[name]
            if t.dim() == 2:
                setattr(a, name, Projection(constant=t.data_ptr(), span=u.shape[1]))
            else:
                setattr(a, name, Projection(t.data_ptr(), *t.stride()[:3], span=u.shape[1] // t.shape[1]))
        self.out = self.empty(u.shape, u.dtype)
        a.out = self.out.data_ptr()
        a.alignment = alignment_of([*walked.values(), self.out])
        a.projection_alignment = alignment_of([tensors[name] for name in 'BC' if tensors[name].dim() > 2])
        self.states = self.empty((*u.shape[:2], -(-u.shape[2] // CHUNK) + 1, A.shape[1]))
        a.states = self.states.data_ptr()

    def empty(self, shape, dtype=torch.float32):
        """NaN, with a guard behind it."""
        numel = torch.Size(shape).numel()
        memory = torch.full((numel + GUARD,), torch.nan, dtype=dtype)
        memory[numel:] = 7
        self.guarded.append(memory)
        return memory[:numel].view(shape)

    def step(self, args, number):
        self.library.scan_step(ctypes.byref(args), self.dtype, number, self.processors, self.descending)
        for memory in self.guarded:
            assert memory[-GUARD:].eq(7).all(), 'a write behind a tensor'

    def segments(self):
        a = self.args
        steps, states = (self.empty((a.plan.segments, a.batch, a.dim, n)) for n in (1, a.d_state))
        a.segment_steps, a.segment_states = steps.data_ptr(), states.data_ptr()

    def forward(self):
        """``out``."""
        self.step(self.args, 0)
        self.segments()
        self.step(self.args, 2)
        return self.out

    def backward(self, grad):
        """Gradients by name."""
        a, tensors = self.args, self.tensors
        self.step(a, 1)
        self.segments()
        a.grad = Walked(grad.data_ptr(), *grad.stride()[:2])
        a.alignment = min(a.alignment, alignment_of([grad]))
        grads = {name: self.empty(tensors[name].shape, grad.dtype) for name in ('u', 'delta', 'z')
                 if tensors[name] is not None}
        for name, t in grads.items():
            setattr(a, f'grad_{name}', t.data_ptr())
        rows = (a.plan.segments, a.batch, a.dim)
        parts = dict(A=self.empty((*rows, a.d_state)), D=self.empty(rows), bias=self.empty(rows))
        for name in 'BC':
            varying = tensors[name].dim() > 2
            parts[name] = self.empty((a.batch, a.plan.blocks, a.d_state, a.plan.chunks * CHUNK) if varying
                                     else (*rows, a.d_state))
        for name, t in parts.items():
            setattr(a, f'grad_{name}', t.data_ptr())
        self.step(a, 3)
        for name in 'A', 'D', 'bias':
            key = {'bias': 'delta_bias'}.get(name, name)
            if tensors[key] is not None:
                grads[key] = parts[name].sum((0, 1))
        for name in 'BC':
            t = tensors[name]
            if t.dim() == 2:
                grads[name] = parts[name].sum((0, 1))
            else:
                grads[name] = self.empty(t.shape, t.dtype)
                groups = t.shape[1]
                self.step(SumArgs(parts[name].data_ptr(), grads[name].data_ptr(), a.batch * groups,
                                  a.plan.blocks // groups, a.d_state, a.length, a.plan.chunks * CHUNK), 4)
        return grads
