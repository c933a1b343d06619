"""What the tests of every operator share. An operator is a folder of ``kernels/`` with a ``cases.py``."""
import contextlib
import functools
import pathlib
from dataclasses import dataclass
from importlib import import_module

import pytest
import torch

import mmvssm.kernels
from mmvssm.kernels import use_backend
from mmvssm.kernels._core.cases import generator, relative_error

ROOMS = sorted(path.parent.name for path in pathlib.Path(mmvssm.kernels.__file__).parent.glob('*/cases.py')
               if not path.parent.name.startswith('_'))
#: Half a minute each in Triton's interpreter; a GPU runs them.
SLOW_TO_INTERPRET = {('state_fusion', 'd_state_16'), ('state_fusion', 'one_image'), ('selective_scan', 'd_state_16'),
                     ('selective_scan', 'segments-96')}
DEVICES = ['cpu', *(['cuda'] if torch.cuda.is_available() else [])]


def room(name, part):
    """Module ``part`` of operator ``name``, e.g. its ``cases`` or ``dispatch``."""
    return import_module(f'mmvssm.kernels.{name}.{part}')


def backends(name):
    """Names of the operator's backends."""
    return [backend.name for backend in room(name, 'dispatch').BACKENDS]


@dataclass(frozen=True)
class Call:
    """Case ``case`` of operator ``op`` on one backend and one device."""
    op: str
    case: str
    backend: str
    device: str = 'cpu'

    def __str__(self):
        return '-'.join([self.op, self.case, self.backend] + [self.device] * (self.device != 'cpu'))

    @property
    def interpreted(self):
        """Whether Triton's interpreter runs it, which takes a hundred times as long."""
        return (self.backend, self.device) == ('triton', 'cpu')

    def inputs(self, dtype):
        """Fresh arguments by name; skips the test, with the dispatcher's reason, if the backend cannot run them."""
        cases = room(self.op, 'cases')
        tensors = cases.inputs(cases.CASES[self.case], dtype, self.device)
        backend = next(b for b in room(self.op, 'dispatch').BACKENDS if b.name == self.backend)
        with use_backend(self.backend):
            reason = backend.why_not(next(iter(tensors.values())))
        if reason:
            pytest.skip(f'{self.op}, {self.backend}: {reason}')
        return tensors

    def forward(self, tensors):
        """The operator's output."""
        cases = room(self.op, 'cases')
        with use_backend(self.backend):
            return cases.operator(cases.CASES[self.case], tensors)

    def evaluate(self, tensors, **kwargs):
        """``{'output': ..., argument: gradient, ...}``; see :func:`evaluate`."""
        cases = room(self.op, 'cases')
        with use_backend(self.backend):
            return evaluate(cases.operator, cases.CASES[self.case], tensors, **kwargs)

    def repeatable(self):
        """Where equal runs of this call give equal bits: anywhere, but PyTorch's own operations on a GPU, some of which
        add up in any order, do so in its deterministic mode alone."""
        return deterministic() if (self.backend, self.device) == ('torch', 'cuda') else contextlib.nullcontext()

    def expected(self, tensors):
        """What :meth:`evaluate` should return, by the reference in float64 on the CPU."""
        cases = room(self.op, 'cases')
        case, dtype = cases.CASES[self.case], next(iter(tensors.values())).dtype
        wide = {name: t.detach().cpu() if t is not None else None for name, t in tensors.items()}
        wide = {name: t.double() if t is not None and t.is_floating_point() else t for name, t in wide.items()}
        cotangent = cotangent_like(cases.reference(case, wide).to(dtype), self.case).double()
        return evaluate(cases.reference, case, wide, cotangent=cotangent)

    def check(self, got, expected):
        """Every tensor of ``got`` has the shape of the expected one and is within its tolerance."""
        cases = room(self.op, 'cases')
        of_backend = getattr(cases, 'BACKEND_TOLERANCES', {})
        assert got.keys() == expected.keys()
        for name, tensor in got.items():
            assert tensor.shape == expected[name].shape, name
            error = relative_error(tensor, expected[name])
            tolerance = cases.TOLERANCES[tensor.dtype][name]
            if tensor.dtype == torch.float32:
                tolerance = of_backend.get((self.backend, name), tolerance)
            assert error <= tolerance, f'{name}: relative error {error:.1e}, allowed {tolerance:.0e}'


def calls(case=lambda name, case: True, ops=ROOMS, slow=False):
    """Every operator's cases for which ``case(name, case)`` holds, on every backend and device. Triton's interpreter
    is slow: it gets a few of them, with ``slow`` all but the slowest."""
    few = ('tiny', 'half_params', 'no_batch')
    return [Call(op, name, backend, device) for op in ops for name, c in room(op, 'cases').CASES.items()
            if case(name, c) for backend in backends(op) for device in DEVICES
            if (backend, device) not in (('triton', 'cpu'), ('cuda', 'cpu'))
            or backend == 'triton' and ((op, name) not in SLOW_TO_INTERPRET if slow else name.startswith(few))]


def tiny_calls():
    """Cases of a few elements, for checks that take time per element or are slow as such."""
    return calls(lambda name, case: name.startswith('tiny'))


def leaves(tensors):
    """The same arguments in the same memory layout, floating-point ones requiring gradients."""
    return {name: t.detach().requires_grad_() if t is not None and t.is_floating_point() else t
            for name, t in tensors.items()}


def cotangent_like(output, name):
    """Random numbers of ``output``'s shape, dtype and device, belonging to the case ``name``."""
    cotangent = torch.randn(output.shape, generator=generator(name, 1), dtype=torch.float64)
    return cotangent.to(output.device, output.dtype)


def evaluate(function, case, tensors, cotangent=None):
    """Output of ``function(case, tensors)`` and the gradients of all floating-point tensors by name."""
    tensors = leaves(tensors)
    output = function(case, tensors)
    if cotangent is None:
        cotangent = cotangent_like(output, case.name)
    wanted = {name: t for name, t in tensors.items() if t is not None and t.requires_grad}
    grads = torch.autograd.grad(output, list(wanted.values()), cotangent)
    for t, grad in zip(wanted.values(), grads):
        assert grad.dtype == t.dtype
    return {'output': output.detach(), **dict(zip(wanted, grads))}


@functools.cache
def expected(op, case, dtype):
    """:meth:`Call.expected` for the inputs that the case itself makes; one run for all backends."""
    cases = room(op, 'cases')
    return Call(op, case, None).expected(cases.inputs(cases.CASES[case], dtype))


@contextlib.contextmanager
def deterministic(fill=False):
    """PyTorch's own operations give equal bits in equal runs, or warn. With ``fill``, uninitialised memory holds NaN,
    from ``torch.empty`` in Python and ``at::empty`` in C++ alike."""
    before = (torch.are_deterministic_algorithms_enabled(),
              torch.is_deterministic_algorithms_warn_only_enabled(),
              torch.utils.deterministic.fill_uninitialized_memory)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = fill
        try:
            assert not fill or torch.empty(100).isnan().all()
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            torch.utils.deterministic.fill_uninitialized_memory = before[2]


def poisoned_memory():
    """Uninitialised memory holds NaN; see :func:`deterministic`."""
    return deterministic(fill=True)


def save_cpu_results(path):
    """Save the instruction set in use and what backend ``cpu`` makes of every case in float32."""
    results = {(call.op, call.case): call.evaluate(call.inputs(torch.float32))
               for call in calls() if call.backend == 'cpu' and call.device == 'cpu'}
    torch.save((torch.ops.mmvssm_cpu.isa(), results), path)
