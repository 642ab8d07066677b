"""Deformable DETR with iterative refinement and two stages, and its efficient initialisation.

``model`` is the two-stage model of Deformable DETR; ``efficient`` starts queries from the chosen
tokens themselves ("top-k & box refinement", the dense base of Sparse DETR).
"""

import copy

from detectron2.config import LazyCall as L

from sparse_detr.modeling import ProposalHead, ProposalQueries

from .deformable_detr import model

model.transformer.decoder.refine = True
model.transformer.heads.share = False
model.transformer.heads.size_logit = 0.0
model.transformer.proposal_head = L(ProposalHead)(
    embed_dim="${model.transformer.embed_dim}",
    num_classes="${model.num_classes}",
    class_agnostic=True,
)
model.transformer.query_selection = L(ProposalQueries)(
    embed_dim="${model.transformer.embed_dim}",
    num_queries=300,
    content_from_memory=False,
    skip_invalid="${model.exact_sizes}",
)

efficient = copy.deepcopy(model)
efficient.transformer.proposal_head.class_agnostic = False
efficient.transformer.query_selection.content_from_memory = True
