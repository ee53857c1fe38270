"""See what the attention does: gates of a forward pass, figures with Grad-CAM, curves of a training run

Papers:
* `CBAM: Convolutional Block Attention Module` - https://arxiv.org/abs/1807.06521
* `Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization` - https://arxiv.org/abs/1610.02391
"""
import csv
import math
import os
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence, TextIO

import numpy as np
import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

from .hub import staged_file
from .layers import Cbam, ChannelAttention, SpatialAttention
from .observe import observed
from .pictures import SUFFIXES, Block, Histograms, Maps, Panel, Row, printable, save_figure
from .subject import Subject, read_image

__all__ = ['AttentionMaps', 'attention_maps', 'explain', 'report']

_GRAD_CAM = 'Grad-CAM, relative to its own maximum'
_COLUMNS = 5  # of a figure, so that titles can be read
_GRID_COLUMNS = 8  # of a grid, which has short ones


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

    Example:
        >>> model = timm.create_model('cbam_resnet18_s1', num_classes=10)
        >>> maps = attention_maps(model, torch.randn(2, 3, 32, 32))
        >>> maps['layer2.0.se'].channel.shape, maps['layer2.0.se'].spatial.shape
        (torch.Size([2, 128]), torch.Size([2, 16, 16]))
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


def _gates(subject: Subject, image: Image.Image) -> List[Block]:
    """Spatial gates of the last Cbam layer of each stage, and channel gates of all layers."""
    x = subject.read(image)
    maps = attention_maps(subject.model, x)
    panels, channel = [], {}
    for stage, names in subject.stages(maps).items():
        spatial = maps[names[-1]].spatial
        if spatial is not None:
            height, width = spatial.shape[1:]
            panels.append(Panel([names[-1], f'{height} x {width}'], subject.seen(x), spatial[0].numpy()))
        gates = [maps[name].channel[0] for name in names if maps[name].channel is not None]
        if gates:
            layers = f'{len(gates)} layers' if len(gates) > 1 else '1 layer'
            channel[f'{stage}, {layers}'] = torch.cat(gates).numpy()
    # a sigmoid's; those of other functions may be outside
    values = [*(panel.values for panel in panels), *channel.values()]
    limits = min([0., *(float(v.min()) for v in values)]), max([1., *(float(v.max()) for v in values)])
    blocks: List[Block] = []
    if panels:
        blocks.append(Maps(_rows(panels), 'spatial gate', limits, f'Spatial gates of {subject.title}'))
    if channel:
        blocks.append(Histograms(
            channel, 'channel gate', 'channels, %', limits, f'Channel gates of {subject.title}'))
    return blocks


def _rows(panels: Sequence[Panel]) -> List[Row]:
    """Rows of at most _COLUMNS panels, as many in each as can be."""
    columns = math.ceil(len(panels) / math.ceil(len(panels) / _COLUMNS))
    return [Row(panels[i:i + columns]) for i in range(0, len(panels), columns)]


def _sheet(name: str, image: Image.Image, subjects: Sequence[Subject], gates: bool) -> List[Block]:
    """What models look at in an image, and the gates of the first."""
    first = subjects[0]
    seen = first.seen(first.read(image))
    height, width = seen.shape[:2]
    panels = [Panel([name, f'{image.width} x {image.height} pixels', f'seen at {width} x {height}'], seen)]
    for subject in subjects:
        panels.append(subject.look(image, subject.title, *filter(None, [subject.note])))
    blocks: List[Block] = [Maps(_rows(panels), _GRAD_CAM)]
    if gates and any(isinstance(m, Cbam) for m in first.model.modules()):
        blocks += _gates(first, image)
    return blocks


def _series(image: Image.Image, subjects: Sequence[Subject]) -> List[Panel]:
    """What the last model sees of an image, and what each looks at."""
    last = subjects[-1]
    return [Panel([], last.seen(last.read(image))), *(subject.look(image) for subject in subjects)]


def _grid(series: Dict[str, List[Panel]], subjects: Sequence[Subject]) -> List[Block]:
    """Images by models, the images side by side unless there are more models."""
    heads = [[], *([subject.title, *filter(None, [subject.note])] for subject in subjects)]
    names = list(series)
    if len(names) < len(heads):
        rows = [
            Row([p._replace(lines=[*(head if name == names[0] else []), *p.lines])
                 for head, p in zip(heads, series[name], strict=True)], [name])
            for name in names]
        return [Maps(rows, _GRAD_CAM)]
    columns = math.ceil(len(names) / math.ceil(len(names) / _GRID_COLUMNS))
    rows = []
    for start in range(0, len(names), columns):
        band = names[start:start + columns]
        rows.append(Row([series[name][0]._replace(lines=[name]) for name in band]))
        rows += [Row([series[name][i] for name in band], head) for i, head in enumerate(heads) if i]
    return [Maps(rows, _GRAD_CAM)]


def _distinct(names: List[str], paths: Sequence[Sequence[str]], separator: str) -> List[str]:
    """Names, or as much of the ends of their paths as tells one from the others, which a short line may show."""
    for length in range(1, max(map(len, paths), default=0) + 1):
        count = Counter(name.casefold() for name in names)  # some file systems take x.png for X.png
        names = [
            name if count[name.casefold()] == 1 else separator.join(parts[-length:])
            for name, parts in zip(names, paths, strict=True)]
    return names


def _names(images: Sequence[str]) -> List[str]:
    """A name for each image: its stem, or more of its path.

    Raises:
        ValueError: If one is there twice.
    """
    paths = [Path(os.path.abspath(image)) for image in images]
    names = _distinct([path.stem for path in paths], [path.parts[1:] for path in paths], '-')
    for image, times in zip(images, map(names.count, names), strict=True):
        if times > 1:
            raise ValueError(f'{image} is there {times} times: name each image once.')
    return names


def _outputs(names: Sequence[str], images: Sequence[str], output: str, grid: bool) -> List[Path]:
    """Files to write figures to, one for each image or one for all."""
    file = Path(output)
    if output.endswith(('/', os.sep)) or file.is_dir() or not file.suffix:
        if file.is_file():
            raise ValueError(f'{output} is a file, choose a folder, or a name that ends in {", ".join(SUFFIXES)}.')
        files = [file / f'{name}.png' for name in (['grid'] if grid else names)]
    elif file.suffix.lower() not in SUFFIXES:
        raise ValueError(
            f'{output} cannot be written, choose a name that ends in {", ".join(SUFFIXES)}, or {output}{os.sep} for a '
            f'folder.')
    elif grid or len(images) == 1:
        files = [file]
    else:
        raise ValueError(f'{output} is the name of one file, but there are {len(images)} images: name a folder.')
    for file in files:
        if file.resolve() in [Path(image).resolve() for image in images]:
            raise ValueError(f'{file} is one of the images and would be overwritten: choose another name or folder.')
    return files


def _print(text: object, file: TextIO) -> None:
    """Print a line at once, also beside a progress bar, and with names that the file's encoding does not have."""
    encoding = getattr(file, 'encoding', None) or 'utf-8'
    tqdm.write(printable(text).encode(encoding, 'backslashreplace').decode(encoding), file=file)
    file.flush()


def explain(
        images: Sequence[str],
        model: str = 'cbam_resnet50_eccv18',
        compare: Sequence[str] = (),
        target: Optional[str] = None,
        output: str = 'timm-cbam-explain',
        gates: bool = True,
        grid: bool = False,
) -> List[Path]:
    """Picture what models look at: Grad-CAM of each, and the gates of the first if it has CBAM.

    The path of each picture is printed when it is finished. An image that fails is a line on stderr, the others go on.

    Args:
        images: Image files.
        model: What `timm.create_model` takes. Weights are loaded where there are any.
        compare: More models, for Grad-CAM.
        target: Name or index of the class that Grad-CAM is for, the most probable one of each model if None.
        output: Folder to write STEM.png into (or grid.png), or the name of the picture if there is one. Files that are
            there are replaced.
        gates: Whether to show the gates.
        grid: One picture of all images (columns) and models (rows, `model` last), without gates.

    Returns:
        The pictures.

    Raises:
        ValueError: If an image is there twice, a model is no CNN or does not know the target, or a picture cannot be
            written under its name or would overwrite an image.
        RuntimeError: At the end, if an image failed.
    """
    names = _names(images)
    files = _outputs(names, images, output, grid)
    subjects = [Subject(name, target) for name in (model, *compare)]
    titles = _distinct(
        [subject.title for subject in subjects],
        [Path(subject.name.rpartition(':')[2]).parts for subject in subjects], '/')
    for subject, title in zip(subjects, titles, strict=True):
        subject.title = title if titles.count(title) == 1 else subject.name
    if grid:
        subjects = [*subjects[1:], subjects[0]]  # the baseline first
    done: List[Path] = []
    series: Dict[str, List[Panel]] = {}
    failed = 0
    with tqdm(total=len(images), desc='explain', disable=len(images) == 1) as progress:

        def finish(file: Path, blocks: List[Block]) -> None:
            with staged_file(file, replace=True) as staged:
                save_figure(staged, blocks)
            done.append(file)

        for i, (image, name) in enumerate(zip(images, names, strict=True)):
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings('ignore', module='PIL')
                    upright = read_image(image)
                    if grid:
                        series[name] = _series(upright, subjects)
                    else:
                        finish(files[i], _sheet(Path(image).name, upright, subjects, gates))
            except (OSError, ValueError, MemoryError) as e:
                failed += 1
                _print(f'{image}: {e}', sys.stderr)
            else:
                if not grid:
                    _print(files[i], sys.stdout)
            progress.update()
    if series:
        finish(files[0], _grid(series, subjects))
        _print(files[0], sys.stdout)
    if failed:
        raise RuntimeError(f'{failed} of {len(images)} images failed, see above')
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

    figure = Figure(figsize=(8, 2.8), layout='constrained')
    panels = {'loss': '_loss', 'accuracy, %': '_top', 'learning rate': 'lr'}
    for ax, (label, key) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for name in (name for name in columns if key in name):
            ax.plot(columns['epoch'], columns[name], '.-', label=name)
        ax.set_xlabel('epoch')
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.set_ylabel(label)
        ax.legend(*ax.get_legend_handles_labels())
    with staged_file(file, replace=True) as staged:
        figure.savefig(staged, dpi=200)
    return file
