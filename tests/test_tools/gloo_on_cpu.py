"""A process group on CPUs for a config's ``custom_imports``, where a launcher started several processes. MMEngine would
choose a GPU first, and takes a group that is there."""
import os
from datetime import timedelta

import torch.distributed as dist
from yapf.yapflib import yapf_api

if 'WORLD_SIZE' in os.environ:
    dist.init_process_group('gloo', timeout=timedelta(seconds=120))
# MMEngine formats the config for every log and checkpoint, which takes as long as the short trainings here.
yapf_api.FormatCode = lambda text, **options: (text, True)
