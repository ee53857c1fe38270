#!/usr/bin/env python3
"""Train with several processes, by four tools: a small CBAM-ResNet-18 on scikit-learn's handwritten digits

    python scripts/distributed.py single
    torchrun --nproc-per-node 2 scripts/distributed.py ddp
    torchrun --nproc-per-node 2 scripts/distributed.py fsdp2
    accelerate launch --num_processes 2 scripts/distributed.py accelerate
    python scripts/distributed.py lightning --processes 2

With GPUs each process takes one; without, they share the CPU (accelerate then wants `--cpu`). All print the same losses
with `--freeze-norms`. Otherwise each process normalises its own share of a batch, as with every network that has
batch-norms: `single --shares 2` computes the same in one process. On GPUs `convert_sync_batchnorm` makes it one batch.
"""
import argparse
import json
import os
from typing import Any, Callable, Dict, Iterable, List

import timm
import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

BATCH = 32  # of all processes together


def norms(model: nn.Module) -> List[nn.BatchNorm2d]:
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def create_model(args: argparse.Namespace) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(
        'cbam_resnet18_s1', num_classes=10, in_chans=1, channels=(16, 32, 64, 128), zero_init_last=False)
    if args.freeze_norms:  # at statistics that a pretrained network would bring along
        for m in norms(model):
            m.momentum = 1.
        model(create_dataset(8).tensors[0])
    return model


def create_optimizer(model: nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    # with frozen norms larger steps make the loss jump, and then rounding shows
    return torch.optim.SGD(model.parameters(), lr=0.002 if args.freeze_norms else 0.02, momentum=0.9)


def create_dataset(steps: int) -> TensorDataset:
    digits = load_digits()
    images = torch.tensor(digits.images[:BATCH * steps, None], dtype=torch.float32) / 16 - 0.5
    return TensorDataset(images, torch.tensor(digits.target[:BATCH * steps]))


def set_mode(model: nn.Module, freeze_norms: bool) -> None:
    """Training mode; frozen batch-norms use the statistics they have, whatever a process gets to see."""
    model.train()
    for m in norms(model):
        m.train(not freeze_norms)


def local_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device('cuda', int(os.environ.get('LOCAL_RANK', 0)))
    return torch.device('cpu')


def mean_over_processes(loss: torch.Tensor) -> float:
    loss = loss.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(loss)
        loss /= dist.get_world_size()
    return loss.item()


def train(
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loader: Iterable[Any],
        freeze_norms: bool,
        shares: int = 1,
        backward: Callable[[torch.Tensor], None] = torch.Tensor.backward,
) -> List[float]:
    """One epoch; returns the loss of each step, the mean over processes."""
    set_mode(model, freeze_norms)
    device = local_device()
    losses = []
    for images, targets in loader:
        images, targets = images.to(device), targets.to(device)
        total = images.new_zeros(())
        for i in range(shares):
            loss = F.cross_entropy(model(images[i::shares]), targets[i::shares]) / shares
            backward(loss)
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mean_over_processes(total))
    return losses


def single(args: argparse.Namespace) -> Dict[str, Any]:
    model = create_model(args).to(local_device())
    loader = DataLoader(create_dataset(args.steps), BATCH)
    losses = train(model, create_optimizer(model, args), loader, args.freeze_norms, args.shares)
    return dict(losses=losses, state_dict=model.state_dict())


def create_share_loader(steps: int) -> DataLoader:
    dataset = create_dataset(steps)
    return DataLoader(
        dataset, BATCH // dist.get_world_size(), sampler=DistributedSampler(dataset, shuffle=False))


def ddp(args: argparse.Namespace) -> Dict[str, Any]:
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group()
    device = local_device()
    model = create_model(args).to(device)
    parallel = DistributedDataParallel(model, device_ids=[device.index] if device.type == 'cuda' else None)
    losses = train(parallel, create_optimizer(parallel, args), create_share_loader(args.steps), args.freeze_norms)
    return dict(losses=losses, state_dict=model.state_dict())


def fsdp2(args: argparse.Namespace) -> Dict[str, Any]:
    from timm.models.resnet import BasicBlock, Bottleneck
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group()
    device = local_device()
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    model = create_model(args).to(device)
    for block in model.modules():
        if isinstance(block, (BasicBlock, Bottleneck)):
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    losses = train(model, create_optimizer(model, args), create_share_loader(args.steps), args.freeze_norms)
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return dict(losses=losses, state_dict=get_model_state_dict(model, options=whole))


def accelerate(args: argparse.Namespace) -> Dict[str, Any]:
    from accelerate import Accelerator

    accelerator = Accelerator()
    model = create_model(args)
    loader = DataLoader(create_dataset(args.steps), BATCH // accelerator.num_processes)
    parallel, optimizer, loader = accelerator.prepare(model, create_optimizer(model, args), loader)
    losses = train(parallel, optimizer, loader, args.freeze_norms, backward=accelerator.backward)
    return dict(losses=losses, state_dict=accelerator.get_state_dict(parallel))


def lightning(args: argparse.Namespace) -> Dict[str, Any]:
    import pytorch_lightning as pl

    class Classifier(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = create_model(args)
            self.losses: List[float] = []

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            set_mode(self.model, args.freeze_norms)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            images, targets = batch
            loss = F.cross_entropy(self.model(images), targets)
            self.losses.append(mean_over_processes(loss))
            return loss

        def train_dataloader(self) -> DataLoader:  # Lightning's own distributed sampler would shuffle
            return create_share_loader(args.steps)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return create_optimizer(self.model, args)

    classifier = Classifier()
    trainer = pl.Trainer(
        devices=args.processes, strategy='ddp', max_epochs=1, use_distributed_sampler=False, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(classifier)
    return dict(losses=classifier.losses, state_dict=classifier.model.state_dict())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tools = {tool.__name__: tool for tool in (single, ddp, fsdp2, accelerate, lightning)}
    parser.add_argument('tool', choices=list(tools))
    parser.add_argument('--steps', type=int, default=20, help='of training, with 32 images each')
    parser.add_argument('--freeze-norms', action='store_true', help='batch-norms keep their statistics')
    parser.add_argument('--shares', type=int, default=1, help='of a batch that `single` computes one after the other')
    parser.add_argument('--processes', type=int, default=1, help='that `lightning` starts')
    parser.add_argument('--save', metavar='FILE', help='state dict, for timm.create_model(checkpoint_path=FILE)')
    args = parser.parse_args()
    result = tools[args.tool](args)
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(json.dumps(result['losses']))
        if args.save:
            torch.save(result['state_dict'], args.save)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == '__main__':
    main()
