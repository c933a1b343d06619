"""A process group on CPUs, for a config's ``custom_imports``. MMEngine would choose a GPU first, and takes a group that
is there."""
from datetime import timedelta

import torch.distributed as dist
from yapf.yapflib import yapf_api

dist.init_process_group('gloo', timeout=timedelta(seconds=120))
# MMEngine formats the config for every log and checkpoint, which takes as long as the short trainings here.
yapf_api.FormatCode = lambda text, **options: (text, True)
