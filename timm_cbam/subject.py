"""Images and models to explain: what a model sees of an image, and Grad-CAM of what it says"""
from pathlib import Path
from typing import Dict, Iterable, List, Optional, Union

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
from torch.nn import functional as F

from .pictures import Panel

__all__ = ['Subject', 'read_image']

_MODES = {1: 'L', 3: 'RGB'}  # Pillow's names, by the number of channels


class Subject:
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
        self.name = name
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
        self.stage = self._last_stage(name)
        self.grad_cam = GradCAM(self.model, [self.stage])
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

    def _short_name(self, index: int) -> str:
        """The first of a class's names, all where others have it too."""
        name = self.class_names[index].partition(',')[0]
        unique = sum(other.partition(',')[0] == name for other in self.class_names) == 1
        return name if unique else self.class_names[index]

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
        """The input as a picture, (H, W, 3)."""
        return (x[0] * self.std + self.mean).clamp(0, 1).expand(3, -1, -1).permute(1, 2, 0).numpy()

    def look(self, image: Image.Image, *lines: str) -> Panel:
        """What the model sees of an image, under Grad-CAM of the target or else of the most probable class.

        Args:
            image: What to look at.
            *lines: What to write above, before the class and its probability.

        Raises:
            ValueError: If the model gives NaN or infinities.
        """
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

        x = self.read(image)
        targets = None if self.target is None else [ClassifierOutputTarget(self.target)]
        with np.errstate(all='ignore'):
            # Not the map that this gives: it is stretched from its least value to its largest, so that a map of one
            # pixel, or of equal values, is zero.
            self.grad_cam(x, targets)
            kept = self.grad_cam.activations_and_grads
            features, gradients = (t[0].numpy() for t in (kept.activations, kept.gradients))
            cam = self.grad_cam.get_cam_image(x, self.stage, targets, features, gradients)
        cam = torch.from_numpy(cam).relu()[None]
        logits = self.grad_cam.outputs[0].detach()
        if not (logits.isfinite().all() and cam.isfinite().all()):
            raise ValueError(f'{self.title} gives NaN or infinities for it')
        if cam.any():
            cam = F.interpolate(cam / cam.max(), x.shape[2:], mode='bilinear')
            evidence = []
        else:
            cam = torch.zeros(1, 1, *x.shape[2:])
            evidence = ['no positive evidence']
        probabilities = logits.softmax(0)
        index = int(probabilities.argmax()) if self.target is None else self.target
        return Panel(
            [*lines, self._short_name(index), _percent(float(probabilities[index])), *evidence],
            self.seen(x), cam[0, 0].numpy())

    def stages(self, layers: Iterable[str]) -> Dict[str, List[str]]:
        """Names of layers by stage."""
        modules = [info['module'] for info in self.model.feature_info]
        stages: Dict[str, List[str]] = {}
        for name in layers:
            stage = next((m for m in modules if name.startswith(f'{m}.')), name.partition('.')[0])
            stages.setdefault(stage, []).append(name)
        return stages


def _percent(probability: float) -> str:
    if probability < 0.001:
        return '< 0.1 %'
    if probability > 0.999:
        return '> 99.9 %'
    return f'{100 * probability:.1f} %'


def read_image(path: Union[str, Path]) -> Image.Image:
    """Read an image upright, of a film the first frame. Transparency stays, and is dropped later as timm does.

    Raises:
        ValueError: If it cannot be read, is too large, or is so narrow that it would be at the size that networks want.
    """
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            image.load()
    except (Image.DecompressionBombError, MemoryError) as e:
        raise ValueError(f'is too large, make it smaller ({e})') from e
    except Exception as e:  # a decoder may raise anything for a damaged file
        raise ValueError(f'cannot be read as an image ({e})') from e
    if image.mode[0] in 'IF':
        image = _to_bytes(image)
    if max(image.size) > 50 * min(image.size):
        raise ValueError(f'is too narrow: {image.width} x {image.height} pixels, the limit is 50 to 1')
    return image


def _to_bytes(image: Image.Image) -> Image.Image:
    """A gray image of integers or floats in 8 bits. Pillow's conversion would clip it.

    Raises:
        ValueError: If it has other values.
    """
    pixels = np.asarray(image).astype(np.float64)
    if image.mode == 'F':
        white = 1 if pixels.max() <= 8 else 255  # so that a little more than 1 is refused, not black
    elif image.mode == 'I':
        white = 255 if pixels.max() <= 255 else 65535
    else:
        white = 65535
    if not (pixels.min() >= 0 and pixels.max() <= white):
        raise ValueError(
            f'has pixels from {pixels.min():g} to {pixels.max():g}, what can be shown are 0 to {white:g}: scale them')
    return Image.fromarray((pixels * (255 / white)).round().astype(np.uint8))


