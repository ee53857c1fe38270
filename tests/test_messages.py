"""What is said where weights are not loaded: every message with the case that causes it

Each names the file, says what it is or does not fit, and what to do. `pattern` is the sentence that a user reads.
"""
import bz2
import collections
import gzip
import io
import json
import lzma
import pickle
import re
import tarfile
import zipfile

import numpy as np
import onnx
import pytest
import timm
import torch
from reference import Network
from safetensors.torch import save_file
from torch import nn

import timm_cbam.convert
from timm_cbam import convert_state_dict
from timm_cbam.cli import main
from timm_cbam.files import read_checkpoint
from timm_cbam.weights import find_weights


def weights():
    return Network('none', layers=(2, 2, 2, 2), channels=(64, 128, 256, 512)).state_dict()


def saved(value, **kwargs):
    buffer = io.BytesIO()
    torch.save(value, buffer, **kwargs)
    return buffer.getvalue()


def packed(mode):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        info = tarfile.TarInfo('model.pth')
        info.size = 3
        archive.addfile(info, io.BytesIO(b'abc'))
    return buffer.getvalue()


def zipped(**members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w') as archive:
        for name, content in members.items():
            archive.writestr(name.replace('__', '.'), content)
    return buffer.getvalue()


def npz():
    buffer = io.BytesIO()
    np.savez(buffer, **{'conv1.weight': np.zeros(3)})
    return buffer.getvalue()


def npy():
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    return buffer.getvalue()


def script():
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), buffer)
    return buffer.getvalue()


def exported():
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),)), buffer)
    return buffer.getvalue()


def onnx_file():
    node = onnx.helper.make_node('Relu', ['x'], ['y'])
    x, y = (onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1]) for n in 'xy')
    return onnx.helper.make_model(
        onnx.helper.make_graph([node], 'g', [x], [y]), producer_name='pytorch').SerializeToString()


def whole_model():
    return saved(nn.Sequential(nn.Conv2d(3, 4, 3)))


def quantized():
    return {k: torch.quantize_per_tensor(v, 0.1, 0, torch.qint8) if v.ndim == 4 else v for k, v in weights().items()}


FILES = {  # content, and what is said
    'HTML': (lambda: b'\n<!DOCTYPE html><html><title>Sign in</title>',
             'a web page, saved in place of the file. Download'),
    'LFS': (lambda: b'version https://git-lfs.github.com/spec/v1\noid sha256:1\n', 'Git LFS pointer.*`git lfs pull`'),
    'empty': (lambda: b'', 'it is empty. Its download'),
    'gzip': (lambda: gzip.compress(saved({})), 'compressed with gzip. Unpack it with `gunzip`'),
    'bzip2': (lambda: bz2.compress(saved({})), 'compressed with bzip2. Unpack'),
    'xz': (lambda: lzma.compress(saved({})), 'compressed with xz. Unpack'),
    'tar': (lambda: packed('w'), 'a tar archive. Unpack it first: `tar xf checkpoint.pth`'),
    'tar.gz': (lambda: packed('w:gz'), r'compressed with gzip. Unpack .*tar xzf'),
    'zip around': (lambda: zipped(model__pth=saved({})), 'a zip of model.pth. Unpack it first: `unzip checkpoint.pth`'),
    'keras': (lambda: zipped(**{'model__weights__h5': b'1', 'config__json': b'1'}), 'a Keras network'),
    'HDF5': (lambda: b'\x89HDF\r\n\x1a\n' + bytes(99), 'an HDF5 file.*ported'),
    'npz': (npz, r'NumPy arrays \(.npz\). .*numpy.load\(FILE\)'),
    'npy': (npy, 'a single array of NumPy. It has no names'),
    'ONNX': (onnx_file, 'an ONNX network. .*Take the PyTorch checkpoint'),
    'TorchScript': (script, 'TorchScript or exported network.*torch.jit.load'),
    'exported': (exported, 'TorchScript or exported network.*torch.export.load'),
    'JSON': (lambda: b'{"weight_map": {}}', 'a text in JSON. .*give that'),
    'picture': (lambda: b'\x89PNG\r\n\x1a\n' + bytes(99), 'a picture. Give the checkpoint'),
    'cut off zip': (lambda: saved(dict(a=torch.zeros(999)))[:-300], 'it is cut off, .*Download or copy it again'),
    'cut off': (lambda: saved(dict(a=torch.zeros(999)), _use_new_zipfile_serialization=False)[:-300],
                'damaged or cut off'),
    'bare pickle': (lambda: pickle.dumps(dict(a=[1])), 'a bare pickle, .*save its state_dict with torch.save'),
    'noise': (lambda: bytes(range(32, 232)), 'damaged or cut off'),
    'whole model': (whole_model, 'objects of torch.nn.modules.*save the weights alone: torch.save'),
    'other objects': (lambda: saved(dict(a=collections.deque([1]))), 'objects of collections.deque'),
    'list': (lambda: saved([torch.zeros(1)]), r'it holds a list. .*torch.save\(model.state_dict'),
    'tensor': (lambda: saved(torch.zeros(1)), 'it holds a Tensor'),
    'empty dict': (lambda: saved({}), 'an empty dict: nothing was saved'),
    'optimizer': (lambda: saved(torch.optim.SGD(nn.Linear(2, 2).parameters()).state_dict()), "an optimizer's state"),
    'no weights': (lambda: saved(dict(epoch=3, loss=0.1)), "no weights by name, it has 'epoch', 'loss'"),
    'quantized': (lambda: saved(quantized()), 'quantized .*from before quantization'),
    'claims': (lambda: saved(dict(a=torch.zeros(1, 1).expand(1 << 40, 1 << 20))), 'a claims shape'),
    'two networks': (lambda: saved({f'{p}.{k}': v for p in 'ab' for k, v in weights().items()}),
                     "2 networks: 'a.', 'b.'. Choose one: `timm-cbam convert --prefix a.`"),
    'head of several layers': (
        lambda: saved({**{k: v for k, v in weights().items() if k[:3] != 'fc.'},
                       **{f'fc.{i}.{k}': torch.zeros(512) for i in (0, 2) for k in ('weight', 'bias')}}),
        'differs in its head: it has fc.0.weight, fc.0.bias, fc.2.weight, fc.2.bias'),
    'other network': (lambda: saved(timm.create_model('mobilenetv3_small_050').state_dict()),
                      'no layout of a CBAM-ResNet, its keys are conv_stem'),
    'other depth': (lambda: saved({k: v for k, v in weights().items() if 'layer3.1.' not in k}),
                    'comes closest to cbam_resnet18, .*like a plain ResNet, of another depth'),
    'SE': (lambda: saved({**weights(), 'layer1.0.se.fc1.weight': torch.zeros(4, 64, 1, 1)}), 'an SE-ResNet, which no'),
    'unknown attention': (lambda: saved({f'module.{k}': v for k, v in dict(
        weights(), **{'layer1.0.gate.weight': torch.zeros(1)}).items()}),
        'attention of a layout that is not known: module.layer1.0.gate.weight'),
}


@pytest.mark.parametrize('name', FILES)
def test_file(name, tmp_path, capsys, monkeypatch):
    content, message = FILES[name]
    file = tmp_path / 'checkpoint.pth'
    file.write_bytes(content())
    assert main(['convert', str(file), str(tmp_path / 'dst')]) == 1
    error = capsys.readouterr().err.partition('timm-cbam: error: ')[2]
    assert re.search(message, error, re.DOTALL), error
    assert str(file) in error or file.name in error.splitlines()[0]
    assert 'weights_only' not in error and 'Traceback' not in error
    assert [p.name for p in tmp_path.iterdir()] == ['checkpoint.pth']


# Where timm reads a file it is ours to read: --pretrained-path, and what has NumPy's suffix
@pytest.mark.parametrize('name', ['HTML', 'whole model', 'two networks'])
def test_pretrained_file(name, tmp_path):
    content, message = FILES[name]
    (tmp_path / 'checkpoint.pth').write_bytes(content())
    with pytest.raises((ValueError, RuntimeError), match=f'(?s){message}'):
        timm.create_model(
            'cbam_resnet18', pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'checkpoint.pth')))


@pytest.mark.parametrize('suffix', ['.npz', '.npy'])
def test_checkpoint_path_of_numpy(suffix, tmp_path):
    (tmp_path / f'a{suffix}').write_bytes(FILES[suffix[1:]][0]())
    with pytest.raises(ValueError, match=FILES[suffix[1:]][1]):
        timm.create_model('cbam_resnet18', checkpoint_path=str(tmp_path / f'a{suffix}'))


@pytest.mark.parametrize('fill,message', [
    (lambda path: None, r'has no weights in it: none of model.safetensors, pytorch_model.bin'),
    (lambda path: (path / '.metadata').write_bytes(b''), 'distributed checkpoint.*dcp_to_torch'),
    (lambda path: (path / 'zero_to_fp32.py').write_text(''), 'DeepSpeed.*python .*zero_to_fp32.py'),
    (lambda path: (path / 'model.safetensors.index.json').write_text(json.dumps(dict(weight_map=dict(a='b')))),
     'names b, which is not there'),
    (lambda path: (path / 'model.safetensors.index.json').write_text('{}'), 'is no index of shards'),
], ids=['empty', 'distributed', 'deepspeed', 'missing shard', 'no index'])
def test_folder(fill, message, tmp_path, capsys):
    (tmp_path / 'folder').mkdir()
    fill(tmp_path / 'folder')
    assert main(['convert', str(tmp_path / 'folder'), str(tmp_path / 'dst')]) == 1
    error = capsys.readouterr().err
    assert re.search(message, error) and str(tmp_path / 'folder') in error


def split(state_dict):
    keys = list(state_dict)
    return {k: state_dict[k] for k in keys[::2]}, {k: state_dict[k] for k in keys[1::2]}


def in_shards(folder, state_dict, suffix, save, index):
    shards = [f'model-{i}-of-2.{suffix}' for i in (1, 2)]
    for name, part in zip(shards, split(state_dict), strict=True):
        save(part, folder / name)
    where = {k: shards[i % 2] for i, k in enumerate(state_dict)}
    (folder / index).write_text(json.dumps(dict(metadata={}, weight_map=where)))


READ = {  # files and folders that are read, whatever they are called
    'safetensors named .pth': lambda path, sd: save_file(sd, path / 'a.pth') or path / 'a.pth',
    'pickle named .safetensors': lambda path, sd: torch.save(sd, path / 'a.safetensors') or path / 'a.safetensors',
    'legacy': lambda path, sd: torch.save(
        sd, path / 'a.tar', _use_new_zipfile_serialization=False) or path / 'a.tar',
    'HF Trainer': lambda path, sd: save_file(
        {f'timm_model.{k}': v for k, v in sd.items()}, path / 'model.safetensors') or path,
    'accelerate': lambda path, sd: torch.save(sd, path / 'pytorch_model.bin') or path,
    'sharded': lambda path, sd: in_shards(
        path, sd, 'safetensors', save_file, 'model.safetensors.index.json') or path,
    'sharded .bin': lambda path, sd: in_shards(path, sd, 'bin', torch.save, 'pytorch_model.bin.index.json') or path,
}


@pytest.mark.parametrize('name', READ)
def test_read(name, tmp_path):
    theirs = Network('none', layers=(2, 2, 2, 2), channels=(64, 128, 256, 512))
    (tmp_path / 'src').mkdir()
    src = READ[name](tmp_path / 'src', theirs.state_dict())
    assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in find_weights(read_checkpoint(src)).values.items())
    if name not in ('HF Trainer', 'sharded'):
        return  # what follows is the same for all
    timm_cbam.convert.convert(src, tmp_path / 'dst')
    by_overlay = timm.create_model(
        'cbam_resnet18', num_classes=10, pretrained=True, pretrained_cfg_overlay=dict(file=str(src), num_classes=10))
    x = torch.randn(1, 3, 64, 64)
    for ours in (timm.create_model(f'local-dir:{tmp_path}/dst', pretrained=True), by_overlay):
        torch.testing.assert_close(ours.eval()(x), theirs(x), rtol=1e-4, atol=1e-4)
    assert by_overlay.pretrained_cfg['file'] == str(src) and not by_overlay.pretrained_cfg.get('state_dict')


def test_size_of_a_weight_is_named_as_in_the_file(tmp_path, capsys):
    theirs = Network('official in cbam', layers=(2, 2, 2, 2), channels=(64, 128, 256, 512)).state_dict()
    theirs['layer4.1.cbam.ChannelGate.mlp.3.bias'] = torch.zeros(3)
    torch.save({f'module.{k}': v for k, v in theirs.items()}, tmp_path / 'a.pth')
    assert main(['convert', str(tmp_path / 'a.pth'), str(tmp_path / 'b')]) == 1
    error = capsys.readouterr().err
    assert 'size mismatch for module.layer4.1.cbam.ChannelGate.mlp.3.bias: (3,), in the model (512,)' in error


def test_missing_weights_are_named_as_in_the_file():
    theirs = {f'module.{k}': v for k, v in Network('official in att').state_dict().items()}
    del theirs['module.layer2.0.att.ChannelGate.mlp.3.weight']
    model = timm.create_model(
        'cbam_resnet18_eccv18', layers=(1, 1, 1, 1), channels=(16, 32, 64, 128), num_classes=10)
    with pytest.raises(RuntimeError, match='Missing: module.layer2.0.att.ChannelGate.mlp.3.weight\n'):
        convert_state_dict(theirs, model)


@pytest.mark.slow
def test_folders_of_transformers_and_accelerate(tmp_path):
    """Written by them, not as we think that they are written."""
    from accelerate import Accelerator
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    wrapper = TimmWrapperForImageClassification(TimmWrapperConfig(architecture='resnet18', num_labels=10)).eval()
    wrapper.save_pretrained(tmp_path / 'transformers')
    accelerator, theirs = Accelerator(cpu=True), wrapper.timm_model
    accelerator.save_model(theirs, tmp_path / 'shards', max_shard_size='20MB')
    assert len(list((tmp_path / 'shards').glob('*.safetensors'))) > 1
    accelerator.prepare(theirs)
    accelerator.save_state(tmp_path / 'state')
    x = torch.randn(1, 3, 64, 64)
    for name in ('transformers', 'shards', 'state'):
        timm_cbam.convert.convert(tmp_path / name, tmp_path / f'{name}-ours')
        ours = timm.create_model(f'local-dir:{tmp_path / name}-ours', pretrained=True).eval()
        assert torch.equal(ours(x), theirs(x)), name
