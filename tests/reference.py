"""ResNets with attention as other code has them, written from its description: names, order of poolings, biases

The trunks are small. What is refused is here too, with the names that it has, so that the refusal can be tested.
"""
import torch
from torch import nn
from torch.nn import functional as F


class Gate(nn.Module):
    """MLP over both poolings, with weights as layers of the given names have them."""

    def __init__(self, layers):
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)

    def hidden(self, x):
        for layer in self.children():
            x = layer(x)
        return x

    def forward(self, x):
        linear = any(isinstance(m, nn.Linear) for m in self.modules())
        avg, top = (p.flatten(1) if linear else p for p in (F.adaptive_avg_pool2d(x, 1), F.adaptive_max_pool2d(x, 1)))
        gate = torch.sigmoid(self.hidden(avg) + self.hidden(top))
        return x * (gate[:, :, None, None] if linear else gate)


class SpatialGate(nn.Module):
    def __init__(self, name, max_first=False, norm=False, **kwargs):
        super().__init__()
        self.max_first = max_first
        layer = nn.Conv2d(2, 1, **{'kernel_size': 7, 'padding': 3, 'bias': False, **kwargs})
        if norm:
            layer = nn.ModuleDict(dict(conv=layer, bn=nn.BatchNorm2d(1, momentum=0.01)))
        self.add_module(name, layer)

    def forward(self, x):
        avg, top = x.mean(1, keepdim=True), x.max(1, keepdim=True)[0]
        gate = torch.cat([top, avg] if self.max_first else [avg, top], 1)
        for m in self.modules():
            gate = m(gate) if isinstance(m, (nn.Conv2d, nn.BatchNorm2d)) else gate
        return x * torch.sigmoid(gate)


def convs(c, r, names=('fc1', 'relu1', 'fc2'), bias=False):
    layers = nn.Conv2d(c, c // r, 1, bias=bias), nn.ReLU(), nn.Conv2d(c // r, c, 1, bias=bias)
    return dict(zip(names, layers, strict=True))


def linears(c, r, flatten=True):
    layers = nn.Linear(c, c // r), nn.ReLU(), nn.Linear(c // r, c)
    return nn.Sequential(*([nn.Flatten()] if flatten else []), *layers)


def sequence(c, r):
    return nn.Sequential(*convs(c, r).values())


# Modules that a block with C channels calls one after the other; a dict is a module with several
ATTENTION = {
    'community': lambda c: dict(ca=Gate(dict(fc=sequence(c, 16))), sa=SpatialGate('conv1')),
    'community, sa.conv': lambda c: dict(ca=Gate(dict(fc=sequence(c, 16))), sa=SpatialGate('conv')),
    'community in cbam': lambda c: dict(cbam=dict(ca=Gate(dict(fc=sequence(c, 16))), sa=SpatialGate('conv1'))),
    'community_fc1': lambda c: dict(ca=Gate(convs(c, 16)), sa=SpatialGate('conv1')),
    'community_fc1 in cbam': lambda c: dict(cbam=dict(ca=Gate(convs(c, 16)), sa=SpatialGate('conv1'))),
    'community_fc1 in attention, biases': lambda c: dict(attention=dict(
        ca=Gate(convs(c, 8, bias=True)), sa=SpatialGate('conv1', kernel_size=3, padding=1))),
    'channelattention': lambda c: dict(
        cbam=dict(channelattention=Gate(convs(c, 8)), spatialattention=SpatialGate('conv1'))),
    'channel_attention, fc.0': lambda c: dict(
        att=dict(channel_attention=Gate(dict(fc=sequence(c, 16))), spatial_attention=SpatialGate('conv'))),
    **{f'official in {at}': lambda c, at=at: {at: dict(
        ChannelGate=Gate(dict(mlp=linears(c, 16))), SpatialGate=SpatialGate('spatial', max_first=True, norm=True))}
       for at in ('cbam', 'cbam_module', 'attention', 'att')},
    'elbuco1': lambda c: dict(cbam=dict(
        channel_attention=Gate(dict(bottleneck=linears(c, 2, flatten=False))),
        spatial_attention=SpatialGate('conv', max_first=True, bias=True, kernel_size=3, padding=1))),
    'none': lambda c: {},
}


class Block(nn.Module):
    def __init__(self, inplanes, planes, stride, attention, shortcut, bottleneck):
        super().__init__()
        outplanes = planes * (4 if bottleneck else 1)
        sizes = ((inplanes, planes, 1, 1), (planes, planes, 3, stride), (planes, outplanes, 1, 1)) if bottleneck else (
            (inplanes, planes, 3, stride), (planes, planes, 3, 1))
        self.n = len(sizes)
        for i, (a, b, size, s) in enumerate(sizes, 1):
            self.add_module(f'conv{i}', nn.Conv2d(a, b, size, stride=s, padding=size // 2, bias=False))
            self.add_module(f'bn{i}', nn.BatchNorm2d(b))
        self.shortcut_name = shortcut
        if stride != 1 or inplanes != outplanes:
            self.add_module(shortcut, nn.Sequential(
                nn.Conv2d(inplanes, outplanes, 1, stride, bias=False), nn.BatchNorm2d(outplanes)))
        self.gates = []
        for name, m in attention(outplanes).items():
            self.gates += [f'{name}.{inner}' for inner in m] if isinstance(m, dict) else [name]
            self.add_module(name, nn.ModuleDict(m) if isinstance(m, dict) else m)

    def forward(self, x):
        out = x
        for i in range(1, self.n + 1):
            out = getattr(self, f'bn{i}')(getattr(self, f'conv{i}')(out))
            out = out.relu() if i < self.n else out
        for name in self.gates:
            out = self.get_submodule(name)(out)
        return (out + (getattr(self, self.shortcut_name)(x) if hasattr(self, self.shortcut_name) else x)).relu()


class Network(nn.Module):
    def __init__(
            self, attention, layers=(1, 1, 1, 1), channels=(16, 32, 64, 128), small=False, shortcut='downsample',
            head='fc', bottleneck=False, num_classes=10):
        super().__init__()
        self.small, self.head = small, head
        stem = dict(kernel_size=3, stride=1, padding=1) if small else dict(kernel_size=7, stride=2, padding=3)
        self.conv1, self.bn1 = nn.Conv2d(3, 64, bias=False, **stem), nn.BatchNorm2d(64)
        inplanes = 64
        for i, (count, planes) in enumerate(zip(layers, channels, strict=True), 1):
            blocks = []
            for j in range(count):
                stride = 2 if i > 1 and j == 0 else 1
                blocks.append(Block(inplanes, planes, stride, ATTENTION[attention], shortcut, bottleneck))
                inplanes = planes * (4 if bottleneck else 1)
            self.add_module(f'layer{i}', nn.Sequential(*blocks))
        self.add_module(head, nn.Linear(inplanes, num_classes))
        generator = torch.Generator().manual_seed(0)
        for name, tensor in self.state_dict().items():
            if tensor.ndim > 1:
                tensor.normal_(std=tensor[0].numel() ** -0.5 * 1.4, generator=generator)
            elif tensor.is_floating_point():
                low = 0.5 if name.endswith(('running_var', '.weight')) else -0.3
                tensor.uniform_(low, low + (1 if low > 0 else 0.6), generator=generator)
        self.eval()

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        x = x if self.small else F.max_pool2d(x, 3, 2, 1)
        for i in range(1, 5):
            x = getattr(self, f'layer{i}')(x)
        return getattr(self, self.head)(x.mean((2, 3)))
