"""This project's detectors in detectron2's own scripts, unmodified.

    export DETECTRON2_ENV_MODULE=sparse_detr.detectron2_env
    python /path/to/detectron2/tools/train_net.py --config-file configs/yacs/sparse_detr_r50.yaml

detectron2 imports the module that the variable names and calls its ``setup_environment``
(``detectron2.utils.env``). From then on every ``get_cfg()`` has the node ``MODEL.SPARSE_DETR``, and
these detectors are optimised by AdamW; other models are trained as ever.
"""

import functools


def setup_environment() -> None:
    """Called by ``import detectron2``: nothing of it may be imported above."""
    import detectron2.engine.defaults
    import detectron2.solver.build
    from detectron2.config.defaults import _C

    from . import yacs

    yacs.add_node(_C)
    original = detectron2.solver.build.build_optimizer

    @functools.wraps(original)
    def build_optimizer(cfg, model):
        ours = isinstance(getattr(model, "module", model), yacs.SetDetector)
        return (yacs.build_optimizer if ours else original)(cfg, model)

    for module in (detectron2.solver.build, detectron2.solver, detectron2.engine.defaults):
        module.build_optimizer = build_optimizer
