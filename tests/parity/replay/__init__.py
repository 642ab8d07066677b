"""Replays of parity cases: what a published implementation computed, computed again here.

``case`` reads a case and compares; one module per family of models rebuilds and runs it.
"""

from .case import Case


def find_replay(case: Case):
    """The function that replays ``case``, from its system and what its configuration holds."""
    from . import deformable, dino, lite, ops

    system, config = case.meta["system"], case.config
    if system in ("deformable_detr", "sparse_detr", "h_deformable_detr"):
        if "head_dim" in config:
            return ops.run_core
        if "reference_dim" in config:
            return ops.run_layer
        if "rho" in config and "queries" in config:
            return ops.run_attention_map
        return deformable.run
    if system.startswith(("dino", "focus_detr")):
        if "n_targets" in config:
            return dino.run_denoising
        return dino.run_labels if "layouts" in case.meta else dino.run
    if system == "lite_detr":
        if "reference_dim" in config:
            return lite.run_attention
        return lite.run if "backbone" in config else lite.run_encoder
    raise ValueError(f"{case.name}: unknown system {system!r}")
