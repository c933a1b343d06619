"""Makes MMEngine's FLOP counter see the operators. FLOPs are multiply-adds, each counted once."""
from mmengine.analysis.complexity_analysis import _DEFAULT_SUPPORTED_FLOP_OPS
from mmengine.analysis.jit_handles import get_shape


def register(op, formula):
    """Count operator ``mmvssm::op`` by ``formula``, a function of its arguments' shapes (None for an absent
    tensor or an argument that is none)."""

    def handle(inputs, outputs):
        return formula(*(get_shape(value) for value in inputs))

    _DEFAULT_SUPPORTED_FLOP_OPS[f'mmvssm::{op}'] = handle
