"""See what the attention does: gates of a forward pass, figures with Grad-CAM, curves of a training run

Papers:
* `CBAM: Convolutional Block Attention Module` - https://arxiv.org/abs/1807.06521
* `Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization` - https://arxiv.org/abs/1610.02391
"""
import csv
import sys
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import (
    CustomDatasetInfo,
    ImageNetInfo,
    create_transform,
    infer_imagenet_subset,
    resolve_model_data_config,
)
from timm.models import create_model, is_model_pretrained
from torch import nn
from tqdm import tqdm

from .hub import staged_file
from .layers import Cbam, ChannelAttention, SpatialAttention
from .observe import observed

__all__ = ['AttentionMaps', 'attention_maps', 'explain', 'report']

_COLORS = 'cividis'  # looks the same to the colour-blind
_MODES = {1: 'L', 3: 'RGB'}  # Pillow's names, by the number of channels


class AttentionMaps(NamedTuple):
    """Gates of a Cbam layer: channel (B, C) and spatial (B, H, W), None for one that the layer does not have."""
    channel: Optional[torch.Tensor] = None
    spatial: Optional[torch.Tensor] = None


def attention_maps(model: nn.Module, x: torch.Tensor) -> Dict[str, AttentionMaps]:
    """Gates of all Cbam layers in a forward pass, section 3, equations 2 and 3.

    The model runs in eval mode, without gradients and, if compiled, as it is without compilation. Afterwards it is as
    it was before. It may be any network that has :class:`timm_cbam.Cbam` layers.

    Args:
        model: Network with Cbam layers.
        x: Its input, (B, C, H, W) for timm's models.

    Returns:
        Gates by the layer's name in the model, such as 'layer1.0.se', in the model's order. Of a layer that runs more
        than once they are the last ones.

    Raises:
        ValueError: If the model has no Cbam layer.
    """
    maps: Dict[str, AttentionMaps] = {}

    def keep(name: str, **gate: torch.Tensor) -> None:
        maps[name] = maps[name]._replace(**gate)

    with observed(model) as handles:
        for name, m in model.named_modules():
            if isinstance(m, Cbam):
                name = '.'.join(part for part in name.split('.') if part != '_orig_mod')  # as before torch.compile
                maps[name] = AttentionMaps()
                # Not on the attention modules themselves: blocks whose attention has hooks take a slower way.
                # There the channel gate is (B, C, 1, 1), else (B, C).
                if isinstance(m.channel, ChannelAttention):
                    handles.append(m.channel.gate.register_forward_hook(
                        lambda module, args, out, name=name: keep(name, channel=out.flatten(1))))
                if isinstance(m.spatial, SpatialAttention):
                    handles.append(m.spatial.gate.register_forward_hook(
                        lambda module, args, out, name=name: keep(name, spatial=out.squeeze(1))))
        if not maps:
            raise ValueError(
                f'{type(model).__name__} has no Cbam layer, so there is no attention to show. '
                f"timm.list_models('cbam*') lists models that have.")
        model(x)
    return maps


class _Subject:
    """A model with what it takes to explain it."""

    def __init__(self, name: str, target: Optional[str]) -> None:
        from pytorch_grad_cam import GradCAM

        saved = ':' in name  # hf-hub: and local-dir: have weights, nobody knows which
        trained = saved or is_model_pretrained(name)
        try:
            self.model = create_model(name, pretrained=trained).eval()
        except OSError as e:
            raise OSError(f'{name} cannot be loaded: {e}') from e
        cfg = self.model.pretrained_cfg
        self.title = Path(name.partition(':')[2]).name or f"{cfg['architecture']}.{cfg['tag']}"
        self.note = ''
        if not trained:
            self.note = 'untrained, weights are random'
        elif not saved and cfg['tag'].startswith('warm_'):
            self.note = 'attention untrained (warm start)'
        config = resolve_model_data_config(self.model)
        self.input_size = config['input_size']
        if self.input_size[0] not in _MODES:
            raise ValueError(f'{name} has {self.input_size[0]} input channels, images have 1 or 3.')
        if not self.model.num_classes:
            raise ValueError(f'{name} has no classifier, so there is no class to explain.')
        self.transform = create_transform(**config, is_training=False)
        self.mean, self.std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ('mean', 'std'))
        self.grad_cam = GradCAM(self.model, [self._last_stage(name)])
        self.class_names = self._class_names()
        self.target = None if target is None else self._class_index(target)

    def _last_stage(self, name: str) -> nn.Module:
        """The module whose output is the last feature map."""
        shape = None

        def keep_shape(module, args, out):
            nonlocal shape
            shape = tuple(out.shape) if isinstance(out, torch.Tensor) else None

        feature_info = getattr(self.model, 'feature_info', None)
        if feature_info:
            stage = self.model.get_submodule(feature_info[-1]['module'])
            with stage.register_forward_hook(keep_shape), torch.no_grad():
                self.model(torch.zeros(1, *self.input_size))
        if shape is None or len(shape) != 4 or shape[1] != feature_info[-1]['num_chs']:
            raise ValueError(f'{name} is no CNN whose last stage gives a map (B, C, H, W), which Grad-CAM needs.')
        return stage

    def _class_names(self) -> List[str]:
        cfg, num_classes = self.model.pretrained_cfg, self.model.num_classes
        info = None
        if len(cfg.get('label_names') or ()) == num_classes:
            info = CustomDatasetInfo(cfg['label_names'], cfg.get('label_descriptions'))
        elif infer_imagenet_subset(self.model):
            info = ImageNetInfo(infer_imagenet_subset(self.model))
        return [info.index_to_description(i) if info else f'class {i}' for i in range(num_classes)]

    def _class_index(self, target: str) -> int:
        wanted = target.strip().lower()
        found = [
            i for i, name in enumerate(self.class_names)
            if wanted in (name.lower(), *(part.strip() for part in name.lower().split(',')))]
        if not found and wanted.isdecimal() and int(wanted) < len(self.class_names):
            found = [int(wanted)]
        if len(found) != 1:
            what = f'has classes {", ".join(map(str, found))} of the name' if found else 'has no class'
            raise ValueError(
                f'{self.title} {what} {target!r}; choose by an index from 0 to {len(self.class_names) - 1}, or a name '
                f'such as {self.class_names[0]!r}.')
        return found[0]

    def read(self, image: Image.Image) -> torch.Tensor:
        """The model's input for an image, (1, C, H, W)."""
        return self.transform(image.convert(_MODES[self.input_size[0]]))[None]

    def seen(self, x: torch.Tensor) -> np.ndarray:
        """The input as a gray image, (H, W)."""
        return (x[0] * self.std + self.mean).clamp(0, 1).mean(0).numpy()

    def explain(self, x: torch.Tensor) -> Tuple[np.ndarray, str, float]:
        """Grad-CAM (H, W) of the target, or else the most probable class, its name and its probability."""
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

        targets = None if self.target is None else [ClassifierOutputTarget(self.target)]
        cam = self.grad_cam(x, targets)[0]
        probabilities = self.grad_cam.outputs[0].detach().softmax(0)
        index = int(probabilities.argmax()) if self.target is None else self.target
        return cam, self.class_names[index], float(probabilities[index])

    def stages(self, maps: Dict[str, AttentionMaps]) -> Dict[str, List[str]]:
        """Names of the Cbam layers by stage."""
        modules = [info['module'] for info in self.model.feature_info]
        stages: Dict[str, List[str]] = {}
        for name in maps:
            stage = next((m for m in modules if name.startswith(f'{m}.')), name.partition('.')[0])
            stages.setdefault(stage, []).append(name)
        return stages


def _read_image(path: Union[str, Path]) -> Image.Image:
    """Read an image upright, of a film the first frame. Transparency stays, and is dropped later as timm does.

    Raises:
        ValueError: If it cannot be read, or is so narrow that it would be huge at the size that networks want.
    """
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            image.load()
    except Exception as e:  # a decoder may raise anything for a damaged file
        raise ValueError(f'cannot be read as an image ({e})') from e
    if image.mode.startswith('I'):
        # 16 bits, of which Pillow's conversion would cut off the upper half
        image = image.convert('I').point(lambda value: value / 257).convert('L')
    if max(image.size) > 50 * min(image.size):
        raise ValueError(f'is too narrow: {image.width} x {image.height} pixels, the limit is 50 to 1')
    return image


def _overlay(ax, gray, values, title: str, label: str, **limits: float) -> None:
    """Draw values (h, w) over a gray image (H, W), with their colour bar (vmin and vmax are its limits)."""
    height, width = gray.shape
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    # with half its contrast, else what is bright in the image looks like a high value
    ax.imshow(gray, cmap='gray', vmin=-0.5, vmax=1.5, extent=extent)
    shown = ax.imshow(values, cmap=_COLORS, alpha=0.7, extent=extent, **limits)
    ax.figure.colorbar(shown, ax=ax, label=label, shrink=0.8)
    ax.set_title(title, fontsize=9)
    ax.set_axis_off()


def _shorten(text: str, width: int = 36) -> str:
    return text if len(text) <= width else text[:width - 3] + '...'


def _draw(file: Path, name: str, image: Image.Image, subjects: Sequence[_Subject]) -> None:
    """Draw what models look at in an image, and the gates of the first."""
    from matplotlib.figure import Figure

    first = subjects[0]
    x = first.read(image)
    has_attention = any(isinstance(m, Cbam) for m in first.model.modules())
    maps = attention_maps(first.model, x) if has_attention else {}
    spatial, channel = {}, {}
    for stage, names in first.stages(maps).items():
        if maps[names[-1]].spatial is not None:
            spatial[names[-1]] = maps[names[-1]].spatial[0].numpy()
        gates = [maps[name].channel[0] for name in names if maps[name].channel is not None]
        if gates:
            channel[f'{stage} ({len(gates)} layers)'] = torch.cat(gates).numpy()
    rows = [1 + len(subjects)] + [len(gates) for gates in (spatial, channel) if gates]
    figure = Figure(figsize=(3.6 * max(rows), 3.1 * len(rows)), layout='constrained')
    # as many columns in each row, so that the panels have one size
    grid = figure.subplots(len(rows), max(rows), squeeze=False)
    for ax in grid.flat:
        ax.set_axis_off()
    axes = iter(grid)

    row = next(axes)
    thumbnail = image.convert('RGB')
    thumbnail.thumbnail((800, 800))
    row[0].imshow(thumbnail)
    row[0].set_title(f'{_shorten(name)}\n{image.width} x {image.height} pixels', fontsize=9)
    for ax, subject in zip(row[1:], subjects, strict=False):
        its_x = subject.read(image)
        cam, class_name, probability = subject.explain(its_x)
        note = f'\n{subject.note}' if subject.note else ''
        title = f'{_shorten(subject.title)}{note}\n{_shorten(class_name)}: {100 * probability:.1f} %'
        _overlay(ax, subject.seen(its_x), cam, title, 'Grad-CAM', vmin=0, vmax=1)
    if spatial:
        for ax, (layer, gate) in zip(next(axes), spatial.items(), strict=False):
            height, width = gate.shape
            _overlay(ax, first.seen(x), gate, f'spatial gate of {layer}\n{height} x {width}', 'gate')
    if channel:
        bins = np.histogram_bin_edges(np.concatenate(list(channel.values())), bins=40)
        for ax, (stage, gates) in zip(next(axes), channel.items(), strict=False):
            ax.set_axis_on()
            ax.hist(gates, bins=bins)
            ax.set_title(f'channel gates of {stage}', fontsize=9)
            ax.set_xlabel('gate')
            ax.set_ylabel('channels')
    figure.savefig(file, dpi=110)


def _outputs(images: Sequence[str], output: str) -> List[Path]:
    """Files to write the images' figures to."""
    from matplotlib.figure import Figure

    file = Path(output)
    if file.suffix[1:].lower() not in Figure().canvas.get_supported_filetypes():
        files = [file / f'{Path(image).stem}.png' for image in images]
    elif len(images) == 1:
        files = [file]
    else:
        raise ValueError(f'{output} is the name of one file, but there are {len(images)} images: name a folder.')
    for i, file in enumerate(files):
        if file in files[:i]:
            raise ValueError(
                f'{images[files.index(file)]} and {images[i]} would both become {file}: use two folders.')
        if file.resolve() in [Path(image).resolve() for image in images]:
            raise ValueError(f'{file} is one of the images and would be overwritten: choose another name or folder.')
    return files


def explain(
        images: Sequence[str],
        model: str = 'cbam_resnet50_eccv18',
        compare: Sequence[str] = (),
        target: Optional[str] = None,
        output: str = 'timm-cbam-explain',
) -> List[Path]:
    """Picture what models look at: Grad-CAM of each, and the gates of the first if it has CBAM.

    An image that fails is reported on stderr, the others go on.

    Args:
        images: Image files.
        model: What `timm.create_model` takes. Weights are loaded where there are any.
        compare: More models, for Grad-CAM.
        target: Name or index of the class that Grad-CAM is for, the most probable one of each model if None.
        output: Folder to write STEM.png into, or the name of a picture if there is one image. Files that are there
            are replaced.

    Returns:
        The pictures.

    Raises:
        ValueError: If a model is no CNN or does not know the target, or a picture would overwrite an image or another.
        RuntimeError: At the end, if an image failed.
    """
    files = _outputs(images, output)
    subjects = [_Subject(name, target) for name in (model, *compare)]
    done = []
    with tqdm(total=len(images), desc='explain', disable=len(images) == 1) as progress:
        for image, file in zip(images, files, strict=True):
            try:
                upright = _read_image(image)
                with staged_file(file, replace=True) as staged:
                    _draw(staged, Path(image).name, upright, subjects)
                done.append(file)
            except (OSError, ValueError) as e:
                progress.write(f'{image}: {e}', file=sys.stderr)
            progress.update()
    if len(done) < len(images):
        raise RuntimeError(f'{len(images) - len(done)} of {len(images)} images failed, see above')
    return done


def report(run_dir: str) -> Path:
    """Draw the curves of a training run by timm's train.py.

    Args:
        run_dir: The run's folder, which has summary.csv and gets summary.png.

    Raises:
        ValueError: If there are no epochs in summary.csv, or what is no number.
    """
    from matplotlib.figure import Figure

    source, file = Path(run_dir, 'summary.csv'), Path(run_dir, 'summary.png')
    header, rows = [], []
    with source.open(newline='') as lines:
        for row in csv.reader(lines):
            if row[:1] == ['epoch']:
                header = row  # a resumed run may write it again
            elif row and len(row) == len(header):  # shorter without validation: who knows what is what
                rows.append(row)
    if not rows:
        raise ValueError(f"{source} has no epochs, is it of timm's train.py?")
    try:
        columns = dict(zip(header, np.array(rows, dtype=float).T, strict=True))
    except ValueError as e:
        raise ValueError(f'{source}: {e}') from e

    figure = Figure(figsize=(12, 3.6), layout='constrained')
    panels = {'loss': '_loss', 'accuracy, %': '_top', 'learning rate': 'lr'}
    for ax, (label, key) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for name in (name for name in columns if key in name):
            ax.plot(columns['epoch'], columns[name], '.-', label=name)
        ax.set_xlabel('epoch')
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.set_ylabel(label)
        ax.legend(*ax.get_legend_handles_labels())
    with staged_file(file, replace=True) as staged:
        figure.savefig(staged, dpi=110)
    return file
