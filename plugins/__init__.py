"""Plug-ins of the papers: for each the plain module, tensors in and tensors out, and its wiring, `...Plugin`."""

from __future__ import annotations

if __name__ != "vsrplug.plugins":
    raise ImportError(
        f"this folder is the package vsrplug.plugins, but was imported as {__name__!r}: every class would exist twice. "
        "Write `from vsrplug.plugins import ...`."
    )

from .efst import EFST, EFSTPlugin, SpatioTemporalFusion
from .flow_guided_deformable_alignment import FlowGuidedDeformableAlignment, FlowGuidedDeformableAlignmentPlugin
from .gaussian_cross_frame_attention import GaussianCrossFrameAttention, GaussianCrossFrameAttentionPlugin
from .image_cleaning import ImageCleaning, ImageCleaningPlugin, cleaning_loss
from .latent_attention import LatentAttention, LatentAttentionPlugin
from .long_range_attention import LongRangeAttention
from .memory_bank import MemoryBank, MemoryBankPlugin
from .residual_convolutions import ResidualConvolutions, ResidualConvolutionsPlugin
from .second_order_propagation import SecondOrderPropagation, SecondOrderPropagationPlugin, compose_flows
from .seem import SEEM, SEEMPlugin, SemanticRepresentation
from .short_range_attention import ShortRangeAttention

__all__ = [
    "EFST",
    "SEEM",
    "EFSTPlugin",
    "FlowGuidedDeformableAlignment",
    "FlowGuidedDeformableAlignmentPlugin",
    "GaussianCrossFrameAttention",
    "GaussianCrossFrameAttentionPlugin",
    "ImageCleaning",
    "ImageCleaningPlugin",
    "LatentAttention",
    "LatentAttentionPlugin",
    "LongRangeAttention",
    "MemoryBank",
    "MemoryBankPlugin",
    "ResidualConvolutions",
    "ResidualConvolutionsPlugin",
    "SEEMPlugin",
    "SecondOrderPropagation",
    "SecondOrderPropagationPlugin",
    "SemanticRepresentation",
    "ShortRangeAttention",
    "SpatioTemporalFusion",
    "cleaning_loss",
    "compose_flows",
]
