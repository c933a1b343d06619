"""FSDP by MMEngine: what it wraps, and resuming with the PyTorch of today."""
from mmengine._strategy import FSDPStrategy
from mmengine.registry import FUNCTIONS, STRATEGIES
from torch.distributed.fsdp import FullyShardedDataParallel

from mmvssm.models.backbones import quad_mamba, spatial_mamba

from .config import UsageError


@FUNCTIONS.register_module()
def wrap_blocks(module, recurse, nonwrapped_numel):
    """Policy of FSDP that wraps each block of our backbones, whose parameters are thus gathered one block at a time.
    What is outside of blocks stays together.

    Args:
        module (nn.Module): what may be wrapped.
        recurse (bool): whether the question is if to look at its children.
        nonwrapped_numel (int): PyTorch's count of parameters; not used.

    Returns:
        bool: the answer.
    """
    return recurse or isinstance(module, (spatial_mamba.Block, quad_mamba.Block))


@STRATEGIES.register_module()
class ResumableFSDPStrategy(FSDPStrategy):
    """MMEngine's ``FSDPStrategy``, which calls PyTorch in a way that ended with PyTorch 2.0 when it resumes.

    Raises:
        UsageError: the run has no launcher.
    """

    def _wrap_model(self, model):
        if self.launcher == 'none':
            raise UsageError('strategy: FSDP needs --launcher pytorch or slurm, got none; without FSDP its checkpoints '
                             'evaluate in one process')
        return super()._wrap_model(model)

    def optim_state_dict(self):
        state = super().optim_state_dict()
        # FSDP leaves out what is not the optimizer's: the base learning rate that is logged.
        state['base_param_settings'] = self.optim_wrapper.base_param_settings
        return state

    def load_optim_state_dict(self, state_dict):
        base = state_dict.pop('base_param_settings', None)
        state = FullyShardedDataParallel.optim_state_dict_to_load(
            self.model, self.optim_wrapper.optimizer, state_dict)
        self.optim_wrapper.load_state_dict(dict(state, base_param_settings=base))
