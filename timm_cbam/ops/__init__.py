"""The tail of a CBAM residual block as one operator"""
from . import check, tail_cpu
from .tail import Tail, cbam_tail, cbam_tail_ref, norm_relu_

__all__ = ['Tail', 'cbam_tail', 'cbam_tail_ref', 'check', 'norm_relu_', 'tail_cpu']
