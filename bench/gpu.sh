#!/usr/bin/env bash
# Build in place, then test, inspect and measure on the GPU at hand, in under 9 minutes:
#
#     bench/gpu.sh [--out FOLDER] [--allow-cpu]
#
# FOLDER (bench/results by default) gets <device>.jsonl, tests.log, compile_report.txt and done-<commit>, which names the
# steps that are finished: run the same command again, with FOLDER as it was left, to go on where the time ran out.
# Needs torch, triton and pytest, no network; contestants that are not installed are listed as absent.
# Exit status: 0 all done; 1 a step failed; 2 no GPU or a missing tool; 75 time ran out, run again.
# --allow-cpu tries the script itself where there is no GPU, on tiny shapes.
# In the environment: PYTHON, BUDGET (seconds, 520), ROBUSTLOSS_COMMIT (a name for a copy without git).
set -uo pipefail
cd "$(dirname "$0")/.."

out=bench/results
allow_cpu=
while (($#)); do
    case $1 in
        --out)
            out=${2:?--out wants a folder}
            shift 2
            ;;
        --allow-cpu)
            allow_cpu=1
            shift
            ;;
        *)
            echo "gpu.sh: unknown argument $1; usage: bench/gpu.sh [--out FOLDER] [--allow-cpu]" >&2
            exit 2
            ;;
    esac
done
python=${PYTHON:-python3}
budget=${BUDGET:-520}
unfinished=75

for module in torch triton pytest; do
    if ! "$python" -c "import $module"; then
        echo "gpu.sh: $python cannot import $module; install it, or name another PYTHON" >&2
        exit 2
    fi
done
sizes=()
if ! "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    if [[ -z $allow_cpu ]]; then
        echo "gpu.sh: torch finds no GPU here; make bench measures on the CPU (--allow-cpu tries this script)" >&2
        exit 2
    fi
    sizes=(--tiny)
fi

mkdir -p "$out"
out=$(cd "$out" && pwd)
# Named before the build, whose leftovers are no sources.
ROBUSTLOSS_COMMIT=$("$python" -m bench.results) || exit 2
export ROBUSTLOSS_COMMIT
finished=$out/done-$ROBUSTLOSS_COMMIT
touch "$finished"
status=0

# step NAME SECONDS COMMAND...: run it once per commit, within what is left of the time, and note how it went.
step() {
    local name=$1 limit=$2 left=$((budget - SECONDS)) start=$SECONDS code
    shift 2
    if grep -qx "$name" "$finished"; then
        echo "== $name: done before"
        return
    fi
    if ((left < 20)); then
        echo "== $name: no time left"
        ((status == 1)) || status=$unfinished
        return
    fi
    ((limit < left)) || limit=$left
    echo "== $name (at most $limit s)"
    "$@" # reads limit
    code=$?
    echo "== $name: status $code after $((SECONDS - start)) s"
    case $code in
        0) echo "$name" >>"$finished" ;;
        "$unfinished" | 124) ((status == 1)) || status=$unfinished ;; # 124 is timeout's
        *) status=1 ;;
    esac
}

# Each machine builds for itself, so this is no step: a fresh machine may come with an old FOLDER.
build() {
    if timeout 150 "$python" -m pip install --quiet --no-build-isolation --no-deps -e . >"$out/build.log" 2>&1; then
        echo "== build: installed in place"
        return
    fi
    # What an installation would look like, in a folder of its own ahead of this one.
    local copy
    copy=$(mktemp -d)
    cp -r robustloss "$copy/robustloss"
    cp -r kernels "$copy/robustloss/kernels"
    ln -s "$PWD/bench" "$copy/bench"
    export PYTHONSAFEPATH=1 PYTHONPATH=$copy${PYTHONPATH:+:$PYTHONPATH}
    echo "== build: pip could not install in place (build.log says why); running from $copy"
    if ! timeout 150 "$python" setup.py --quiet build_ext --build-lib "$copy" >>"$out/build.log" 2>&1; then
        echo "== build: and the C++ extension could not be built: CPU tensors take the slow path"
    fi
}

tests() {
    timeout "$limit" "$python" -m pytest tests/kernels tests/ops -q >"$out/tests.log" 2>&1
    local code=$?
    tail -n 15 "$out/tests.log"
    return $code
}

compile_report() {
    timeout "$limit" "$python" -m bench.compile_report >"$out/compile_report.txt"
    local code=$?
    tail -n 5 "$out/compile_report.txt"
    return $code
}

# suite OP: pytest stops by itself in time to print what it has; timeout only catches a call that hangs.
suite() {
    timeout "$((limit + 15))" "$python" -m pytest bench --op "$1" -q -p no:cacheprovider "${sizes[@]}" \
        --results "$out" --seconds "$((limit - 15))"
}

build
step tests 170 tests
step compile_report 60 compile_report
step sequence_logps 120 suite sequence_logps
step coupled_losses 120 suite coupled_losses
step soft_sort 60 suite soft_sort
step linear_sequence_logps "$budget" suite linear_sequence_logps
echo "== $out; python -m bench.report --results $out draws it"
exit $status
