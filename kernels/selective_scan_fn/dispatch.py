"""The backends of the scan with Mamba's interface, fastest first."""
from .._core.backends import Backend
from . import composed

BACKENDS = (
    Backend('torch', lambda tensor: None, composed.forward, composed.backward),
)
