"""Checkpoints from files and folders

What a file is shows in its first bytes, not in its name. Weights are read by safetensors, or by PyTorch's unpickler for
tensors and plain values only; everything else is refused with what it is and what to do about it.
"""
import argparse
import json
import pathlib
import zipfile
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple, Union

import numpy as np
import torch
from safetensors.torch import load_file

__all__ = ['read_checkpoint']

# What a folder of the Hub, of transformers' Trainer or of accelerate has its weights in
_FILES = ('model.safetensors', 'pytorch_model.bin', 'pytorch_model.pt', 'model.pth', 'model.pt')
_INDICES = ('model.safetensors.index.json', 'pytorch_model.bin.index.json')

# What files begin with that hold no weights, or not as they are: what they are, and the way out
_KINDS: Tuple[Tuple[bytes, str, str], ...] = (
    (b'version https://git-lfs', 'a Git LFS pointer, which stands for the file', 'Get the file with `git lfs pull`.'),
    (b'\x1f\x8b', 'compressed with gzip', 'Unpack it with `gunzip` (a .tar.gz with `tar xzf`).'),
    (b'BZh', 'compressed with bzip2', 'Unpack it with `bunzip2` (a .tar.bz2 with `tar xjf`).'),
    (b'\xfd7zXZ\x00', 'compressed with xz', 'Unpack it with `unxz` (a .tar.xz with `tar xJf`).'),
    (b'\x28\xb5\x2f\xfd', 'compressed with Zstandard', 'Unpack it with `unzstd`.'),
    (b"7z\xbc\xaf'\x1c", 'a 7z archive', 'Unpack it first.'),
    (b'Rar!', 'a RAR archive', 'Unpack it first.'),
    (b'\x89HDF', 'an HDF5 file, of Keras perhaps', 'Its network is not one of PyTorch; it has to be ported.'),
    (b'\x93NUMPY', 'a single array of NumPy', 'It has no names. Save all weights with torch.save(model.state_dict()).'),
    (b'GGUF', 'a GGUF file of a language model', 'It holds no ResNet.'),
    (b'%PDF', 'a PDF', 'Download the checkpoint itself.'),
    (b'\x89PNG', 'a picture', 'Give the checkpoint itself.'),
    (b'\xff\xd8\xff', 'a picture', 'Give the checkpoint itself.'),
)
_NETWORK = (  # a zip that PyTorch writes, but of a network with its code
    'a TorchScript or exported network, code and all',
    'Load it with torch.jit.load (or torch.export.load) and save its state_dict() with torch.save.')
_HTML = 'a web page, saved in place of the file', 'Download the file itself (on GitHub and the Hub: "raw", "download").'
_NPZ = (
    'an archive of NumPy arrays (.npz)',
    'If they have the names of a state dict: '
    'torch.save({k: torch.tensor(v) for k, v in numpy.load(FILE).items()}, ...).')
_ONNX = 'an ONNX network', 'Its weights are folded and renamed. Take the PyTorch checkpoint that it was exported from.'
_PICKLE = (
    'a bare pickle, which could run code when it is read',
    'Where you trust it, read it there and save its state_dict with torch.save.')


def _zip_kind(file: Path) -> Optional[Tuple[str, str]]:
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        names = [member.filename for member in members]
        ends = {name.partition('/')[2] for name in names}
        if any(name.endswith('.npy') for name in names):
            return _NPZ
        if 'constants.pkl' in ends or 'archive_format' in ends or any(end.startswith('code/') for end in ends):
            return _NETWORK
        if 'data.pkl' not in ends:
            if 'model.weights.h5' in names:
                return 'a Keras network', 'Its network is not one of PyTorch; it has to be ported.'
            return f'a zip of {", ".join(names[:3]) or "nothing"}', f'Unpack it first: `unzip {file.name}`.'
        if sum(member.file_size for member in members) > file.stat().st_size:
            return 'compressed, which checkpoints are not', 'Unpack it first.'
    return None


def _is_onnx(head: bytes) -> bool:
    """A protobuf message whose first fields are a version and the name of a producer."""
    return len(head) > 4 and head[0] == 8 and head[1] < 32 and head[2] == 0x12 and head[4:4 + head[3]].isascii()


def _kind(file: Path) -> Optional[Tuple[str, str]]:
    """What a file is and the way out, if it holds no weights in a form that is read."""
    with file.open('rb') as f:
        head = f.read(1024)
    if not head:
        return 'empty', 'Its download or the writing of it has been interrupted.'
    for magic, what, way_out in _KINDS:
        if head.startswith(magic):
            return what, way_out
    text = head.lstrip(b'\xef\xbb\xbf \t\r\n').lower()
    if text.startswith((b'<!doctype', b'<html', b'<head', b'<?xml', b'<script')):
        return _HTML
    if text.startswith((b'{', b'[')):
        return 'a text in JSON', 'An index of shards is read with its folder: give that.'
    if head[257:262] == b'ustar':
        return 'a tar archive', f'Unpack it first: `tar xf {file.name}`.'
    if head.startswith(b'PK\x03\x04'):
        if not zipfile.is_zipfile(file):
            return 'cut off, the end of its archive is missing', 'Download or copy it again.'
        try:
            return _zip_kind(file)
        except Exception:  # what a damaged directory raises is open-ended
            return 'damaged, the directory of its archive cannot be read', 'Download or copy it again.'
    return _ONNX if _is_onnx(head) else None


def _is_safetensors(file: Path) -> bool:
    with file.open('rb') as f:
        head = f.read(9)
    return len(head) == 9 and head[8:] == b'{'


def _safe_globals() -> List[Union[Callable, Tuple[Callable, str]]]:
    """What training code saves beside weights: arguments, and NumPy's scalars and arrays by their two names."""
    multiarray = (np._core if hasattr(np, '_core') else np.core).multiarray
    functions = [
        (getattr(multiarray, name), f'{module}.multiarray.{name}')
        for name in ('scalar', '_reconstruct') for module in ('numpy.core', 'numpy._core')]
    dtypes = {type(np.dtype(t)) for t in '?bhilqBHILQefdSU'}
    paths = [(pathlib.PurePosixPath, f'pathlib.{name}') for name in ('PosixPath', 'PurePosixPath')]
    return [argparse.Namespace, np.ndarray, np.dtype, *dtypes, *functions, *paths]


def _read_file(file: Path) -> Any:
    kind = _kind(file)
    if kind:
        raise ValueError(f'{file} holds no weights that can be read: it is {kind[0]}. {kind[1]}')
    if _is_safetensors(file):
        return load_file(file)
    # by its content: torch.load goes by the suffix of a name
    with torch.serialization.safe_globals(_safe_globals()), file.open('rb') as f:
        return torch.load(f, map_location='cpu', weights_only=True)


def _why(file: Path, e: Exception) -> str:
    """What is wrong with a file that cannot be read."""
    with file.open('rb') as f:
        head = f.read(16)
    classes: List[str] = []
    try:
        classes = torch.serialization.get_unsafe_globals_in_checkpoint(str(file))
    except Exception:  # of a damaged file, or one that is no archive
        if head[:1] == b'\x80' and b'\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19' not in head:
            return f'{file} holds no weights that can be read: it is {_PICKLE[0]}. {_PICKLE[1]}'
    if classes:
        return (
            f'{file} holds more than weights: objects of {", ".join(sorted(classes)[:4])}. Making them could run '
            f'code, so it is refused. Where their code is, and you trust the file, load it and save the weights alone: '
            f'torch.save(model.state_dict(), ...).')
    # what PyTorch says before that advises to trust the file
    reason = str(e).rpartition('WeightsUnpickler error:')[2].strip().partition('\n')[0]
    return f'{file} cannot be read as weights, it is damaged or cut off: {type(e).__name__}: {reason}'


def _find_in(folder: Path) -> List[Path]:
    """Files with the weights in a folder."""
    for name in _FILES:
        if (folder / name).is_file():
            return [folder / name]
    for name in _INDICES:
        if (folder / name).is_file():
            try:
                shards = {str(shard) for shard in json.loads((folder / name).read_text())['weight_map'].values()}
            except (ValueError, KeyError, AttributeError) as e:
                raise ValueError(f'{folder / name} is no index of shards: {e}') from e
            missing = [shard for shard in sorted(shards) if not (folder / Path(shard).name).is_file()]
            if missing:
                raise ValueError(f'{folder / name} names {", ".join(missing)}, which is not there. Download it, too.')
            return [folder / Path(shard).name for shard in sorted(shards)]
    if (folder / '.metadata').is_file():
        raise ValueError(
            f'{folder} is a distributed checkpoint. Make a file of it: `python -m '
            f'torch.distributed.checkpoint.format_utils dcp_to_torch {folder} FILE`.')
    if any(folder.glob('*/*_model_states.pt')) or (folder / 'zero_to_fp32.py').is_file():
        raise ValueError(
            f'{folder} is a checkpoint of DeepSpeed. Make a file of it: `python {folder}/zero_to_fp32.py`.')
    raise ValueError(f'{folder} has no weights in it: none of {", ".join(_FILES + _INDICES)}. Give the file itself.')


def _check_claims(file: Path, content: Mapping[Any, Any]) -> None:
    """Check that tensors are not larger than what there is of them."""
    for key, value in content.items():
        if isinstance(value, Mapping):
            _check_claims(file, value)
        elif isinstance(value, torch.Tensor) and not value.is_quantized and (
                value.layout != torch.strided or value.numel() * value.itemsize > value.untyped_storage().nbytes()):
            raise ValueError(f'{file} is damaged: {key} claims shape {tuple(value.shape)}, more than there is in it.')


def read_checkpoint(path: Union[str, Path]) -> Dict[Any, Any]:
    """Read a checkpoint without trusting it, from a file or a folder.

    Raises:
        FileNotFoundError: If there is nothing.
        ValueError: If it is damaged, or something else than weights; says what it is and what to do.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f'{path} is no file.')
    checkpoint: Dict[Any, Any] = {}
    for file in _find_in(path) if path.is_dir() else [path]:
        try:
            content = _read_file(file)
        except (ValueError, OSError) as e:
            if str(file) in str(e):
                raise
            raise ValueError(_why(file, e)) from e
        except Exception as e:  # what the unpickler raises on hostile files is open-ended
            raise ValueError(_why(file, e)) from e
        if not isinstance(content, Mapping):
            raise ValueError(
                f'{file} cannot be read as weights, it holds a {type(content).__name__}. Save the weights by name: '
                f'torch.save(model.state_dict(), ...).')
        _check_claims(file, content)
        checkpoint.update(content)
    if not checkpoint:
        raise ValueError(f'{path} is an empty dict: nothing was saved in it.')
    if {'state', 'param_groups'} == set(checkpoint):
        raise ValueError(f"{path} is an optimizer's state, it has no weights. Give the file of the model.")
    return checkpoint
