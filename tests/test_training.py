"""What timm's train.py, validate.py and avg_checkpoints.py do with a model, through the functions that they call

The scripts are not part of the timm package, so CI cannot run them; README.md says how they were tried.
"""
import copy
import os

import pytest
import timm
import torch
import torch.multiprocessing as mp
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.layers import convert_sync_batchnorm
from timm.models import load_checkpoint, resume_checkpoint, safe_model_name
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver, ModelEmaV3, random_seed
from torch import nn
from torch.nn import functional as F

MODEL = dict(model_name='cbam_resnet18_s1', num_classes=10, in_chans=1, channels=(16, 32, 64, 128))


def train(model, optimizer, batches, amp=False):
    model.train()
    losses = []
    for x, target in batches:
        with torch.autocast('cpu', dtype=torch.bfloat16, enabled=amp):
            loss = F.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.fixture(scope='module')
def batches():
    """Handwritten digits, eight batches of 32."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = torch.tensor(digits.images[:256, None], dtype=torch.float32) / 16 - 0.5
    return list(zip(x.split(32), torch.tensor(digits.target[:256]).split(32), strict=True))


@pytest.mark.parametrize('amp', [False, True])
@pytest.mark.parametrize('channels_last', [False, True])
def test_learns(batches, amp, channels_last):
    random_seed(0)
    model = timm.create_model(**MODEL)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    optimizer = create_optimizer_v2(model, opt='adamw', lr=2e-3)
    losses = [loss for _ in range(4) for loss in train(model, optimizer, batches, amp)]
    assert sum(losses[-8:]) < 0.7 * sum(losses[:8])
    # after the first step the last batch-norms are no longer zero: every gate learns
    before = copy.deepcopy(model.state_dict())
    train(model, optimizer, batches[:1], amp)
    still = [k for k, v in model.state_dict().items() if '.se.' in k and torch.equal(v, before[k])]
    assert not still


def test_resume_is_exact(batches, tmp_path):
    """Two epochs at a stretch, or one, a checkpoint, and another: the same weights."""
    def setup():
        random_seed(0)
        model = timm.create_model(**MODEL)
        optimizer = create_optimizer_v2(model, opt='sgd', lr=0.05, momentum=0.9)
        return model, optimizer, ModelEmaV3(model, decay=0.9)

    straight, optimizer, _ = setup()
    train(straight, optimizer, batches)
    train(straight, optimizer, batches)

    model, optimizer, ema = setup()
    train(model, optimizer, batches)
    ema.update(model)
    saver = CheckpointSaver(model, optimizer, model_ema=ema, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path))
    saver.save_checkpoint(epoch=0, metric=1.)

    resumed, optimizer, _ = setup()
    assert resume_checkpoint(resumed, str(tmp_path / 'last.pth.tar'), optimizer, log_info=False) == 1
    train(resumed, optimizer, batches)
    assert all(torch.equal(v, straight.state_dict()[k]) for k, v in resumed.state_dict().items())

    # validate.py --checkpoint, with the average's weights and without
    for use_ema, source in ((True, ema.module), (False, model)):
        validated = timm.create_model(**MODEL)
        load_checkpoint(validated, str(tmp_path / 'last.pth.tar'), use_ema=use_ema)
        assert all(torch.equal(v, source.state_dict()[k]) for k, v in validated.state_dict().items())


def test_scheduler_and_layer_decay():
    model = timm.create_model(**MODEL)
    optimizer = create_optimizer_v2(model, opt='adamw', lr=1e-3, layer_decay=0.5)
    scheduler, epochs = create_scheduler_v2(optimizer, num_epochs=3, warmup_epochs=1)
    scheduler.step(1)
    scales = {g['lr_scale'] for g in optimizer.param_groups}
    assert epochs == 3 and len(scales) > 5  # stem, blocks and head each have a scale
    gates = {id(p) for n, p in model.named_parameters() if '.se.' in n}
    assert gates <= {id(p) for g in optimizer.param_groups for p in g['params']}


def test_sync_bn_conversion():
    model = convert_sync_batchnorm(timm.create_model('cbam_resnet18_eccv18'))
    assert not any(type(m) is nn.BatchNorm2d for m in model.modules())
    assert isinstance(model.layer1[0].se.spatial.bn, nn.SyncBatchNorm)


def test_names_and_data_config():
    model = timm.create_model('cbam_resnet50_s1', num_classes=3)
    assert safe_model_name('cbam_resnet50_s1') == 'cbam_resnet50_s1'
    assert resolve_data_config({}, model=model)['input_size'] == (3, 32, 32)


def _worker(rank, port, batches, file):
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    torch.distributed.init_process_group('gloo', rank=rank, world_size=2)
    random_seed(0)
    model = timm.create_model(**MODEL)
    ddp = nn.parallel.DistributedDataParallel(model)
    optimizer = create_optimizer_v2(ddp, opt='sgd', lr=0.05)
    losses = [loss for _ in range(3) for loss in train(ddp, optimizer, batches[rank::2])]
    assert sum(losses[-4:]) < sum(losses[:4])
    state_dict = {f'module.{k}': v for k, v in model.state_dict().items()}
    torch.save({'state_dict': state_dict}, f'{file}{rank}')
    torch.distributed.destroy_process_group()


def test_two_processes(batches, tmp_path):
    """Where train.py stops on CPU for every model, timm's too: it passes device_ids=[cpu] to
    DistributedDataParallel."""
    import socket

    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    mp.spawn(_worker, args=(port, batches, str(tmp_path / 'rank')), nprocs=2)
    models = [timm.create_model(**MODEL) for _ in range(2)]
    for rank, model in enumerate(models):
        load_checkpoint(model, str(tmp_path / f'rank{rank}'))
    weights = [dict(m.named_parameters()) for m in models]
    assert all(torch.equal(p, weights[1][name]) for name, p in weights[0].items())


def test_image_folder_loader(tmp_path):
    from PIL import Image

    for label in '01':
        (tmp_path / 'train' / label).mkdir(parents=True)
        Image.new('RGB', (40, 48), int(label) * 255).save(tmp_path / 'train' / label / 'a.png')
    model = timm.create_model('cbam_resnet18_s1', num_classes=2)
    loader = create_loader(
        create_dataset('', root=str(tmp_path), split='train'), batch_size=2, num_workers=0, persistent_workers=False,
        device=torch.device('cpu'), **{
            k: v for k, v in resolve_data_config({}, model=model).items() if k in ('input_size', 'mean', 'std')})
    (x, target), = loader
    assert x.shape == (2, 3, 32, 32) and model(x).shape == (2, 2) and target.tolist() == [0, 1]
