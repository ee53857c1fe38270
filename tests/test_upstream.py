"""What timm_cbam relies on in timm and torch beyond what they document, in one place

If a release changes it, these tests fail and say what it was for.
"""
import inspect
from functools import partial

import pytest
import timm
import torch
from helpers import liven
from timm.layers import BlurPool2d, DropPath
from timm.models.resnet import BasicBlock, Bottleneck, ResNet, drop_blocks

from timm_cbam import Cbam
from timm_cbam.cbam_resnet import CbamBasicBlock, CbamBottleneck

USED = (
    (torch.nn.ReLU(), ('_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks'),
     'a module with hooks runs as it is (cbam_resnet.py)'),
    (torch._C, ('_are_functorch_transforms_active',), 'torch.func gets plain operations (fusion.py)'),
    (torch.ops.aten.native_batch_norm, ('out',), 'batch-norm in place (ops/tail_cpu.py)'),
    (torch.ops.aten, ('threshold_backward',), 'gradient of the ReLU (ops/tail_cpu.py)'),
    (torch, ('_assert',), 'a check that scripting, tracing and compilers accept (layers.py)'),
    (timm.create_model('resnet18'), ('conv1', 'maxpool', 'fc', 'feature_info'), 'the stem of _s1 (cbam_resnet.py)'),
)


@pytest.mark.parametrize('owner,names,purpose', USED, ids=[purpose for *_, purpose in USED])
def test_names_that_are_used(owner, names, purpose):
    missing = [name for name in names if not hasattr(owner, name)]
    assert not missing, f'{missing} of {owner} gone, needed so that {purpose}'


def test_arguments_that_are_passed_to_resnet():
    needed = {'block', 'layers', 'in_chans', 'output_stride', 'stem_type', 'block_args', 'device', 'dtype'}
    missing = needed - set(inspect.signature(ResNet.__init__).parameters)
    assert not missing, f'timm.models.ResNet no longer takes {missing}, which cbam_resnet.py passes'


@pytest.mark.parametrize('theirs,ours', [(BasicBlock, CbamBasicBlock), (Bottleneck, CbamBottleneck)])
@pytest.mark.parametrize('training', [False, True])
def test_block_runs_as_timms_does(theirs, ours, training, monkeypatch):
    """Our blocks repeat the order of timm's in their forward."""
    monkeypatch.setattr('timm_cbam.fusion.FUSED', False)
    outputs = []
    for block_class in (theirs, ours):
        torch.manual_seed(0)
        downsample = torch.nn.Conv2d(64, 64, 1, stride=2)
        block = block_class(
            64, 64 // theirs.expansion, stride=2, downsample=downsample, attn_layer=partial(Cbam, rd_ratio=1 / 4),
            aa_layer=BlurPool2d, drop_block=drop_blocks(0.3)[3], drop_path=DropPath(0.3))
        liven(block)
        outputs.append(block.train(training)(torch.randn(8, 64, 16, 16)))
    assert torch.equal(*outputs), f'forward of timm.models.resnet.{theirs.__name__} has changed, see {ours.__name__}'
