#!/usr/bin/env bash
# Everything a machine with a GPU can tell about the CUDA kernels, in one command of under 10 minutes; better
# in five, each with these 10 minutes for a part: --part correctness, operators, models, batches, learning.
#
#   benchmarks/gpu_check.sh             needs torch with CUDA and nvcc; nothing is downloaded
#   benchmarks/gpu_check.sh --dry-run   without a GPU: builds for sm_90, runs the same scripts on the CPU
#   benchmarks/gpu_check.sh --pack      on a machine with detectron2: collects in .gpu_check/ what a bare
#                                       machine lacks (git ignores the folder: carry it along)
#     --pack --photos FOLDER              and what the stage photos trains with: train.json, train/, val.json,
#                                       val/ and backbone.npz, an ImageNet ResNet-50
#     --pack --published OPS              and the published kernel: models/ops of Deformable DETR's repository
#     --pack --without NAME ...           leaves out packages that are there
#   --part PART                         stages of one part
#   --only A,B  --skip A,B              stages, by name
#   --budget SECONDS                    of the whole run (570)
#
# Writes gpu_check.md, gpu_check.json and log.txt (of a part: PART/...) to $OUT, else to docs/benchmarks/gpu
# (dry run: to a temporary folder), anew after every stage: a run that is cut off keeps what it had. Every
# stage has a time limit, and one that fails does not stop the others. Exit status: 0 if none failed. PYTHON
# chooses the interpreter.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

DRY= ONLY= SKIP= BUDGET=570 PACK= PART=
while [ $# -gt 0 ]; do
  case $1 in
    --dry-run) DRY=1 ;;
    --pack) PACK=1; shift; break ;;
    --part) PART=$2; shift ;;
    --only) ONLY=$2; shift ;;
    --skip) SKIP=$2; shift ;;
    --budget) BUDGET=$2; shift ;;
    *) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; exit 2 ;;
  esac
  shift
done
case $PART in
  '') ;;
  correctness) ONLY=machine,packages,build,tests,model_tests,memcheck,racecheck ;;
  operators) ONLY=machine,packages,build,targets,micro,peers,op,op_bf16 ;;
  models) ONLY=machine,packages,build,model,model_dino ;;
  batches) ONLY=machine,packages,build,batch,batch_dino,compile ;;
  learning) ONLY=machine,packages,build,learn,photos ;;
  *) echo "--part $PART: expected correctness, operators, models, batches or learning" >&2; exit 2 ;;
esac
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  [ -x .venv/bin/python ] && PYTHON=$PWD/.venv/bin/python
fi
if [ -n "$PACK" ]; then exec "$PYTHON" benchmarks/gpu/pack.py .gpu_check "$@"; fi

SCRATCH=$(mktemp -d)
trap 'rm -rf "$SCRATCH"' EXIT
TARGET=${OUT:-docs/benchmarks/gpu} RESULTS=$SCRATCH/results
[ -n "$DRY" ] && TARGET=${OUT:-$SCRATCH/out}
[ -n "$PART" ] && TARGET=$TARGET/$PART
mkdir -p "$TARGET" "$RESULTS"
LOG=$TARGET/log.txt STAGES=$SCRATCH/stages.tsv
: >"$LOG"; : >"$STAGES"
DEVICE=cuda; [ -n "$DRY" ] && DEVICE=cpu
export DRY PYTHON SCRATCH RESULTS TARGET DEVICE PYTHONUNBUFFERED=1
export PYTHONPATH=$PWD/projects:$SCRATCH/site PYTHONDONTWRITEBYTECODE=1
if [ -n "$DRY" ]; then export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}; fi

wanted() { # NAME
  case ,$SKIP, in *,"$1",*) return 1 ;; esac
  case $ONLY in '') return 0 ;; esac
  case ,$ONLY, in *,"$1",*) return 0 ;; *) return 1 ;; esac
}

# Runs the function NAME. It exits with 77 to say that it does not apply; its last line says why.
stage() { # NAME SECONDS
  local name=$1 limit=$2 left=$((BUDGET - SECONDS)) begin=$SECONDS code output=$SCRATCH/$1.log state
  wanted "$name" || return 0
  [ "$limit" -gt "$left" ] && limit=$left
  if [ "$limit" -lt 5 ]; then
    code=124; echo 'no time left' >"$output"
  else
    timeout --kill-after=5 "$limit" bash -c "set -eo pipefail; run_$name" >"$output" 2>&1 </dev/null
    code=$?
  fi
  case $code in 0) state=passed ;; 77) state=skipped ;; 124 | 137) state='timed out' ;; *) state=failed ;; esac
  { echo "==== $name: $state ($code)"; cat "$output"; } >>"$LOG"
  printf '%s\t%s\t%s\t%s\n' "$name" "$state" "$((SECONDS - begin))" \
    "$(grep -v '^\s*$' "$output" | tail -n 1 | cut -c1-300 | tr '\t' ' ')" >>"$STAGES"
  "$PYTHON" benchmarks/gpu/summary.py "$STAGES" "$RESULTS" "$TARGET" ${DRY:+--dry-run} || exit 1
  printf '%-12s %-9s %4d s  ' "$name" "$state" "$((SECONDS - begin))"
  if [ "$state" = passed ]; then tail -n 1 "$STAGES" | cut -f4 | cut -c1-90; else tail -n 8 "$output"; fi
}

skip() { echo "$*"; exit 77; }
export -f skip

run_machine() { "$PYTHON" benchmarks/gpu/machine.py "$RESULTS/machine.json"; }

run_packages() { # only what is not here already
  "$PYTHON" benchmarks/gpu/pack.py --use .gpu_check/site "$SCRATCH/site"
}

run_build() {
  [ -n "$DRY" ] && export TORCH_CUDA_ARCH_LIST=9.0
  SPARSE_DETR_OPS=cuda MAX_JOBS=${MAX_JOBS:-8} "$PYTHON" -m sparse_detr.kernels
}

run_tests() {
  "$PYTHON" -m pytest -q --tb=short --maxfail=20 -p no:cacheprovider tests/kernels/test_device.py \
    -k "$DEVICE${DRY:+ and float32}"
}

has_detectron2() {
  "$PYTHON" -c 'import detectron2, pycocotools' 2>/dev/null || skip 'no detectron2 (benchmarks/gpu_check.sh --pack)'
}
export -f has_detectron2

run_model_tests() { # float64, float32, bfloat16 and float16; forward, losses, gradients
  has_detectron2
  "$PYTHON" -m pytest -q --tb=short --maxfail=20 -p no:cacheprovider \
    tests/modeling/test_model_on_device.py tests/engine/test_trainer.py -k "$DEVICE or float16"
}

run_peers() { # each beside ours, never instead of it: one that does not build is left out
  local peers=.gpu_check/peers works=
  ls $peers/* >/dev/null 2>&1 || skip "no peers in $peers"
  [ -n "$DRY" ] && skip 'built only where there is a GPU'
  export FORCE_CUDA=1 MAX_JOBS=${MAX_JOBS:-8}
  if [ -z "${CUDA_HOME:-}" ] && [ -d /usr/local/cuda ]; then export CUDA_HOME=/usr/local/cuda; fi
  "$PYTHON" benchmarks/gpu/published.py build $peers/published "$SCRATCH/site" || true
  "$PYTHON" -m pip install -q --no-index --no-deps --no-build-isolation --no-compile \
    --target "$SCRATCH/site" $peers/*.tar.gz || true
  for module in MultiScaleDeformableAttention torch_ms_deform_attn deformops.registry; do
    if "$PYTHON" -c "import torch, $module"; then works="$works $module"; fi
  done
  echo "to compare with:${works:- none}"
}

sanitize() { # TOOL
  if [ -n "$DRY" ]; then "$PYTHON" benchmarks/gpu/small.py --device cpu; return; fi
  command -v compute-sanitizer >/dev/null || skip 'no compute-sanitizer'
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 9 \
    --kernel-name kernel_substring=sparse_detr "$PYTHON" benchmarks/gpu/small.py --device cuda
}
run_memcheck() { sanitize memcheck; }
run_racecheck() {
  [ -n "$DRY" ] && skip 'memcheck has rehearsed it'
  sanitize racecheck
}
export -f sanitize

run_micro() {
  local nvcc=${CUDA_HOME:-/usr/local/cuda}/bin/nvcc
  [ -x "$nvcc" ] || nvcc=$(command -v nvcc) || skip 'no nvcc'
  "$nvcc" -O3 -std=c++17 -arch="$([ -n "$DRY" ] && echo sm_90 || echo native)" \
    benchmarks/gpu/micro.cu -o "$SCRATCH/micro"
  if [ -n "$DRY" ]; then echo 'compiled for sm_90'; return; fi
  "$SCRATCH/micro" "$RESULTS/micro.json"
}

run_targets() {
  "$PYTHON" benchmarks/gpu/targets.py --device "$DEVICE" --json "$RESULTS/targets.json" \
    ${DRY:+--scale 0.08 --rounds 2 --kinds dense 'decoder 300'}
}

benchmark() { # FILE ARGUMENTS...
  local file=$1; shift
  "$PYTHON" benchmarks/benchmark.py "$@" --device "$DEVICE" --json "$RESULTS/$file.json"
}
export -f benchmark
run_op() { benchmark op op --compile ${DRY:+--scale 0.1 --rounds 2 --kinds dense 'decoder 300'}; }
run_op_bf16() { benchmark op_bf16 op --dtype bfloat16 ${DRY:+--scale 0.1 --rounds 2 --kinds 'decoder 300'}; }
DENSE='Deformable DETR=deformable_detr/deformable_detr_r50_efficient_50ep'
SPARSE='Sparse DETR 10 %=sparse_detr/sparse_detr_r50_10_50ep'
SPARSE_30='Sparse DETR 30 %=sparse_detr/sparse_detr_r50_30_50ep'
DINO='DINO=dino/dino_r50_4scale_12ep'
FOCUS='Focus-DETR .5=focus_detr/focus_detr_r50_4scale_12ep'
FOCUS_3='Focus-DETR .3=focus_detr/focus_detr_r50_4scale_12ep model.transformer.encoder.keep_ratio=0.3'
LITE='Lite-DINO plain=lite_detr/lite_dino_plain_r50_h3l1_2p1x3_36ep'
LITE_KEYS='Lite-DINO key-aware=lite_detr/lite_dino_r50_h3l1_2p1x3_36ep'
RT_DETR='RT-DETR=rt_detr/rt_detr_r50_72ep'
export DENSE SPARSE SPARSE_30 DINO FOCUS FOCUS_3 LITE LITE_KEYS RT_DETR

detectors() { # FILE ARGUMENTS...: whole models in float32, tf32 and bfloat16; Hugging Face's where installed
  has_detectron2
  local file=$1 peer=; shift
  if [ -n "$DRY" ]; then benchmark "$file" model --size 64x64 --rounds 2 --bf16 "$1"; return; fi
  "$PYTHON" -c 'import transformers' 2>/dev/null && peer=1
  benchmark "$file" model --size 800x1333 --bf16 --tf32 "$@" \
    ${peer:+--peer "Hugging Face Deformable DETR=benchmarks/peers.py:deformable_detr"} \
    ${peer:+--peer "Hugging Face RT-DETR=benchmarks/peers.py:rt_detr_r50"}
}
export -f detectors
run_model() { detectors model "$DENSE" "$SPARSE" "$SPARSE_30" --graph --train; }
run_model_dino() {
  detectors model_dino "$DINO" "$FOCUS" "$FOCUS_3" "$LITE" "$LITE_KEYS" "$RT_DETR" --graph --train
}
run_batch() { detectors batch "$DENSE" "$SPARSE" "$SPARSE_30" --batch 8 --train; }
run_batch_dino() {
  detectors batch_dino "$DINO" "$FOCUS" "$FOCUS_3" "$LITE" "$LITE_KEYS" "$RT_DETR" --batch 8 --rounds 5
}
run_compile() { detectors compile "$DENSE" "$SPARSE" --compile --rounds 5; }

run_learn() { # it learns on a GPU, and in mixed precision
  has_detectron2
  "$PYTHON" train_net.py --config-file configs/quick/sparse_detr_shapes.py train.output_dir="$SCRATCH/learn" \
    data.root="$SCRATCH/shapes" train.amp.enabled=true train.device="$DEVICE" ${DRY:+train.max_iter=2}
  grep -h 'AP50' "$SCRATCH/learn/log.txt" | tail -n 1
}
run_photos() { # AP of the methods on photographs of 640x480, in bfloat16; SEEDS: one takes most of the time
  local photos=.gpu_check/photos augment=dataloader.train.mapper.augmentations
  has_detectron2
  [ -d "$photos" ] || skip 'no photos (benchmarks/gpu_check.sh --pack --photos FOLDER)'
  [ -n "$DRY" ] && skip 'learning.py has a test of its own'
  "$PYTHON" benchmarks/learning.py --json "$TARGET/photos.json" --output "$SCRATCH/photos" --seeds ${SEEDS:-42} \
    'dense=quick/deformable_detr_r50_custom' \
    'Sparse DETR .1=quick/sparse_detr_r50_custom model.transformer.encoder.keep_ratio=0.1' \
    'Sparse DETR .3=quick/sparse_detr_r50_custom' \
    'Sparse DETR elastic=quick/sparse_detr_r50_custom model.transformer.encoder.elastic=[0.05,1]' \
    'Focus-DETR .5=quick/focus_detr_r50_custom' 'Lite-DINO=quick/lite_dino_r50_custom' --keep-ratio 0.1 0.3 1 \
    --common train.device=cuda train.amp.enabled=true data.train_json=$photos/train.json \
    data.train_images=$photos/train data.val_json=$photos/val.json data.val_images=$photos/val \
    train.init_checkpoint="$photos/backbone.npz" dataloader.train.num_workers=8 \
    dataloader.test.mapper.augmentations.short_edge=480 dataloader.test.mapper.augmentations.max_size=800 \
    $augment.short_edges=[384,416,448,480,512] $augment.max_size=800 \
    $augment.pre_crop_short_edges=[400,480,560] $augment.crop_size=[320,480]
}
export -f run_machine run_packages run_build run_tests run_peers run_memcheck run_racecheck \
  run_micro run_targets run_op run_op_bf16 run_model_tests run_model run_model_dino run_batch run_batch_dino \
  run_compile run_learn run_photos

stage machine 30
stage packages 30
stage build $([ -n "$DRY" ] && echo 420 || echo 240)
stage tests 120
stage model_tests 120
stage targets 60
stage micro 60
stage peers 220
stage op 100
stage op_bf16 60
stage model 180
stage model_dino 300
stage batch 150
stage batch_dino 250
stage compile 200
stage learn 150
stage memcheck 60
stage racecheck 60
stage photos 500
echo "results: $TARGET, $SECONDS s"
! cut -f2 "$STAGES" | grep -qE 'failed|timed out'
