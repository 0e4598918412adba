#!/usr/bin/env bash
# The papers' claims in miniature, as trainings on generated data; docs/reproduce.md says what came out.
#
#   [SEEDS="0 1 2"] tools/reproduce.sh [cpu|gpu] [arguments of tools/compare.py run, such as --jobs 2 --threads 1]
#
# cpu: a quarter of ResNet-18, some hours of two cores. gpu: ResNet-50, larger images, more of them and more batch sizes.
# Stopped, killed: the same line goes on. The reports are in work_dirs/reproduce/*/report, of gpu in work_dirs/reproduce-gpu.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
preset=${1:-cpu}
case $preset in
    cpu)
        net=18 of='' out=work_dirs/reproduce batches=(2 16) largest=16 more=(--jobs 2 --threads 1)
        images=(--train 1600 --val 200 --size 128) images_cls=(--train 6000 --val 1200 --size 48) ;;
    gpu)
        net=50 of=-large out=work_dirs/reproduce-gpu batches=(2 4 8 16 32) largest=32 more=(--jobs 1)
        images=(--train 4000 --val 1000 --size 256) images_cls=(--train 20000 --val 3000 --size 64) ;;
    *)
        echo "tools/reproduce.sh $preset: must be cpu or gpu" >&2
        exit 2 ;;
esac
more+=("${@:2}")
read -d '' -ra seeds <<<"${SEEDS:-0 1 2}" || true
if [ ${#seeds[@]} = 0 ]; then
    echo 'tools/reproduce.sh: SEEDS is empty; write such as SEEDS="0 1 2"' >&2
    exit 2
fi
for argument in "${@:2}"; do
    case $argument in --seeds* | --out* | --norms* | --batch-sizes* | --variant*)
        echo "tools/reproduce.sh: ${argument%%=*} is its own; seeds are given by SEEDS=\"0 1 2\" before it" >&2
        exit 2 ;;
    esac
done
configs=configs/reproduce
head=$configs/faster-rcnn_r${net}_fpn_bn-head_shapes$of.py
all=$configs/faster-rcnn_r${net}_fpn_bn-all_shapes$of.py
failed=0

tool() { "${PYTHON:-python}" "tools/$1" "${@:2}"; }
# A training that failed ends its grid with status 1, and the next grid goes on. Pictures are made once, at the end.
always=(--images 0)
grid() {
    tool compare.py run "$1" --out "$out/$2" "${always[@]}" "${@:3}" --seeds "${seeds[@]}" "${more[@]}" || failed=1
}

tool make_shapes.py --out "data/shapes$of" "${images[@]}"
tool make_shapes.py --classification --out "data/shapes-cls$of" "${images_cls[@]}"

# The backbones: (b) and (c) on classifiers.
grid "$configs/resnet${net}_bn_shapes-cls$of.py" pretrain --norms bn gn mabn bnet5 an --batch-sizes 32
pretrained() { echo "model.backbone.init_cfg.checkpoint=$out/pretrain/$1-b32-s${seeds[0]}/epoch_7.pth"; }
if [ "${seeds[0]}" != 0 ]; then  # the configs name that of seed 0
    key=(--cfg-options)
    for i in "${!more[@]}"; do  # those of the caller, of which compare run takes the last
        if [ "${more[i]}" = --cfg-options ]; then
            more=("${more[@]:0:i+1}" "$(pretrained bn)" "${more[@]:i+1}") key=()
            break
        fi
    done
    if [ ${#key[@]} != 0 ]; then
        always+=("${key[@]}" "$(pretrained bn)")
    fi
fi

# (a) Batch norm, group norm and CBN in FPN and box head, at a small and a large batch.
grid "$head" bn-head --norms bn gn cbn --batch-sizes "${batches[@]}"
# (d) CBN at batch 2: earlier statistics as they are (rho=0), a longer window, and after the learning rate has dropped.
cbn() { for key in "$@"; do echo "model.neck.norm_cfg.$key" "model.roi_head.bbox_head.norm_cfg.$key"; done; }
# shellcheck disable=SC2046
grid "$head" bn-head --norms cbn --batch-sizes 2 --variant burnin4e=cbn $(cbn burnin=4e) \
    --variant naive=cbn $(cbn rho=0) --variant window15=cbn $(cbn buffer_num=15) \
    --variant naive-window15=cbn $(cbn buffer_num=15 rho=0)

# (a) The same with every norm in training mode, each from a backbone of its own.
gn=model.backbone.norm_cfg
grid "$all" bn-all --norms bn --batch-sizes "${batches[@]}" \
    --variant gn-all=gn "$(pretrained gn)" $gn.type=GN $gn.num_groups=16
# MABN's window and warm-up are made for batches of 2.
grid "$all" bn-all --norms bn --batch-sizes 2 --variant mabn=mabn "$(pretrained mabn)"
# (b), (c) BNET and AN in the backbone, at the large batch.
grid "$all" bn-all --norms bn --batch-sizes "$largest" \
    --variant bnet5=bnet5 "$(pretrained bnet5)" --variant an=an "$(pretrained an)"

for name in pretrain bn-head bn-all; do
    tool compare.py report "$out/$name" --out "$out/$name/report" || failed=1
done
tool compare.py report "$out/bn-head" --out "$out/bn-head/report-cbn" --baseline cbn || failed=1
exit $failed
