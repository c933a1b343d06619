"""Vision state-space backbones for OpenMMLab. Importing this package registers them."""
from .models import backbones  # noqa: F401
