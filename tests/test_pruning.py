"""Torch-Pruning with the argument that the README names prunes a CBAM-ResNet as it prunes a ResNet with SE"""
import pytest
import timm
import torch
import torch_pruning as tp
from helpers import liven, plain_path, relative_error

from timm_cbam import SpatialAttention, add_cbam


def count(model):
    return sum(p.numel() for p in model.parameters())


def prune(model, x):
    """Half of the channels of everything but the classifier; the share of parameters that is left."""
    before = count(model)
    pruner = tp.pruner.MagnitudePruner(
        model, x, importance=tp.importance.MagnitudeImportance(p=2), pruning_ratio=0.5,
        ignored_layers=[model.get_classifier()], customized_pruners={SpatialAttention: tp.ops.CustomizedPruner()})
    pruner.step()
    return count(model) / before


def create(name, **kwargs):
    torch.manual_seed(0)
    return liven(timm.create_model(name, num_classes=10, **kwargs))


NETWORKS = {
    'basic': lambda: create('cbam_resnet18'),
    'bottleneck': lambda: create('cbam_resnet50', layers=(1, 1, 1, 1)),
    'eccv18': lambda: create('cbam_resnet18_eccv18'),
    'spatial_channel': lambda: create('cbam_resnet18', cbam_args=dict(arrangement='spatial_channel')),
    'average': lambda: create('cbam_resnet18', cbam_args=dict(channel_pooling='avg', spatial_pooling='avg')),
    'added': lambda: (model := create('resnet18'), add_cbam(model))[0],
}


@pytest.mark.parametrize('network', [
    name if name in ('basic', 'added') else pytest.param(name, marks=pytest.mark.slow) for name in NETWORKS])
def test_halved(network):
    model, x = NETWORKS[network](), torch.randn(1, 3, 64, 64)
    assert 0.24 < prune(model, x) < 0.28
    for m in model.modules():
        if isinstance(m, SpatialAttention):
            assert m.conv.weight.shape[0] == 1  # a gate for each pixel, as before
    widths = [stage[-1].conv2.out_channels for stage in (model.layer1, model.layer2, model.layer3, model.layer4)]
    assert widths == [32, 64, 128, 256]
    with torch.no_grad():
        logits = model(x)  # fused
        with plain_path():
            assert relative_error(logits, model(x)) < 1e-5
    model.train()(x.repeat(2, 1, 1, 1)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
