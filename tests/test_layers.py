import pytest
import torch
from helpers import liven, relative_error
from timm.layers import create_attn
from torch.nn import functional as F

from timm_cbam import Cbam, ChannelAttention, SpatialAttention

POOL = {
    'avg': lambda x, dim: [x.mean(dim, keepdim=True)],
    'max': lambda x, dim: [x.amax(dim, keepdim=True)],
    'avgmax': lambda x, dim: [x.mean(dim, keepdim=True), x.amax(dim, keepdim=True)],
}


def channel_gate(m, x):
    """Equation 2 of the paper, with matrices instead of convolutions."""
    w0, w1 = m.fc1.weight.flatten(1), m.fc2.weight.flatten(1)
    b0, b1 = (0 if fc.bias is None else fc.bias for fc in (m.fc1, m.fc2))
    logits = sum(torch.relu(p.flatten(1) @ w0.T + b0) @ w1.T + b1 for p in POOL[m.pooling](x, (2, 3)))
    return torch.sigmoid(logits)[:, :, None, None]


def spatial_gate(m, x):
    """Equation 3 of the paper, with an unfolded convolution."""
    pooled = torch.cat(POOL[m.pooling](x, 1), 1)
    k = m.conv.kernel_size[0]
    out = m.conv.weight.flatten(1) @ F.unfold(pooled, k, padding=k // 2)
    return torch.sigmoid(m.bn(out.reshape(len(x), 1, *x.shape[2:])))


ARRANGEMENTS = {
    'channel_spatial': lambda m, x: (y := x * channel_gate(m.channel, x)) * spatial_gate(m.spatial, y),
    'spatial_channel': lambda m, x: (y := x * spatial_gate(m.spatial, x)) * channel_gate(m.channel, y),
    'parallel': lambda m, x: x * channel_gate(m.channel, x) * spatial_gate(m.spatial, x),
    'channel': lambda m, x: x * channel_gate(m.channel, x),
    'spatial': lambda m, x: x * spatial_gate(m.spatial, x),
}


@pytest.mark.parametrize('arrangement', ARRANGEMENTS)
@pytest.mark.parametrize('channel_pooling,spatial_pooling', [('avgmax', 'avgmax'), ('avg', 'max'), ('max', 'avg')])
@pytest.mark.parametrize('options', [{}, dict(mlp_bias=True, spatial_norm=True, kernel_size=3, rd_ratio=0.25)])
@pytest.mark.parametrize('shape', [(2, 32, 9, 7), (1, 16, 1, 1), (0, 16, 4, 4), (3, 17, 1, 13)])
def test_equations(arrangement, channel_pooling, spatial_pooling, options, shape):
    torch.manual_seed(0)
    m = liven(Cbam(
        shape[1], channel_pooling=channel_pooling, spatial_pooling=spatial_pooling, arrangement=arrangement,
        dtype=torch.float64, **options))
    for fc in ([m.channel.fc1, m.channel.fc2] if arrangement != 'spatial' and options else []):
        torch.nn.init.normal_(fc.bias)
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(m(x), ARRANGEMENTS[arrangement](m, x), rtol=1e-12, atol=1e-12)


def test_equals_timm():
    """timm's CbamModule is this module with batch-norm in the spatial attention."""
    torch.manual_seed(0)
    theirs = liven(create_attn('cbam', 64))
    ours = Cbam(64, spatial_norm=True).eval()
    ours.load_state_dict({k.replace('spatial.conv.', 'spatial.'): v for k, v in theirs.state_dict().items()})
    x = torch.randn(2, 64, 14, 14)
    assert relative_error(ours(x), theirs(x)) < 1e-6


def test_gradients():
    torch.manual_seed(0)
    m = Cbam(16, spatial_norm=True, mlp_bias=True, dtype=torch.float64)
    torch.nn.init.ones_(m.spatial.bn.weight)
    x = torch.randn(2, 16, 5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *params: m(x), (x, *m.parameters()))


def test_input_is_left_alone():
    x = torch.randn(2, 16, 5, 3)
    before = x.clone()
    with torch.inference_mode():
        Cbam(16)(x)
    assert torch.equal(x, before)


def test_attention_maps_are_what_is_applied():
    x = torch.randn(2, 32, 6, 5)
    for m, shape in ((ChannelAttention(32), (2, 32, 1, 1)), (SpatialAttention(), (2, 1, 6, 5))):
        gate = m.attention_map(x)
        assert gate.shape == shape
        assert torch.equal(m(x), x * gate)


def test_arguments():
    assert ChannelAttention(64).fc1.out_channels == 4
    assert ChannelAttention(64, rd_ratio=0.5).fc1.out_channels == 32
    assert ChannelAttention(64, rd_channels=5).fc1.out_channels == 5
    assert ChannelAttention(64, rd_divisor=8).fc1.out_channels == 8
    assert ChannelAttention(64).fc1.bias is None
    assert isinstance(ChannelAttention(64, act_layer='silu').act, torch.nn.SiLU)
    gate = SpatialAttention(gate_layer='hard_sigmoid').attention_map(torch.full((1, 4, 3, 3), 1e4))
    assert set(gate.flatten().tolist()) <= {0., 1.}
    assert {p.dtype for p in Cbam(16, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}
    assert {p.device.type for p in Cbam(16, device='meta').parameters()} == {'meta'}


def test_init_is_the_authors():
    torch.manual_seed(0)
    m = Cbam(1024, mlp_bias=True, spatial_norm=True)
    bound = 1024 ** -0.5  # nn.Linear's uniform distribution
    assert 0.99 * bound < m.channel.fc1.weight.abs().max() <= bound
    assert m.channel.fc1.bias.abs().max() == m.channel.fc2.bias.abs().max() == 0
    assert m.spatial.bn.weight.item() == 0 and m.spatial.bn.momentum == 0.01
    assert 0.1 < m.spatial.conv.weight.std() < 0.3  # Kaiming normal, fan out: sqrt(2 / 49) = 0.2


@pytest.mark.parametrize('create,message', [
    (lambda: Cbam(64, channel_pooling='median'), "Unknown pooling 'median', choose one of 'avg', 'max', 'avgmax'"),
    (lambda: Cbam(64, spatial_pooling=''), "Unknown pooling ''"),
    (lambda: Cbam(64, arrangement='serial'), "Unknown arrangement 'serial', choose one of 'channel_spatial'"),
    (lambda: Cbam(64, kernel_size=4), 'kernel_size=4 must be odd'),
    (lambda: Cbam(64, kernel_size=-1), 'kernel_size=-1 must be odd and positive'),
    (lambda: Cbam(8), r'channels=8 are too few for rd_ratio=0.0625.* Pass a larger rd_ratio, or rd_channels'),
])
def test_bad_arguments(create, message):
    with pytest.raises(ValueError, match=message):
        create()


@pytest.mark.parametrize('module', [Cbam(16), ChannelAttention(16), SpatialAttention()])
def test_bad_input(module):
    with pytest.raises(AssertionError, match=r'Expected a 4-d input \(B, C, H, W\), got 3-d; .*unsqueeze'):
        module(torch.randn(16, 8, 8))
