"""Folders in the format of the Hugging Face Hub, as `local-dir:` and, once uploaded, `hf-hub:` load them"""
import json
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Dict, Iterator, Optional, Union

from timm.models import save_for_hf
from torch import nn

__all__ = ['save_model', 'staged_folder']

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


def save_model(model: nn.Module, folder: Union[str, Path], model_args: Optional[Dict[str, Any]] = None) -> None:
    """Write model.safetensors and config.json as `timm.models.save_for_hf` does, in a form that transformers loads too.

    Args:
        model: Model made by `timm.create_model`.
        folder: Folder to write into.
        model_args: Arguments of `timm.create_model` to record, needed with timm before 1.0.29 only.
    """
    folder = Path(folder)
    save_for_hf(model, str(folder), model_args=model_args, safe_serialization=True)
    config_file = folder / 'config.json'
    config = json.loads(config_file.read_text())
    # transformers' TimmWrapper passes num_classes itself and fails on a second one; timm reads the top level's
    config.get('model_args', {}).pop('num_classes', None)
    config_file.write_text(json.dumps(config, indent=2) + '\n')
