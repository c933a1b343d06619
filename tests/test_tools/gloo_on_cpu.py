"""A process group on CPUs, for a config's ``custom_imports``. MMEngine would choose a GPU first, and takes a group that
is there."""
import torch.distributed as dist

if not dist.is_initialized():
    dist.init_process_group('gloo')
