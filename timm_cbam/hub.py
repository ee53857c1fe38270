"""Folders in the format of the Hugging Face Hub, as `local-dir:` and, once uploaded, `hf-hub:` load them"""
import json
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Dict, Iterator, Optional, Union

from huggingface_hub import EvalResult, ModelCardData
from safetensors import SafetensorError
from timm.models import save_for_hf
from torch import nn

__all__ = ['model_card', 'read_config', 'save_model', 'staged_file', 'staged_folder']

_FILES = {'config.json', 'model.safetensors', 'README.md', 'demo.png'}  # what a folder may hold that is replaced


@contextmanager
def staged_folder(folder: Union[str, Path]) -> Iterator[Path]:
    """Fill a folder so that it appears whole or not at all, also when interrupted.

    Args:
        folder: Folder to write. An earlier one is replaced if it has no other files than a model folder has.

    Yields:
        Empty temporary folder beside it, which takes its name at the end.

    Raises:
        FileExistsError: If something else than a model folder is in the way.
    """
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and {p.name for p in folder.iterdir()} <= _FILES):
        raise FileExistsError(f'{folder} exists and is no model folder; remove it or choose another.')
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f'.{folder.name}-', dir=folder.parent) as tmp:
        new, old = Path(tmp, 'new'), Path(tmp, 'old')
        new.mkdir()
        yield new
        if folder.exists():
            folder.rename(old)
        new.rename(folder)


@contextmanager
def staged_file(file: Union[str, Path], replace: bool = False) -> Iterator[Path]:
    """Write a file so that it appears whole or not at all.

    Args:
        file: File to write.
        replace: Whether it may take the place of another.

    Yields:
        Temporary path beside it, which takes its name at the end.

    Raises:
        FileExistsError: If there is one already that it may not replace.
    """
    file = Path(file)
    if file.exists() and not replace:
        raise FileExistsError(f'{file} exists; remove it or choose another name.')
    file.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f'.{file.name}-', dir=file.parent) as tmp:
        staged = Path(tmp, file.name)
        yield staged
        staged.replace(file)


def save_model(model: nn.Module, folder: Union[str, Path], model_args: Optional[Dict[str, Any]] = None) -> None:
    """Write model.safetensors and config.json as `timm.models.save_for_hf` does, in a form that transformers loads too.

    Args:
        model: Model made by `timm.create_model`.
        folder: Folder to write into.
        model_args: Arguments of `timm.create_model` to record, needed with timm before 1.0.29 only.

    Raises:
        OSError: If they cannot be written.
    """
    try:
        save_for_hf(model, str(folder), model_args=model_args, safe_serialization=True)
    except SafetensorError as e:  # which is no OSError on a full disk
        raise OSError(f'{folder}: the weights cannot be written: {e}') from e
    (Path(folder) / 'config.json').write_text(json.dumps(read_config(folder), indent=2) + '\n')


def read_config(folder: Union[str, Path]) -> Dict[str, Any]:
    """Read config.json of a model folder, in a form that transformers loads too."""
    config = json.loads((Path(folder) / 'config.json').read_text())
    # transformers' TimmWrapper passes num_classes itself and fails on a second one; timm reads the top level's
    config.get('model_args', {}).pop('num_classes', None)
    return config


_CITATION = """@inproceedings{woo2018cbam,
  title     = {{CBAM}: Convolutional Block Attention Module},
  author    = {Woo, Sanghyun and Park, Jongchan and Lee, Joon-Young and Kweon, In So},
  booktitle = {Proceedings of the European Conference on Computer Vision (ECCV)},
  year      = {2018}
}"""


def model_card(
        config: Dict[str, Any],
        name: str,
        source: str,
        description: str,
        license: Optional[str] = None,
        dataset: Optional[str] = None,
        metrics: Optional[Dict[str, float]] = None,
) -> str:
    """Model card, the README.md of a model on the Hub: metadata, what the model is, how to use it, whom to cite.

    Args:
        config: The model's config.json.
        name: Name of the model.
        source: What `timm.create_model` takes, `hf-hub:...` or `local-dir:...`.
        description: Where the weights come from.
        license: License of the weights, as the Hub abbreviates it.
        dataset: Data set that the metrics were measured on.
        metrics: Values by the name of the metric, accuracies in percent.
    """
    cfg = config['pretrained_cfg']
    metrics = metrics or {}
    results = [EvalResult('image-classification', dataset, dataset, name, value) for name, value in metrics.items()]
    data = ModelCardData(
        library_name='timm', pipeline_tag='image-classification', tags=['image-classification', 'timm', 'cbam'],
        license=license, model_name=name, eval_results=results or None)
    measured = ''.join(f'| {metric} | {value:g} |\n' for metric, value in metrics.items())
    if measured:
        measured = f'## Results on {dataset}\n\n| metric | value |\n|---|---|\n{measured}\n'
    return f'''---
{data.to_yaml()}
---
# {name}

{description}

## Model

- **Architecture:** `{config['architecture']}`, a ResNet with CBAM in every block
- **Arguments:** {f"`{config['model_args']}`" if config.get('model_args') else 'the default ones'}
- **Classes:** {config['num_classes']}
- **Preprocessing:** input {'x'.join(map(str, cfg['input_size']))}, crop {cfg['crop_pct']}, \
{cfg['interpolation']}, mean {cfg['mean']}, std {cfg['std']}
- **License:** {license or 'that of the weights it was made from'}

{measured}## Use

After `pip install timm-cbam`:

```python
import timm

model = timm.create_model('{source}', pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
```

## Cite

```bibtex
{_CITATION}
```
'''
