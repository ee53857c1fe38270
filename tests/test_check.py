"""Nothing runs on a device that has not given the reference's results there"""
import threading
import warnings
from types import SimpleNamespace

import pytest
import timm
import torch

from timm_cbam import fusion
from timm_cbam.ops import check, tail_torch

CPU = torch.device('cpu')
KIND = CPU, torch.float32, torch.contiguous_format
MAP = torch.empty(1, 1, 1, 1)
DTYPES = [torch.float32, torch.bfloat16]
COMPUTED = {  # what a module computes of which we check it
    True: ('out', 'stats', 'x', 'shortcut', 'weight', 'bias', 'fc1_weight', 'fc2_weight', 'conv_weight'),
    False: ('out', 'norm_relu')}


@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch):
    monkeypatch.setattr(check, '_CHOSEN', {})


def offer(monkeypatch, **modules):
    """Candidates by name, in the order in which they are tried"""
    monkeypatch.setattr(check, '_candidates', lambda device: iter(modules))
    monkeypatch.setattr(check, 'import_module', lambda name, package: modules[name.removeprefix('.')])


def broken(name, change):
    """tail_torch with one result changed"""
    def forward(x, shortcut, out, p):
        results = tail_torch.forward(x, shortcut, out, p)
        if name == 'out':
            change(out)
        if name == 'stats':
            change(results.stats[:2])
        return results

    def backward(*args):
        gradients = tail_torch.backward(*args)
        if name in gradients._fields:
            change(getattr(gradients, name))
        return gradients

    def infer(x, *args):
        tail_torch.infer(x, *args)
        if name == 'out':
            change(x)

    def norm_relu(x, *args):
        tail_torch.norm_relu(x, *args)
        if name == 'norm_relu':
            change(x)

    return SimpleNamespace(forward=forward, backward=backward, infer=infer, norm_relu=norm_relu)



def last_tile(t):
    """Of a map: nothing written to the last 16 channels of the last sample. Of anything else: to the last eighth."""
    if t.ndim == 4 and t.shape[2] > 1:
        t[-1, -16:] = 0
    else:
        t.view(-1)[-(t.numel() // 8):] = 0


@pytest.mark.parametrize('training', [True, False], ids=['train', 'infer'])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_right_results_pass(dtype, memory_format, training):
    state = torch.get_rng_state()
    assert check._difference(tail_torch, CPU, dtype, memory_format, training) is None
    assert torch.equal(torch.get_rng_state(), state)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device('meta'), torch.autocast('cpu', torch.bfloat16), torch.inference_mode():
            assert check._difference(tail_torch, CPU, dtype, memory_format, training) is None
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize('change', [last_tile, lambda t: t.select(0, 0).fill_(float('nan'))], ids=['tile', 'nan'])
@pytest.mark.parametrize('name,training', [(name, training) for training in COMPUTED for name in COMPUTED[training]])
def test_wrong_results_are_seen(name, training, change, monkeypatch):
    monkeypatch.setattr(check, '_SHAPES', check._SHAPES[:1])
    difference = check._difference(broken(name, change), *KIND, training)
    assert difference.startswith(f'{name} of ')


@pytest.mark.parametrize('training', [True, False], ids=['train', 'infer'])
def test_what_fails_is_not_used(monkeypatch, training):
    def fails(*args):
        raise RuntimeError('no kernel image is available for execution on the device')

    offer(
        monkeypatch, tail_triton=SimpleNamespace(forward=fails, backward=fails, infer=fails, norm_relu=fails),
        tail_torch=tail_torch)
    with pytest.warns(UserWarning, match=f'Triton kernels are not used for {"training" if training else "inf"}.* in '
                                         'float32 and contiguous_format on cpu, .* RuntimeError: no kernel image'):
        assert check.implementation(MAP, training) is tail_torch
    with warnings.catch_warnings():
        warnings.simplefilter('error')  # one warning
        assert check.implementation(MAP, training) is tail_torch


def test_nothing_is_right(monkeypatch):
    """Then blocks run module by module."""
    offer(monkeypatch, tail_triton=broken('out', last_tile), tail_torch=broken('x', last_tile))
    with pytest.warns(UserWarning) as record:
        assert check.implementation(MAP, True) is None
    assert ['Triton kernels are not used' in str(record[0].message), 'PyTorch operations' in str(record[1].message)]
    assert len(record) == 2


@pytest.mark.parametrize('found', [None, tail_torch], ids=['nothing', 'something'])
@pytest.mark.parametrize('training', [True, False], ids=['train', 'infer'])
def test_blocks_run_as_one_operator_only_where_something_is_right(monkeypatch, training, found):
    """As if CPUs were to be checked."""
    kinds, calls = [], []

    def record(name):
        function = getattr(fusion, name)
        monkeypatch.setattr(fusion, name, lambda *args, **kwargs: calls.append(name) or function(*args, **kwargs))

    def implementation(x, training):
        kinds.append((x.shape[1], training))
        return found

    torch.manual_seed(0)
    block = timm.create_model('cbam_resnet50', zero_init_last=False).train(training).layer1[1]
    x = torch.randn(2, 256, 8, 8)
    with torch.set_grad_enabled(training):
        expected = block(x)
        monkeypatch.setitem(check.DTYPES, 'cpu', (torch.float32,))
        monkeypatch.setattr(check, 'implementation', implementation)
        record('cbam_tail')
        record('norm_relu_')
        out = block(x)
    torch.testing.assert_close(out, expected)
    assert kinds == [(64, False)] * (0 if training else 2) + [(256, training)]
    assert calls == (['norm_relu_'] * len(kinds[1:]) + ['cbam_tail'] if found else [])


def test_once_in_a_process(monkeypatch):
    started, chosen = threading.Barrier(8), []

    def choose(*kind):
        chosen.append(kind)
        return tail_torch

    def ask():
        started.wait()
        assert check.implementation(MAP, True) is tail_torch

    monkeypatch.setattr(check, '_choose', choose)
    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert chosen == [(*KIND, True)]


def test_graph_capture_sees_no_check(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: True)
    monkeypatch.setattr(check, '_choose', lambda *kind: pytest.fail('checked'))
    assert check.implementation(SimpleNamespace(
        device=torch.device('cuda', 0), dtype=torch.float32, is_cuda=True, is_contiguous=lambda: True), True) is None
    assert not check._CHOSEN


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize('dtype', check._HALF, ids=str)
@pytest.mark.parametrize('training', [True, False], ids=['train', 'infer'])
def test_torch_operations_need_no_particular_device(training, dtype, memory_format):
    """On meta nothing can be looked at, and what has no kernel for all devices fails."""
    maps, parameters = check._problem((2, 80, 7, 7), dtype)
    found = check._compute(tail_torch, maps, parameters, training, torch.device('meta'), dtype, memory_format)
    expected = check._compute(tail_torch, maps, parameters, training, CPU, dtype, memory_format)
    for name, value in expected.items():
        assert found[name].shape == value.shape
        assert found[name].dtype == value.dtype
        assert found[name].stride() == value.stride()
