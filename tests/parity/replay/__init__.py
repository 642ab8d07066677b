"""Replays of parity cases: what a published implementation computed, computed again here.

``case`` reads a case and compares; one module per family of models rebuilds and runs it.
"""

from .case import Case


def replay(case: Case) -> None:
    """Compute a case again and compare everything it stores; ``case.checks`` has the outcome.

    Raises:
        ValueError: nothing replays such a case, or an array was compared with nothing.
    """
    find_replay(case)(case)
    if unchecked := case.unchecked:
        raise ValueError(f"{case.name}: arrays {unchecked} were not compared")


def find_replay(case: Case):
    """The function that replays ``case``, from its system and what its configuration holds."""
    from . import deformable, dino, lite, ops, rt_detr, salience

    system, config = str(case.meta.get("system")), case.meta.get("config", {})
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
    if system == "salience_detr":
        if "layouts" in case.meta:
            return salience.run_neighbours if "iou_threshold" in config else salience.run_labels
        return salience.run_neck if "spatial_shapes" in config else salience.run
    if system == "rt_detr":
        return rt_detr.run
    raise ValueError(
        f"system {system!r} is not replayed here; known: deformable_detr, sparse_detr, h_deformable_detr, "
        "dino, focus_detr, lite_detr, salience_detr, rt_detr"
    )
