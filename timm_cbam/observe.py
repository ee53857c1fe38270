"""Run a network to look at it, and leave no trace"""
from contextlib import contextmanager
from typing import Iterator, List

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

__all__ = ['observed']


@contextmanager
def observed(model: nn.Module) -> Iterator[List[RemovableHandle]]:
    """Eval mode, no gradients and no compiler; afterwards training flags are as they were.

    Yields:
        List for the handles of hooks, which are removed at the end.
    """
    training = {m: m.training for m in model.modules()}
    handles: List[RemovableHandle] = []
    try:
        for m in training:
            m.training = False
        with torch.no_grad(), torch.compiler.set_stance('force_eager'):
            yield handles
    finally:
        for handle in handles:
            handle.remove()
        for m, flag in training.items():
            m.training = flag
