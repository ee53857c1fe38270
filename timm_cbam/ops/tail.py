"""The tail of a CBAM residual block as one operator: batch-norm, CBAM, shortcut and ReLU

What makes attention slow is not arithmetic but memory: maps that are written, read again, and kept for the backward
pass. :func:`cbam_tail` computes what :func:`cbam_tail_ref` says in fewer passes over the maps, and keeps nothing of
their size for the backward pass but x and its output, which a ResNet without attention keeps as well.

With F = batch_norm(x), F' = F * mc and F'' = F' * ms (paper section 3, https://arxiv.org/abs/1807.06521):

    pool_space:    x -> average and extrema over space             -> mc = sigma(W1 relu(W0 avg F) + W1 relu(W0 max F))
    pool_channels: x, mc -> average and maximum of F' over C       -> ms = sigma(conv7x7), * stochastic depth's factor
    gate_add:      x, mc, ms, shortcut -> relu(shortcut + F'')

F, F' and F'' follow from x, and so do their gradients. With g the gradient of the sum before the ReLU:

    a: g, dms = sum_C g * F'          -> gradient of the convolution: davg, dmax per pixel
    b: dF' = g * ms + davg / C + dmax * [F' is the maximum] / ties, of which only sums over space are needed: of dF' and
       of dF' * (x - mean); dmc = sum_HW dF' * F follows from them       -> gradient of the MLP: davg, dmax per channel
    c: dF = dF' * mc + davg / HW + dmax * [F is the maximum] / ties, dx by batch-norm's rule

Where a maximum is reached several times all of these places share its gradient equally, as with torch.amax.

Contract: first derivatives of any subset of the inputs are right in every graph; the one autograd node shares nothing
with others. Where the backward pass itself is differentiated (create_graph=True) or transformed, the reference is what
it differentiates. Results are at least as accurate as those of the reference in the same dtype, and the same each time.
"""
from types import ModuleType
from typing import List, Optional

import torch
import torch.nn.functional as F

from . import check, tail_cpu, tail_torch
from .arguments import Gradients, Results, Tail, accumulation_dtype, dense, gradient_shapes, result_shapes

__all__ = ['Tail', 'cbam_tail', 'cbam_tail_ref', 'norm_relu_']


def _branch_ref(x: torch.Tensor, p: Tail) -> torch.Tensor:
    """F'', with weights in the dtype of x as under autocast"""
    mean, var = (None, None) if p.training else (p.mean, p.var)
    f = F.batch_norm(x, mean, var, p.weight, p.bias, p.training, 0., p.eps)
    w0, b0, w1, b1, kernel = (
        None if t is None else t.to(x.dtype) for t in (
            p.fc1_weight, p.fc1_bias, p.fc2_weight, p.fc2_bias, p.conv_weight))
    pooled = torch.cat([f.mean((2, 3), keepdim=True), f.amax((2, 3), keepdim=True)], dim=3)
    f = f * F.conv2d(F.relu(F.conv2d(pooled, w0, b0)), w1, b1).sum(dim=3, keepdim=True).sigmoid()
    pooled = torch.cat([f.mean(1, keepdim=True), f.amax(1, keepdim=True)], dim=1)
    z = F.conv2d(pooled, kernel, padding=kernel.shape[-1] // 2)
    if p.bn_weight is not None:
        mean, var = (None, None) if p.bn_training else (p.bn_mean, p.bn_var)
        z = F.batch_norm(z, mean, var, p.bn_weight, p.bn_bias, p.bn_training, 0., p.bn_eps)
    f = f * z.sigmoid()
    return f if p.factor is None else f * p.factor


def cbam_tail_ref(x: torch.Tensor, shortcut: torch.Tensor, p: Tail) -> torch.Tensor:
    """Reference of :func:`cbam_tail`; the running statistics stay as they are."""
    with torch.autocast(x.device.type, enabled=False):
        return F.relu(shortcut + _branch_ref(x, p))


def _implementation(x: torch.Tensor, training: bool) -> ModuleType:
    """The module that does the work: same functions, same results."""
    if tail_cpu.supports(x):
        return tail_cpu
    checked = check.implementation(x, training) if x.device.type in check.DTYPES else None
    return checked or tail_torch


_TENSORS = Tail._fields.index('training')  # that many come first, then flags
_ARGUMENTS = 2 + len(Tail._fields)  # of the operator: x, shortcut, and these
_BIASES = tuple(Tail._fields.index(name) for name in ('bias', 'fc1_bias', 'fc2_bias', 'bn_bias'))


# ---- the operator as PyTorch's dispatcher, autograd and compiler know it

_PARAMETERS = (
    'Tensor weight, Tensor bias, Tensor mean, Tensor var, Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, '
    'Tensor? fc2_bias, Tensor conv_weight, Tensor? bn_weight, Tensor? bn_bias, Tensor? bn_mean, Tensor? bn_var, '
    'Tensor? factor, bool training, float eps, bool bn_training, float bn_eps')


def _outputs(cls) -> str:
    return ', '.join(f'Tensor {name}_' for name in cls._fields)


_SCHEMAS = {
    'tail': f'(Tensor x, Tensor shortcut, {_PARAMETERS}) -> (Tensor out, {_outputs(Results)})',
    'tail_backward':
        f'(Tensor grad, Tensor x, Tensor out, {_PARAMETERS}, Tensor[] results) -> ({_outputs(Gradients)})',
    'tail_': f'(Tensor(a!) x, Tensor shortcut, {_PARAMETERS}) -> ()',
}


def _forward(x, shortcut, *parameters):
    x = dense(x)
    out = torch.empty_like(x)
    return out, *_implementation(x, True).forward(x, dense(shortcut, x), out, Tail(*parameters))


def _forward_fake(x, shortcut, *parameters):
    p = Tail(*parameters)
    dtype = accumulation_dtype(x)
    return torch.empty_like(dense(x)), *(x.new_empty(shape, dtype=dtype) for shape in result_shapes(x, p))


def _backward(grad, x, out, *args):
    *parameters, results = args
    x = dense(x)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):  # whatever is on where the backward pass runs
        return _implementation(x, True).backward(dense(grad, x), x, dense(out, x), Tail(*parameters), Results(*results))


def _backward_fake(grad, x, out, *args):
    x, dtype = dense(x), accumulation_dtype(x)
    small = (x.new_empty(shape, dtype=dtype) for shape in gradient_shapes(Tail(*args[:-1])))
    return torch.empty_like(x), torch.empty_like(x), *small


def _infer(x, shortcut, *parameters):
    map_ = dense(x)
    _implementation(x, False).infer(map_, dense(shortcut, map_), Tail(*parameters))
    if map_ is not x:
        x.copy_(map_)


def _nothing(*args):
    pass


def _save(ctx, x, out, parameters, results) -> None:
    ctx.set_materialize_grads(False)
    # As with plain operations a bias may be written to before the backward pass, its values are among the results, and
    # a running statistic may not, but by the operator itself.
    tensors = [t for i, t in enumerate(parameters[:_TENSORS]) if i not in _BIASES]
    ctx.save_for_backward(x, out, *tensors, *results)
    ctx.biases = [parameters[i] for i in _BIASES]
    ctx.flags = parameters[_TENSORS:]


def _setup_context(ctx, inputs, output):
    x, _, *parameters = inputs
    out, *results = output
    ctx.mark_non_differentiable(*results)
    # Compiled code writes to the running statistics where everybody sees it.
    _save(ctx, x, out, Tail(*parameters)._replace(mean=None, var=None, bn_mean=None, bn_var=None), results)


def _is_transformed(grad: torch.Tensor) -> bool:
    """Whether the backward pass is itself differentiated, batched or traced, and has to consist of plain operations."""
    if torch.compiler.is_compiling():
        return torch.is_grad_enabled()
    return (
        torch.is_grad_enabled()
        or type(grad) is not torch.Tensor
        or torch._C._functorch.is_legacy_batchedtensor(grad)
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0)


def _differentiate_reference(ctx, grad, x, out, p: Tail, r: Results) -> List[Optional[torch.Tensor]]:
    """Gradients in the order of the operator's arguments, by autograd"""
    mean, var = r.stats[:2].to(p.weight.dtype)
    p = p._replace(mean=mean, var=var)
    if p.bn_weight is not None:
        bn_mean, bn_var = r.bn_stats[:2].to(p.bn_weight.dtype)
        p = p._replace(bn_mean=bn_mean, bn_var=bn_var)
    inputs = (x, None, *p[:_TENSORS])
    wanted = [i for i, (t, needed) in enumerate(zip(inputs, ctx.needs_input_grad, strict=False)) if needed and i != 1]
    gradients: List[Optional[torch.Tensor]] = [None] * _ARGUMENTS
    gradients[1] = g = torch.ops.aten.threshold_backward(grad, out, 0)

    def branch(*values: torch.Tensor) -> torch.Tensor:
        given = dict(zip(wanted, values, strict=True))
        return _branch_ref(given.get(0, x), Tail(*(given.get(i + 2, t) for i, t in enumerate(p))))

    with torch.autocast(x.device.type, enabled=False):
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            found = torch.func.vjp(branch, *(inputs[i] for i in wanted))[1](g)
        else:
            create_graph = torch.is_grad_enabled()
            with torch.enable_grad():
                # views: what is wanted are derivatives with respect to these, not to what they were computed from
                views = [inputs[i].view_as(inputs[i]) for i in wanted]
                found = torch.autograd.grad(branch(*views), views, g, create_graph=create_graph) if wanted else ()
    for i, gradient in zip(wanted, found, strict=True):
        gradients[i] = gradient
    return gradients


def _autograd_backward(ctx, grad, *_):
    if grad is None:
        return (None,) * _ARGUMENTS
    x, out, *saved = ctx.saved_tensors
    count = _TENSORS - len(_BIASES)
    tensors, results = saved[:count], Results(*saved[count:])
    for i, bias in zip(_BIASES, ctx.biases, strict=True):
        tensors.insert(i, bias)
    p = Tail(*tensors, *ctx.flags)
    if _is_transformed(grad):
        return tuple(_differentiate_reference(ctx, grad, x, out, p, results))
    d = Gradients(*torch.ops.timm_cbam.tail_backward(grad, x, out, *p, results))
    bn_weight, bn_bias = (None, None) if p.bn_weight is None else d.bn.split(1)
    found = (
        d.weight, d.bias, None, None, d.fc1_weight, d.fc1_bias, d.fc2_weight, d.fc2_bias, d.conv_weight, bn_weight,
        bn_bias)
    gradients = [None if t is None or g is None else g.to(t.dtype) for g, t in zip(found, p, strict=False)]
    return d.x, d.shortcut, *gradients, *(None,) * (_ARGUMENTS - 2 - len(gradients))


def _update(running: torch.Tensor, value: torch.Tensor, momentum: float) -> None:
    """Unseen by autograd, and on CPU in double, as PyTorch does. Some devices have no double."""
    target = running if torch.compiler.is_compiling() else running.data
    if running.device.type == 'cpu':
        target.copy_(momentum * value.double() + (1 - momentum) * running.double())
    else:
        target.lerp_(value.to(running.dtype), momentum)


@torch.no_grad()
def _update_running(p: Tail, r: Results, numel: int, momentum: float, bn_momentum: float) -> None:
    """Running statistics of what is in training; `numel` is of the map."""
    for training, mean, var, stats, factor in (
            (p.training, p.mean, p.var, r.stats, momentum),
            (p.bn_training, p.bn_mean, p.bn_var, r.bn_stats, bn_momentum)):
        if training:
            n = numel // p.weight.shape[0]
            biased = stats[1].double() if stats.device.type == 'cpu' else stats[1]
            _update(mean, stats[0], factor)
            _update(var, biased * (n / (n - 1)), factor)


class TailFn(torch.autograd.Function):
    """The operator in eager mode. It updates running statistics where PyTorch's batch-norm does, before anything is
    saved for the backward pass: torch.utils.checkpoint may end the second forward pass there."""

    @staticmethod
    def forward(ctx, x, shortcut, *args):
        *parameters, momentum, bn_momentum = args
        x = dense(x)
        out, *results = _forward(x, shortcut, *parameters)
        _update_running(Tail(*parameters), Results(*results), x.numel(), momentum, bn_momentum)
        _save(ctx, x, out, parameters, results)
        return out

    @staticmethod
    def backward(ctx, grad):
        return *_autograd_backward(ctx, grad), None, None


def _define() -> torch.library.Library:
    # Not by torch.library.custom_op, which looks for its caller among all modules: half the time of an import.
    library = torch.library.Library('timm_cbam', 'FRAGMENT')
    for name, schema in _SCHEMAS.items():
        # any memory format: Inductor may keep the one in which the convolutions are fastest
        library.define(name + schema, tags=(torch.Tag.flexible_layout, torch.Tag.pt2_compliant_tag))
    for name, function, fake in (
            ('tail', _forward, _forward_fake), ('tail_backward', _backward, _backward_fake),
            ('tail_', _infer, _nothing)):
        library.impl(name, function, 'CompositeExplicitAutograd')
        library.impl(name, fake, 'Meta')
    torch.library.register_autograd(
        'timm_cbam::tail', _autograd_backward, setup_context=_setup_context, lib=library)
    return library


# A process that imports timm_cbam anew (notebooks do) finds the operators of the first time.
_LIBRARY = None if hasattr(torch.ops.timm_cbam, 'tail') else _define()


def cbam_tail(
        x: torch.Tensor,
        shortcut: torch.Tensor,
        p: Tail,
        momentum: float = 0.1,
        bn_momentum: float = 0.01,
        inplace: bool = False,
) -> torch.Tensor:
    """``relu(shortcut + F'')`` with ``F = batch_norm(x)``, ``F' = F * Mc(F)``, ``F'' = F' * Ms(F')`` (paper section 3).

    In training the running statistics of `p` are updated.

    Args:
        x: Output of the block's last convolution, (B, C, H, W), not empty: float32, float64, bfloat16, on CUDA float16.
        shortcut: Input of the block or its downsampled form, (B, C, H, W), of the same dtype.
        p: All that the block's modules hold; of the dtype of x, or float32 for maps of lower precision.
        momentum: Of the batch-norm's running statistics.
        bn_momentum: Of the spatial batch-norm's.
        inplace: x may be overwritten if no gradient is computed.

    Returns:
        Output of the block, (B, C, H, W), in the memory format of x.
    """
    if inplace and not torch.is_grad_enabled() and not p.training and not p.bn_training:
        run = torch.ops.timm_cbam.tail_ if torch.compiler.is_compiling() else _infer
        run(x, shortcut, *p)
        return x
    with torch.autocast(x.device.type, enabled=False):
        if not torch.compiler.is_compiling():
            return TailFn.apply(x, shortcut, *p, momentum, bn_momentum)
        out, *results = torch.ops.timm_cbam.tail(x, shortcut, *p)
    _update_running(p, Results(*results), x.numel(), momentum, bn_momentum)
    return out


def norm_relu_(x, weight, bias, mean, var, eps: float, relu: bool) -> torch.Tensor:
    """Batch-norm in eval mode, on CPU with the bits of torch.nn.functional.batch_norm, and ReLU, in the place of x."""
    map_ = dense(x)
    _implementation(x, False).norm_relu(map_, weight, bias, mean, var, eps, relu)
    if map_ is not x:
        x.copy_(map_)
    return x
