"""The detectors: bases, encoders and the parts they are composed of."""

from .attention import MSDeformAttn
from .backbone import StagedBackbone, build_dilated_resnet, build_resnet_d, build_swin
from .budgets import ImageBudgets, MeanRatio, TokenRankings
from .cascade import CascadeEncoder, DualAttentionLayer
from .criterion import Predictions, SetCriterion
from .decoder import DecoderOutput, DeformableDecoder, DeformableDecoderLayer
from .denoising import ContrastiveDenoising
from .detectors import DINO, RTDETR, DeformableDETR, FocusDETR, LiteDETR, SalienceDETR, SparseDETR
from .elastic import KeepRatios
from .encoder import DeformableEncoderLayer, DenseEncoder, Encoder, EncoderLayer, EncoderOutput, LayerInput
from .encoders import *  # noqa: F403  all encoders
from .encoders import __all__ as _encoders
from .fusion import FusionNeck
from .heads import DetectionHeads
from .hybrid import HybridQueries
from .layers import ChannelMapper, SinePosition, clone_layers
from .matcher import HungarianMatcher, Target
from .meta_arch import SetDetector
from .packing import pack_weights
from .proposals import LearnedQueries, MixedQueries, ProposalHead, ProposalQueries
from .selection import TokenRange, TokenScorer, TokenSet, keep_best, keep_best_of_levels
from .timm_backbone import TimmBackbone, timm_channels
from .tokens import Tokens
from .transformer import DetectionTransformer, TransformerOutput

__all__ = [
    "DINO",
    "CascadeEncoder",
    "ChannelMapper",
    "ContrastiveDenoising",
    "DecoderOutput",
    "DeformableDETR",
    "DeformableDecoder",
    "DeformableDecoderLayer",
    "DeformableEncoderLayer",
    "DenseEncoder",
    "DetectionHeads",
    "DetectionTransformer",
    "DualAttentionLayer",
    "Encoder",
    "EncoderLayer",
    "EncoderOutput",
    "FocusDETR",
    "FusionNeck",
    "HungarianMatcher",
    "HybridQueries",
    "ImageBudgets",
    "KeepRatios",
    "LayerInput",
    "LearnedQueries",
    "LiteDETR",
    "MSDeformAttn",
    "MeanRatio",
    "MixedQueries",
    "Predictions",
    "ProposalHead",
    "ProposalQueries",
    "RTDETR",
    "SalienceDETR",
    "SetCriterion",
    "SetDetector",
    "SinePosition",
    "SparseDETR",
    "StagedBackbone",
    "Target",
    "TimmBackbone",
    "Tokens",
    "TransformerOutput",
    "TokenRange",
    "TokenRankings",
    "TokenScorer",
    "TokenSet",
    "build_dilated_resnet",
    "build_resnet_d",
    "build_swin",
    "clone_layers",
    "keep_best",
    "keep_best_of_levels",
    "pack_weights",
    "timm_channels",
]
__all__ += _encoders
