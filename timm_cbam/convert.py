"""Checkpoints of other CBAM code to folders in the Hub's format, and back

What a checkpoint is follows from the names and shapes of its weights alone, see weights.py for the layouts.
"""
import functools
import re
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Tuple, Union

import torch
from timm import create_model
from timm.models import list_models
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from .files import read_checkpoint
from .hub import model_card, read_config, save_model, staged_file, staged_folder
from .weights import LAYOUTS, Found, find_weights, fit_weights, from_native_layout, name_weights

__all__ = ['convert']

_BASES = ('resnet18', 'resnet34', 'resnet50', 'resnet101', 'resnet152')  # whose CBAM-ResNets the other code has
_STEMS = ('conv1.weight', 'conv1.0.weight')  # where the input channels show
_DIMENSIONS = {r'(^conv1(\.0)?|\.se\.channel\.fc1|\.se\.spatial\.conv)\.weight$': 4, r'^fc\.weight$': 2}
_COMMUNITY = ('community', 'community_fc1', 'channelattention')
_TOLERANCE = 1e-9  # of logits in float64, relative to the largest


def _find(checkpoint: Mapping[Any, Any], src: Path, prefix: Optional[str], max_first: Optional[bool]) -> Found:
    try:
        found = find_weights(checkpoint, prefix=prefix, max_first=max_first)
    except RuntimeError as e:
        raise RuntimeError(f'{src}: {e}') from None
    if not found.values:
        raise ValueError(
            f'{src} holds no weights by name, it has {", ".join(map(repr, list(checkpoint)[:4]))}. Save them with '
            f'torch.save(model.state_dict(), ...).')
    return found


def _infer_cbam_args(state_dict: Mapping[str, torch.Tensor]) -> Dict[str, Any]:
    """Arguments of Cbam that show in the weights' names and shapes, nothing if there are no gates."""
    mlps = [v.shape for k, v in state_dict.items() if k.endswith('.se.channel.fc1.weight')]
    kernels = [v.shape for k, v in state_dict.items() if k.endswith('.se.spatial.conv.weight')]
    args: Dict[str, Any] = {}
    if not mlps and not kernels:
        return args
    args['arrangement'] = 'channel_spatial' if mlps and kernels else 'channel' if mlps else 'spatial'
    if mlps:
        args['mlp_bias'] = any(k.endswith('.se.channel.fc1.bias') for k in state_dict)
        if len({shape[0] for shape in mlps}) == 1 and len({shape[1] for shape in mlps}) > 1:
            args['rd_channels'] = mlps[0][0]
        else:
            args['rd_ratio'] = mlps[0][0] / mlps[0][1]
    if kernels:
        if kernels[0][1] == 1:
            raise ValueError(
                "The spatial attention has one input, the average or the maximum, which does not show. Load it with "
                "timm.create_model(..., cbam_args=dict(spatial_pooling='avg' or 'max'), checkpoint_path=...).")
        args['spatial_norm'] = any(k.endswith('.se.spatial.bn.weight') for k in state_dict)
        args['kernel_size'] = kernels[0][2]
    return args


def _skeleton(state_dict: Mapping[str, torch.Tensor]) -> Dict[str, Tuple[int, ...]]:
    """Shapes of what does not depend on the attention, the input channels and the number of classes."""
    return {
        k: v.shape[2:] if k in _STEMS else v.shape for k, v in state_dict.items()
        if '.se.' not in k and not k.startswith('fc.') and not k.endswith('num_batches_tracked')}


@functools.cache
def _expect(name: str) -> Tuple[Dict[str, Tuple[int, ...]], Dict[str, Any]]:
    state_dict = create_model(name, device='meta').state_dict()
    return _skeleton(state_dict), _infer_cbam_args(state_dict)


def _infer_model(state_dict: Mapping[str, torch.Tensor], name: Optional[str]) -> Tuple[str, Dict[str, Any]]:
    """Find the model that a state dict in this package's layout comes closest to, and its arguments."""
    skeleton, cbam_args = _skeleton(state_dict), _infer_cbam_args(state_dict)
    best = None
    for candidate in [name] if name else list_models('cbam_*'):
        expected, default_args = _expect(candidate)
        different = sum(expected.get(k) != skeleton.get(k) for k in {**expected, **skeleton})
        own_args = {k: v for k, v in cbam_args.items() if default_args.get(k) != v}
        if best is None or (different, len(own_args)) < best[:2]:
            best = different, len(own_args), candidate, own_args
    _, _, name, cbam_args = best
    kwargs: Dict[str, Any] = dict(cbam_args=cbam_args) if cbam_args else {}
    for stem in _STEMS:
        if stem in state_dict and state_dict[stem].shape[1] != 3:
            kwargs['in_chans'] = state_dict[stem].shape[1]
    return name, kwargs


def _check_dimensions(state_dict: Mapping[str, torch.Tensor], source: str) -> None:
    """Check the weights whose shapes say what the model is, before they are believed."""
    for key, value in state_dict.items():
        for pattern, dimensions in _DIMENSIONS.items():
            if re.search(pattern, key) and (value.ndim != dimensions or not value.numel()):
                raise ValueError(
                    f'{source} is damaged: {key} has shape {tuple(value.shape)}, expected {dimensions} dimensions.')


def _build(found: Found, model_name: Optional[str], source: str) -> Tuple[nn.Module, Dict]:
    """Create the model of a checkpoint with its weights; also returns the arguments that it was created with."""
    native = found.values
    _check_dimensions(native, source)
    model_name, model_args = _infer_model(native, model_name)
    classifier = native.get('fc.weight')
    # neither origin nor license nor paper of the model's default weights are those of the checkpoint
    cfg = dict.fromkeys(('url', 'hf_hub_id', 'license', 'origin_url', 'paper_ids', 'paper_name', 'notes'))
    cfg.update(tag='converted', description=f'Converted from {source}, {found.describe()}.')
    if found.layout is not None and found.layout.name in {LAYOUTS[key].name for key in _COMMUNITY}:
        # its models have a default cfg of timm's weights, not this
        cfg.update(crop_pct=0.875, interpolation='bilinear', test_input_size=None, test_crop_pct=None)
    try:
        with torch.random.fork_rng():  # a plain ResNet's gates are drawn: the same every time
            torch.manual_seed(0)
            model = create_model(
                model_name,
                num_classes=0 if classifier is None else classifier.shape[0],
                pretrained_cfg_overlay=cfg,
                **model_args,
            )
        weights, own = fit_weights(found, model), model.state_dict()
        different = [
            f'size mismatch for {found.weights.theirs(k)}: {tuple(v.shape)}, in the model {tuple(own[k].shape)}'
            for k, v in weights.items() if k in own and v.shape != own[k].shape]
        if different:
            sizes = '\n\t'.join(('The state dict has other sizes.', *different[:8]))
            raise RuntimeError(f'{sizes}\n{found.explain()}')
        model.load_state_dict(weights)
    except RuntimeError as e:
        raise RuntimeError(f'{source} comes closest to {model_name}, but does not fit it.\n{e}') from None
    return model.eval(), model_args


def _assumed(found: Found, max_first: Optional[bool]) -> List[str]:
    """What names and shapes cannot show, and was taken for granted."""
    assumed = []
    is_own = found.layout is None and not found.is_plain
    if 'layer1.0.conv3.weight' in found.values and not is_own:
        assumed.append('blocks stride in their 3x3 convolution, as those of timm and torchvision do')
    if found.layout is not None and not found.is_plain and max_first is None:
        order = 'the maximum before the average' if found.layout.max_first else 'the average before the maximum'
        assumed.append(f'the spatial attention has {order} (--spatial-order says otherwise)')
    return assumed


def _export(model: nn.Module, model_args: Dict[str, Any], to: str) -> Dict[str, Any]:
    """Make a checkpoint for other code, which is to be loaded there without a change."""
    layout, name = LAYOUTS[to], model.pretrained_cfg['architecture']
    architectures = {f'cbam_{base}{layout.family}': base for base in _BASES}
    if name not in architectures or 'cbam_args' in model_args:
        raise RuntimeError(
            f'{layout.name} has no network like this one, {name} with {model_args or "default arguments"}. It has '
            f'those of {", ".join(architectures)} only.')
    state_dict = from_native_layout(model.state_dict(), layout)
    if to == 'official':  # as its train_imagenet.py saves and, with --resume, reads it
        state_dict = {f'module.{k}': v for k, v in state_dict.items()}
        return dict(epoch=0, arch=architectures[name], best_prec1=0., state_dict=state_dict)
    return state_dict


def _reference_logits(found: Found, x: torch.Tensor, max_first: Optional[bool] = None) -> torch.Tensor:
    """Logits of a checkpoint in any layout, by the rules of the code that it was made for and without ours.

    Only the names are brought into order. The MLP is applied to either pooling, and the spatial attention concatenates
    as the checkpoint's code does.
    """
    if max_first is None:
        max_first = found.layout is not None and found.layout.max_first
    w = {k: v.to(x.dtype) for k, v in found.values.items()}

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.batch_norm(
            x, w[f'{name}.running_mean'], w[f'{name}.running_var'], w[f'{name}.weight'], w[f'{name}.bias'])

    def conv(x: torch.Tensor, name: str, stride: int = 1) -> torch.Tensor:
        weight, bias = w[f'{name}.weight'], w.get(f'{name}.bias')
        groups = x.shape[1] // weight.shape[1]
        return F.conv2d(x, weight, bias, stride=stride, padding=weight.shape[2] // 2, groups=groups)

    def mlp(x: torch.Tensor, name: str) -> torch.Tensor:
        for i in (1, 2):
            x = F.linear(x, w[f'{name}.fc{i}.weight'].flatten(1), w.get(f'{name}.fc{i}.bias'))
            x = x.relu() if i == 1 else x
        return x

    def attention(x: torch.Tensor, name: str) -> torch.Tensor:
        if f'{name}.channel.fc1.weight' in w:
            gate = mlp(x.mean((2, 3)), f'{name}.channel') + mlp(x.amax((2, 3)), f'{name}.channel')
            x = x * gate.sigmoid()[:, :, None, None]
        if f'{name}.spatial.conv.weight' in w:
            pooled = [x.mean(1, keepdim=True), x.amax(1, keepdim=True)]
            gate = conv(torch.cat(pooled[::-1] if max_first else pooled, 1), f'{name}.spatial.conv')
            gate = norm(gate, f'{name}.spatial.bn') if f'{name}.spatial.bn.weight' in w else gate
            x = x * gate.sigmoid()
        return x

    small_stem = 'conv1.weight' in w and w['conv1.weight'].shape[2] == 3
    if 'conv1.weight' in w:
        x = conv(x, 'conv1', 1 if small_stem else 2)
    else:  # three convolutions, ResNet-D's stem
        x = norm(conv(x, 'conv1.0', 2), 'conv1.1').relu()
        x = norm(conv(x, 'conv1.3'), 'conv1.4').relu()
        x = conv(x, 'conv1.6')
    x = norm(x, 'bn1').relu()
    x = x if small_stem else F.max_pool2d(x, 3, 2, 1)
    for stage in range(1, 5):
        block = 0
        while f'layer{stage}.{block}.conv1.weight' in w:
            name, shortcut = f'layer{stage}.{block}', x
            stride = 2 if stage > 1 and block == 0 else 1
            strides = (1, stride, 1) if f'{name}.conv3.weight' in w else (stride, 1)  # at the first 3x3
            for i, s in enumerate(strides, 1):
                x = norm(conv(x, f'{name}.conv{i}', s), f'{name}.bn{i}')
                x = x.relu() if i < len(strides) else x
            if f'{name}.downsample.0.weight' in w:
                shortcut = norm(conv(shortcut, f'{name}.downsample.0', stride), f'{name}.downsample.1')
            elif f'{name}.downsample.1.weight' in w:  # ResNet-D averages where others skip pixels
                shortcut = F.avg_pool2d(shortcut, stride, ceil_mode=True, count_include_pad=False)
                shortcut = norm(conv(shortcut, f'{name}.downsample.1'), f'{name}.downsample.2')
            x = (attention(x, f'{name}.se') + shortcut).relu()
            block += 1
    x = x.mean((2, 3))
    return F.linear(x, w['fc.weight'], w['fc.bias']) if 'fc.weight' in w else x


def _compare(expected: torch.Tensor, actual: torch.Tensor, source: Path, written: str) -> None:
    """Print the highest logits of both networks.

    Raises:
        RuntimeError: If they differ, or are no finite numbers.
    """
    difference = ((actual - expected).abs().max() / expected.abs().max()).item()
    print(f'{"class":>7} {source.name[-16:]:>16} {written[-16:]:>16}')
    for i in expected[0].topk(min(5, expected.shape[1])).indices.tolist():
        print(f'{i:>7} {expected[0, i]:>16.9f} {actual[0, i]:>16.9f}')
    print(f'largest difference of {expected.shape[1]} logits, relative to the largest of them: {difference:.1e}')
    if not difference <= _TOLERANCE:  # not a number, too
        raise RuntimeError(f'{written} does not compute what {source} does, so it is not written. Please report this.')


def convert(
        src: Union[str, Path],
        dst: Union[str, Path],
        model_name: Optional[str] = None,
        to: Optional[str] = None,
        verify: bool = False,
        prefix: Optional[str] = None,
        spatial_order: Optional[str] = None,
) -> None:
    """Convert a checkpoint of any CBAM-ResNet layout, or of a plain ResNet, to a folder in the Hub's format, or back.

    The folder has config.json, model.safetensors and a model card, and is loaded with
    ``timm.create_model('local-dir:DST', pretrained=True)``. Preprocessing is that of the model's default cfg. What does
    not show in weights (the pooling of the channel attention, the order of both attentions, blur pooling as in timm's
    resnetblur50) is taken to be the paper's.

    Args:
        src: Checkpoint, or a folder with one, of whatever name.
        dst: Folder to write; appears whole or not at all, a former model folder is replaced. With `to`, a new file.
        model_name: Model that the checkpoint is meant for. Recognised from names and shapes if None.
        to: Write a checkpoint for other code instead, one of the layouts in weights.py: 'article', 'community'
            (luuuyi/CBAM.PyTorch), 'official' (Jongchan/attention-module), 'pytorchcv', ...
        verify: Compute a noise image in float64 with the checkpoint, by the rules of its own code, and with what was
            written, and print both.
        prefix: Which weights to take from a checkpoint of several networks: keys of containers, and what the names of
            the network's weights begin with, joined by dots.
        spatial_order: 'avg-max' or 'max-avg', what the checkpoint's spatial attention concatenates. As the code does
            that has such names, if None.

    Raises:
        FileNotFoundError: If there is no src.
        FileExistsError: If something that is not replaced is at dst.
        ValueError: If src is damaged or something else than weights; says what it is and what to do.
        RuntimeError: If src fits no model, or not the code it shall be written for; says what it looks like, what is
            missing and what is left over. If it is not clear which weights are meant.
    """
    src, dst = Path(src), Path(dst)
    if spatial_order not in (None, 'avg-max', 'max-avg'):
        raise ValueError(f"spatial_order={spatial_order!r} must be 'avg-max' or 'max-avg'.")
    max_first = None if spatial_order is None else spatial_order == 'max-avg'
    with tqdm(total=4 if verify else 3, bar_format='{desc:<24} {bar} {n_fmt}/{total_fmt} {elapsed}') as progress:
        def step(name: str, done: int = 1) -> None:
            progress.set_description_str(name, refresh=False)
            progress.update(done)
            progress.refresh()

        step(f'read {src.name}', 0)
        checkpoint = read_checkpoint(src)
        found = _find(checkpoint, src, prefix, max_first)
        step('convert')
        model, model_args = _build(found, model_name, src.name)
        name = model.pretrained_cfg['architecture']
        exported = _export(model, model_args, to) if to else None
        step(f'write {dst.name}')
        img_size = model.pretrained_cfg['input_size'][1:]
        x = torch.randn(1, model.in_chans, *img_size, generator=torch.Generator().manual_seed(0)).double()
        with torch.inference_mode(), staged_file(dst) if to else staged_folder(dst) as staged:
            if to:
                torch.save(exported, staged)
            else:
                save_model(model, staged, model_args=model_args)
                config, description = read_config(staged), model.pretrained_cfg['description']
                card = model_card(config, dst.name, f'local-dir:{dst}', description)
                (staged / 'README.md').write_text(card)
            if verify:
                step('verify')
                expected = _reference_logits(name_weights(checkpoint, prefix), x, max_first)
                if to:
                    actual = _reference_logits(name_weights(read_checkpoint(staged)), x)
                else:
                    actual = create_model(f'local-dir:{staged}', pretrained=True).double().eval()(x)
                progress.clear()
                _compare(expected, actual, src, dst.name)
        step('done')
    print(f'{src}: {found.describe()}: {name}, {model.num_classes} classes, {model_args or "default arguments"}')
    for note in found.weights.notes:
        print(note)
    for assumed in _assumed(found, max_first):
        print(f'assumed, because names cannot show it: {assumed}')
    print(f'{dst}' if to else f"timm.create_model('local-dir:{dst}', pretrained=True)")
