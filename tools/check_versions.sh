#!/usr/bin/env bash
# What fits together: one fresh environment per row of the table below, and in it, outside the checkout, the wheel of
# this checkout: import, 3 iterations of training with BNET-5 and with AN, test --fuse, --resume, and a config of stock
# mmdet with --norm an. Prints a line per row and, in the end, the table of docs/install.md.
#
#     tools/check_versions.sh                 # all rows
#     tools/check_versions.sh --list
#     tools/check_versions.sh py312-torch27   # some
#
# Settings, from the environment:
#   WORK             folder for environments, data and logs (default: a new one under /tmp). ROW.log says what went wrong.
#                    A wheel of this package that lies in it is taken as it is
#   KEEP=1           keep the environments (1-6 GB each), which are otherwise deleted as soon as their row is done
#   PYTHONS          where interpreters are besides PATH (default: $PYENV_ROOT/versions/*/bin)
#   UV               a uv to install with (default: uv in PATH, else each environment's own pip)
#   MMCV_WHEEL       a compiled mmcv for Python 3.11 and torch 2.13, for the row py311-mmcv
#   ONEDL_MMCV_WHEEL the same of onedl-mmcv, for the row py311-onedl-ops
set -uo pipefail
checkout=$(cd "$(dirname "$0")/.." && pwd)

# name | Python | set of mm* packages | what else is asked for
rows=$(
    cat <<'ROWS'
py310-torch21   | 3.10 | lite  | torch==2.1.2 numpy==1.26.4 mmdet==3.2.0 mmengine==0.10.3 mmcv-lite==2.0.0
py310-torch24   | 3.10 | lite  | torch==2.4.1 numpy==1.26.4 mmdet==3.2.0
py311-torch24   | 3.11 | lite  | torch==2.4.1 numpy>=2 mmdet==3.3.0
py312-torch27   | 3.12 | lite  | torch==2.7.1 numpy>=2 mmdet==3.3.0
py312-numpy1    | 3.12 | lite  | torch==2.7.1 numpy==1.26.4 mmdet==3.2.0
py311-torch213  | 3.11 | lite  | torch==2.13.0 numpy>=2 mmdet==3.3.0
py311-mmdet32   | 3.11 | lite  | torch==2.13.0 numpy>=2 mmdet==3.2.0
py311-mmcv      | 3.11 | mmcv  | torch==2.13.0 mmdet==3.3.0 $MMCV_WHEEL
py311-onedl     | 3.11 | onedl | torch==2.13.0
py311-onedl-ops | 3.11 | onedl | torch==2.13.0 $ONEDL_MMCV_WHEEL
py310-torch213  | 3.10 | lite  | torch==2.13.0 mmdet==3.3.0
py313-torch213  | 3.13 | lite  | torch==2.13.0 mmdet==3.3.0
py313-newest    | 3.13 | lite  | torch mmdet==3.3.0
py313-onedl     | 3.13 | onedl | torch
py314-newest    | 3.14 | lite  | torch mmdet==3.3.0
ROWS
)

interpreter() {  # of Python $1; the one that runs, since a shim of pyenv's may not
    local found
    for found in $(type -ap "python$1") "${PYTHONS:-${PYENV_ROOT:-$HOME/.pyenv}/versions}"/*/bin/"python$1"; do
        "$found" -c '' 2>/dev/null && echo "$found" && return
    done
    return 1
}

install() {  # requirements ...
    if [ -n "$uv" ]; then
        "$uv" pip install -q --python "$env/bin/python" "$@"
    else
        "$env/bin/python" -m pip install -q --disable-pip-version-check "$@"
    fi
}

step() {  # name, command ...: runs it if all before it went well; its name and result go into $results
    local name=$1 start=$SECONDS
    shift
    [ -z "$failed" ] || { results+=' - |' && return; }
    echo "### $name: $*" >>"$log"
    if "$@" >"$log.step" 2>&1; then
        results+=' ok |'
        echo "    $row: $name ok ($((SECONDS - start)) s)" >&2
    else
        results+=' **no** |'
        failed="$name: $(grep -v '^ *$' "$log.step" | tail -1 | cut -c1-300)"
    fi
    cat "$log.step" >>"$log"
    rm -f "$log.step"
}

fresh_environment() {
    if [ -n "$uv" ]; then "$uv" venv -q --python "$python" "$env"; else "$python" -m venv "$env"; fi
}

install_row() {  # the forks first, as somebody has them who then installs this package
    local before
    if [ "$stack" = onedl ]; then
        install "${requirements[@]}" setuptools wheel || return
        [[ "${requirements[*]}" == *.whl* ]] || install onedl-mmcv || return
        install onedl-mmengine onedl-mmdetection || return
    fi
    before=$(versions)
    install "${requirements[@]}" "$wheel[$stack]" || return
    # opencv-python needs libGL, which bare machines lack; the headless build is the same module without it.
    "$env/bin/python" -c 'import cv2' 2>/dev/null || install --force-reinstall --no-deps opencv-python-headless || return
    if [ "$stack" = onedl ] && [ "$before" != "$(versions)" ]; then
        printf 'the forks were not left alone; before:\n%s\nafter:\n%s\n' "$before" "$(versions)"
        return 1
    fi
}

versions() {
    "$env/bin/python" - <<'PY'
from importlib.metadata import distributions

# In this order in the table.
names = ('torch', 'numpy', 'mmengine', 'onedl-mmengine', 'mmcv', 'mmcv-lite', 'onedl-mmcv', 'mmdet', 'onedl-mmdetection')
found = {d.metadata['Name'].lower().replace('_', '-'): d.version for d in distributions()}
print(' '.join(f'{name} {found[name]}' for name in names if name in found))
PY
}

import_all() {
    "$env/bin/python" -W ignore -c '
import sys, mmdet_norms, mmcv.ops, mmdet.models
assert mmdet_norms.__file__.startswith(sys.prefix), mmdet_norms.__file__'
}

which_ops() {  # by the file, since a start-up hook of this package lets any mmcv have the module
    compgen -G "$env/lib/python*/site-packages/mmcv/_ext*" >/dev/null && echo compiled || echo none
}

not_run() {  # why
    echo "$row: not run: $1"
    skipped+="$row: not run: $1"$'\n'
}

check() {  # row
    local row=$1 python version stack results='' failed='' env log data demo requirements
    IFS='|' read -r _ version stack asked < <(grep "^$row " <<<"$rows" | sed 's/ *| */|/g')
    [ -n "$version" ] || { echo "no row $row; there are: $(cut -d' ' -f1 <<<"$rows" | xargs)" >&2 && return 2; }
    env=$WORK/$row log=$WORK/$row.log
    case $asked in
    *\$*)
        local setting=${asked##*\$}
        [ -n "${!setting:-}" ] || { not_run "set $setting" && return; }
        asked=${asked/\$$setting/${!setting}}
        ;;
    esac
    read -ra requirements <<<"$asked"
    python=$(interpreter "$version") || { not_run "no python$version here" && return; }
    rm -rf "$env" && : >"$log"
    fresh_environment >>"$log" 2>&1 || return
    local norms=("$env/bin/mmdet-norms")
    cd "$WORK" || return
    data=$env/data demo=mmdet_norms::demo/mask-rcnn_r50_fpn_bnet5_shapes.py
    local small=(--data-root "$data" --overwrite --cfg-options train_dataloader.batch_size=2 train_cfg.val_interval=9)
    local stock=(train_cfg.max_epochs=1 model.backbone.init_cfg=None
        'train_dataloader.dataset.pipeline.2.scale=(128,128)' 'val_dataloader.dataset.pipeline.1.scale=(128,128)')
    step install install_row
    step import import_all
    [ -n "$failed" ] || "${norms[@]}" shapes --out "$data" --train 7 --val 2 >>"$log" 2>&1
    step 'train bnet5' "${norms[@]}" train $demo --work-dir "$env/bnet5" "${small[@]}" train_cfg.max_epochs=1
    step 'train an' "${norms[@]}" train $demo --norm an --work-dir "$env/an" "${small[@]}" train_cfg.max_epochs=1
    step 'test --fuse' "${norms[@]}" test $demo "$env/bnet5/epoch_1.pth" --fuse --data-root "$data" --work-dir "$env/test"
    step resume "${norms[@]}" train $demo --resume --work-dir "$env/bnet5" --data-root "$data" \
        --cfg-options train_dataloader.batch_size=2 train_cfg.max_epochs=2
    step 'mmdet:: --norm an' "${norms[@]}" train mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py --norm an \
        --work-dir "$env/stock" "${small[@]}" "${stock[@]}"
    local have
    have=$(versions 2>/dev/null)
    echo "$row: Python $version, $have, mmcv ops $(which_ops): ${failed:-all ok}"
    table+="| $version | $have | $(which_ops) |$results ${failed//|/ } |"$'\n'
    [ -n "${KEEP:-}" ] || rm -rf "$env"
    [ -z "$failed" ]
}

[ "${1:-}" != --list ] || { echo "$rows" && exit; }
WORK=${WORK:-$(mktemp -d /tmp/check_versions.XXXX)}
mkdir -p "$WORK"
uv=${UV-$(type -p uv)}
wheel=$(ls "$WORK"/mmdet_norms-*.whl 2>/dev/null | tail -1)
if [ -z "$wheel" ]; then  # of the files that git knows, so that nothing built in the checkout gets in
    mkdir -p "$WORK/source"
    git -C "$checkout" ls-files -z | tar -C "$checkout" --null -T - -c | tar -C "$WORK/source" -x
    python3 -m venv "$WORK/build" && "$WORK/build/bin/pip" install -q setuptools wheel &&
        "$WORK/build/bin/pip" wheel -q --no-build-isolation --no-deps -w "$WORK" "$WORK/source" || exit
    rm -rf "$WORK/build" "$WORK/source"
    wheel=$(ls "$WORK"/mmdet_norms-*.whl)
fi
table='' skipped='' bad=0
for row in ${*:-$(cut -d' ' -f1 <<<"$rows")}; do check "$row" || bad=1; done
echo
echo '| Python | versions | mmcv ops | install | import | train bnet5 | train an | test --fuse | resume | `mmdet::` | what failed |'
echo '|---|---|---|---|---|---|---|---|---|---|---|'
printf '%s' "$table"
[ -z "$skipped" ] || printf '\n%s' "$skipped"
exit $bad
