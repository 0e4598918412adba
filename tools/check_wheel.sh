#!/usr/bin/env bash
# Build sdist and wheel, install the wheel into a fresh environment of each Python, and use it outside the clone.
#
#   [TORCH=torch==2.13.0] [TESTS="tests/placement/test_placement.py ..."] tools/check_wheel.sh PYTHON ...
#
# Each PYTHON (such as python3.10) gets the wheel with its extra [lite] and, as a user would in a folder of their own,
# makes a data set, trains and tests a config named mmdet_norms::..., by one and by two processes. The first one also
# runs TESTS from the unpacked sdist. Both are built in isolated environments, as pip does it. Needs the network.
set -euo pipefail

if [ $# -lt 1 ]; then
    echo "usage: $0 PYTHON ..." >&2
    exit 2
fi
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH
export PIP_DISABLE_PIP_VERSION_CHECK=1 GIT_CEILING_DIRECTORIES=$work
config=mmdet_norms::demo/mask-rcnn_r50_fpn_bnet5_shapes.py
tests=${TESTS:-tests/test_packaging.py tests/test_rooms.py tests/placement/test_placement.py tests/layers/test_bnet.py tests/configs}
quick=(--cfg-options train_cfg.max_epochs=1 train_dataloader.num_workers=0 train_dataloader.persistent_workers=False
    val_dataloader.num_workers=0 val_dataloader.persistent_workers=False)

say() { echo "== $(date +%T) $*"; }

# An environment with torch: most of it comes without CUDA, which nothing here uses, where the index has such a build.
environment() {
    "$1" -m venv "$2"
    "$2/bin/python" -m pip install --quiet --upgrade pip 'setuptools<82' wheel
    "$2/bin/python" -m pip install --quiet "${TORCH:-torch==2.13.0}"
}

say "sdist and wheel, by $1"
"$1" -m venv "$work/builder"
"$work/builder/bin/python" -m pip install --quiet build
(cd "$here" && "$work/builder/bin/python" -m build --outdir "$work/dist" . > "$work/build.log") || { cat "$work/build.log"; exit 1; }
wheel=$(echo "$work"/dist/*.whl)
ls -l "$work/dist"

for python in "$@"; do
    name=$work/$(basename "$python")
    say "$("$python" --version): pip install 'mmdet_norms[lite]' from the wheel"
    environment "$python" "$name"
    # mmcv-lite and mmdet's dependencies have sdists that need pkg_resources, which setuptools 82 removed
    "$name/bin/python" -m pip install --quiet --no-build-isolation "$wheel[lite]"
    "$name/bin/python" -c 'import cv2' 2> /dev/null ||
        "$name/bin/python" -m pip install --quiet --force-reinstall --no-deps opencv-python-headless
    mkdir -p "$name/my experiments"
    (
        cd "$name/my experiments"
        bin=$name/bin
        "$bin/mmdet-norms" --version
        "$bin/mmdet-norms" shapes --out 'my data' --train 40 --val 8 --size 64
        "$bin/mmdet-norms" train "$config" --data-root 'my data' --work-dir 'a run' "${quick[@]}" > train.log 2>&1 ||
            { cat train.log; exit 1; }
        "$bin/mmdet-norms" test "$config" "$(cat 'a run/last_checkpoint')" --data-root 'my data' --work-dir tested \
            --fuse > test.log 2>&1 || { cat test.log; exit 1; }
        "$bin/torchrun" --standalone --nproc-per-node 2 -m mmdet_norms train "$config" --data-root 'my data' \
            --work-dir 'two processes' --launcher pytorch "${quick[@]}" > two.log 2>&1 || { cat two.log; exit 1; }
        "$bin/mmdet-norms" compare 'a run' tested 'two processes'
        grep -h 'mmcv ops' train.log | cut -c 1-120
        "$bin/python" -W ignore -c '
from pathlib import Path
import mmdet_norms
from mmdet_norms.kernels.compiled import library
from mmengine.config import Config
from mmengine.hub import get_config, get_model
configs = Path(mmdet_norms.__file__).parent / ".mim" / "configs"
names = sorted(str(path.relative_to(configs)) for path in configs.glob("[!_]*/**/*.py"))
for name in names:
    Config.fromfile(configs / name)
get_config(f"mmdet_norms::{names[-1]}")
Path("mine.py").write_text("_base_ = \"mmdet_norms::demo/mask-rcnn_r50_fpn_bnet5_shapes.py\"\n")
print(len(names), "configs load;", type(get_model("mmdet_norms::" + names[0])).__name__, "is built; library:", library())
Config.fromfile("mine.py")
'
    )
    if [ "$python" = "$1" ]; then
        say "tests from the unpacked sdist: $tests"
        tar xzf "$work"/dist/*.tar.gz -C "$work"
        unpacked=$(echo "$work"/mmdet_norms-*/)
        "$name/bin/python" -m pip install --quiet --no-build-isolation -e "$unpacked[lite,dev]"
        # shellcheck disable=SC2086
        (cd "$unpacked" && "$name/bin/python" -m pytest -q -x -p no:cacheprovider $tests | tail -3)
    fi
    rm -rf "$name"
done
say 'all of it worked'
