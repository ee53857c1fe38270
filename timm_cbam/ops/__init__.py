"""The tail of a CBAM residual block as one operator"""
from . import tail_cpu
from .tail import HAS_TRITON, Tail, cbam_tail, cbam_tail_ref, norm_relu_

__all__ = ['HAS_TRITON', 'Tail', 'cbam_tail', 'cbam_tail_ref', 'norm_relu_', 'tail_cpu']
