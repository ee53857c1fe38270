from .cbam_residual import cbam_residual, cbam_residual_ref, is_fusable
from .compiled import batch_norm_compiled
from .tail_cpu import batch_norm

__all__ = ['batch_norm', 'batch_norm_compiled', 'cbam_residual', 'cbam_residual_ref', 'is_fusable']
