import pytest
import torch
from mmengine.analysis import FlopAnalyzer
from torch import nn

from mmvssm.models.backbones import QuadMamba, SpatialMamba


class Classifier(nn.Module):

    def __init__(self, family, arch):
        super().__init__()
        self.backbone = family(arch, out_indices=(3,))
        self.head = nn.Linear(self.backbone.out_channels[0], 1000)

    def forward(self, image):
        return self.head(self.backbone(image)[0].mean((2, 3)))


@pytest.mark.parametrize('family, arch, published, by_us', [
    (SpatialMamba, 'tiny', 4.5, 4.43), (SpatialMamba, 'small', 7.1, 7.07), (SpatialMamba, 'base', 15.8, 15.72),
    (QuadMamba, 'lite', 1.1, 1.11), (QuadMamba, 'tiny', 2.0, 1.94), (QuadMamba, 'small', 5.5, 5.48),
    (QuadMamba, 'base', 9.3, 9.32)], ids=lambda v: getattr(v, '__name__', None))
def test_classifier_at_224(family, arch, published, by_us):
    """In G; `by_us` counts convolutions, linear layers and scans, the publications also norms."""
    analyzer = FlopAnalyzer(Classifier(family, arch).eval(), torch.zeros(1, 3, 224, 224))
    analyzer.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    with torch.no_grad():
        by_operator = analyzer.by_operator()
    assert analyzer.total() / 1e9 == pytest.approx(published, rel=0.03)
    rest = sum(by_operator[name] for name in ('layer_norm', 'batch_norm', 'norm_gate', 'residual_norm', 'quadtree'))
    assert (analyzer.total() - rest) / 1e9 == pytest.approx(by_us, rel=0.01)
    assert [name for name in analyzer.unsupported_ops() if name.startswith('mmvssm')] == []
