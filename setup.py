"""Builds mmvssm; metadata lives in pyproject.toml.

``MMVSSM_BUILD_EXT`` decides about the compiled kernels: unset builds them where PyTorch and a C++ compiler
are found and says so where they are not; ``0`` never builds (pure Python, slower); ``1`` builds or fails.
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


def extension():
    """Keyword arguments of ``setup`` that build ``mmvssm/kernels/_C``."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class Build(BuildExtension):

        def run(self):
            try:
                super().run()
            except Exception as error:
                if BUILD_EXT == '1':
                    raise
                print(f'mmvssm: the compiled kernels were not built ({error}); installing without them. '
                      'MMVSSM_BUILD_EXT=1 makes this an error.', file=sys.stderr)
                self.extensions.clear()

    rooms = ('depthwise_conv', 'norm_gate', 'quadtree', 'selective_scan', 'state_fusion')
    core = ('dispatch', 'isa_baseline', 'isa_avx2', 'isa_avx512')
    sources = [f'kernels/_core/csrc/{name}.cpp' for name in core]
    sources += [f'kernels/{room}/csrc/cpu/op.cpp' for room in rooms]
    # Apple's compiler has no OpenMP: there the kernels run in one thread.
    openmp = [] if sys.platform == 'darwin' else ['-fopenmp']
    flags = ['-O3', '-fno-math-errno', '-fno-trapping-math', '-Wno-psabi', '-Wno-unknown-pragmas']
    ext = CppExtension('mmvssm.kernels._C', sources, depends=glob('kernels/**/*.h', recursive=True),
                       extra_compile_args=flags + openmp, extra_link_args=openmp)
    return dict(ext_modules=[ext],
                cmdclass=dict(build_ext=Build.with_options(no_python_abi_suffix=True)))


os.chdir(HERE)
reason = why_not_build()
if reason:
    if BUILD_EXT == '1':
        sys.exit(f'MMVSSM_BUILD_EXT=1, but {reason}')
    print(f'mmvssm: installing without compiled kernels: {reason}', file=sys.stderr)
    if BUILD_EXT == '0' and os.path.exists('kernels/_C.so'):
        os.remove('kernels/_C.so')  # of an earlier editable installation

setup(**({} if reason else extension()))
