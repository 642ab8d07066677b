"""The ``train`` section that every experiment starts from."""

train = dict(
    output_dir="./output",
    init_checkpoint="",  # weights to start from (or to evaluate); see engine/checkpoint.py
    device="auto",  # the GPU if there is one; or "cuda", "cpu"
    seed=42,  # -1 draws one
    epochs=50,
    max_iter=None,  # iterations; wins over epochs if set
    eval_period=None,  # iterations; None: once per epoch, 0: only at the end
    log_period=20,
    # Weights & Biases, beside the terminal, metrics.json and TensorBoard; params go to wandb.init
    wandb=dict(enabled=False, params=dict(project="sparse_detr", name=None, id=None)),
    checkpointer=dict(period=None, max_to_keep=5),  # iterations; None: every epoch, or so many as make 200
    # the weights with the best result, in model_best.pth
    best_checkpoint=dict(enabled=True, metric="bbox/AP", mode="max"),
    early_stop=dict(patience=None),  # stop after so many evaluations without a new best
    # evaluate and keep a moving average of the weights; warmup in iterations
    model_ema=dict(enabled=False, decay=0.9997, warmup=2000),
    # of a training with encoder.elastic: the share in which all images keep the middle ratio
    elastic_warmup=0.5,
    grad_accumulation=1,  # compute a batch in so many parts: less memory, same training
    eval_dtype="float32",  # precision of evaluations: "bfloat16"; "auto": where the hardware has it
    amp=dict(enabled=False, dtype="bfloat16"),  # or "float16" (GPU only)
    clip_grad=dict(enabled=True, max_norm=0.1),  # global L2 norm
    ddp=dict(broadcast_buffers=False, find_unused_parameters=False, fp16_compression=False),
)
