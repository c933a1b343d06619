"""Builds mmvssm; metadata lives in pyproject.toml.

``MMVSSM_BUILD_EXT`` decides about the compiled kernels: unset builds them where PyTorch and a C++ compiler
are found and says so where they are not; ``0`` never builds (pure Python, slower); ``1`` builds or fails.
The CUDA kernels are a library of their own. They are built where nvcc and a CUDA build of PyTorch are found, with or
without a GPU, and installation goes on without them if that fails; ``FORCE_CUDA=1`` builds them or fails, ``0`` never
does.
Install with ``--no-build-isolation`` so that the build sees the PyTorch it will run with; the environment then
needs setuptools, wheel and preferably ninja.
"""
import os
import shutil
import sys
from glob import glob

from setuptools import setup

HERE = os.path.dirname(os.path.abspath(__file__))
BUILD_EXT = os.environ.get('MMVSSM_BUILD_EXT', 'auto')
FORCE_CUDA = os.environ.get('FORCE_CUDA', 'auto')
#: Unless TORCH_CUDA_ARCH_LIST says otherwise; newer GPUs compile the last one's PTX when they first need it.
ARCHITECTURES = '8.0;8.6;8.9;9.0+PTX'


def why_not_build():
    """The reason for a pure-Python install, or None."""
    if BUILD_EXT not in ('auto', '0', '1'):
        sys.exit(f'MMVSSM_BUILD_EXT={BUILD_EXT!r}: expected 0 or 1, or leave it unset')
    if BUILD_EXT == '0':
        return 'MMVSSM_BUILD_EXT=0'
    try:
        import torch  # noqa: F401
    except ImportError:
        return 'PyTorch is not importable here: install it first, then pip install --no-build-isolation'
    if not shutil.which(os.environ.get('CXX', 'c++').split()[0]):
        return 'no C++ compiler found (c++ is not on the PATH and CXX is not set)'
    return None


def why_not_cuda():
    """The reason for doing without the CUDA kernels, or None."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME
    if FORCE_CUDA not in ('auto', '0', '1'):
        sys.exit(f'FORCE_CUDA={FORCE_CUDA!r}: expected 0 or 1, or leave it unset')
    if not torch.version.cuda:
        return 'this PyTorch was built without CUDA'
    if FORCE_CUDA == '0':
        return 'FORCE_CUDA=0'
    if not CUDA_HOME:
        return 'nvcc is not found; install the CUDA toolkit or set CUDA_HOME'
    if not os.path.exists(os.path.join(CUDA_HOME, 'include', 'cuda_runtime_api.h')):
        return f'{CUDA_HOME} has no include/cuda_runtime_api.h; set CUDA_HOME to the CUDA toolkit'
    return None


def cuda_extension():
    """``mmvssm/kernels/_C_cuda``."""
    from torch.utils.cpp_extension import CUDAExtension
    os.environ.setdefault('TORCH_CUDA_ARCH_LIST', ARCHITECTURES)
    folder = 'kernels/selective_scan_fn/csrc/cuda'
    sources = [f'{folder}/{name}' for name in ('op.cpp', 'forward.cu', 'backward.cu')]
    return CUDAExtension('mmvssm.kernels._C_cuda', sources, depends=glob(f'{folder}/*.h'),
                         extra_compile_args=dict(cxx=['-O3'], nvcc=['-O3']))


def extensions():
    """Keyword arguments of ``setup`` that build ``mmvssm/kernels/_C`` and ``_C_cuda``."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class Build(BuildExtension):

        def run(self):
            compiler = self.compiler  # a name, or None, which running replaces
            try:
                super().run()
            except Exception as error:
                without = self.extensions[-1].name.endswith('_cuda')
                kind, switch, required = (('CUDA', 'FORCE_CUDA', FORCE_CUDA == '1') if without else
                                          ('compiled', 'MMVSSM_BUILD_EXT', BUILD_EXT == '1'))
                if required:
                    raise
                print(f'mmvssm: the {kind} kernels were not built ({error}); installing without them. '
                      f'{switch}=1 makes this an error.', file=sys.stderr)
                self.extensions.pop()
                if self.extensions:
                    self.compiler = compiler
                    self.run()

    rooms = ('depthwise_conv', 'norm_gate', 'quadtree', 'selective_scan', 'selective_scan_fn', 'state_fusion')
    core = ('dispatch', 'isa_baseline', 'isa_avx2', 'isa_avx512')
    sources = [f'kernels/_core/csrc/{name}.cpp' for name in core]
    sources += [f'kernels/{room}/csrc/cpu/op.cpp' for room in rooms]
    # Apple's compiler has no OpenMP: there the kernels run in one thread.
    openmp = [] if sys.platform == 'darwin' else ['-fopenmp']
    flags = ['-O3', '-fno-math-errno', '-fno-trapping-math', '-Wno-psabi', '-Wno-unknown-pragmas']
    ext = CppExtension('mmvssm.kernels._C', sources, depends=glob('kernels/**/*.h', recursive=True),
                       extra_compile_args=flags + openmp, extra_link_args=openmp)
    without_cuda = why_not_cuda()
    if without_cuda and FORCE_CUDA == '1':
        sys.exit(f'FORCE_CUDA=1, but {without_cuda}')
    if without_cuda:
        print(f'mmvssm: installing without CUDA kernels: {without_cuda}', file=sys.stderr)
    return dict(ext_modules=[ext] if without_cuda else [ext, cuda_extension()],
                cmdclass=dict(build_ext=Build.with_options(no_python_abi_suffix=True)))


os.chdir(HERE)
reason = why_not_build()
if reason:
    if BUILD_EXT == '1':
        sys.exit(f'MMVSSM_BUILD_EXT=1, but {reason}')
    print(f'mmvssm: installing without compiled kernels: {reason}', file=sys.stderr)
    for library in ('kernels/_C.so', 'kernels/_C_cuda.so'):
        if BUILD_EXT == '0' and os.path.exists(library):
            os.remove(library)  # of an earlier editable installation

setup(**({} if reason else extensions()))
