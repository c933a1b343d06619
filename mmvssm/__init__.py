"""Vision state-space backbones for OpenMMLab. Importing this package registers them."""
__version__ = '0.1.0'

from .engine import fsdp, optimizers  # noqa: E402, F401
from .models import backbones  # noqa: E402, F401
