#!/usr/bin/env bash
# Checks the CUDA backend on a machine with a GPU that has no Rust: runs the program and the test binaries that `cargo xtask
# gpu` has put into target/gpu-kit, copied here with the sources around them. Needs bash, Python, a driver of CUDA 13.0
# or newer, and cuBLASLt 13: a virtual environment with PyTorch for CUDA 13 has it.
#
#   tests/gpu/run.sh [REPORT]    writes all it prints to the file REPORT as well
#
# Every stage runs, whatever came before; the last lines say which failed.
set -uo pipefail
cd "$(dirname "$0")/../.."
root=$PWD
kit=${KIT:-$root/target/gpu-kit}
python=${PYTHON:-python3}
report=${1:-/dev/null}
exec > >(tee "$report") 2>&1

say() { printf '\n== %s\n' "$*"; }

if [ ! -x "$kit/tessera" ]; then
    echo "$kit is missing: run \`cargo xtask gpu\` where there is Rust, and copy target/gpu-kit here"
    exit 2
fi

# Test binaries know fixtures by the path of the folder that they were compiled in.
compiled_in=$(cat "$kit/compiled-in")
if [ ! -e "$compiled_in" ]; then
    mkdir -p "$(dirname "$compiled_in")" && ln -s "$root" "$compiled_in"
fi

# cuBLASLt of PyTorch's environment, where there is one.
libraries=$("$python" -c '
import glob, os, site, sys
roots = list(sys.path) + site.getsitepackages()
found = [os.path.dirname(file) for root in roots for file in glob.glob(root + "/nvidia/*/lib/libcublasLt.so.13")]
print(found[0] if found else "")' 2>/dev/null)
export LD_LIBRARY_PATH="${libraries:+$libraries:}${LD_LIBRARY_PATH:-}"

failed=()
# stage NAME COMMAND...: runs one of them, with its time.
stage() {
    local name=$1 begin=$SECONDS
    shift
    say "$name"
    if "$@"; then
        echo "== $name passed in $((SECONDS - begin)) s"
    else
        echo "== $name FAILED in $((SECONDS - begin)) s"
        failed+=("$name")
    fi
}

tessera() { "$kit/tessera" "$@"; }

tests() {
    local binary=$1
    shift
    "$kit/deps/$binary" "$@"
}

nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv || true
stage "libraries and GPUs" tessera gpus
stage "kernel parity" tests ops cuda_
stage "golden models" tests golden --test-threads=2
stage "same bits in deterministic mode" tests same-bits
stage "end to end" tests gpu --test-threads=1
if [ -z "${SKIP_BENCH:-}" ]; then
    stage "kernels against their limits" tessera bench kernels --device cuda
    stage "one rank of 72B, 7B, towers" tessera bench gpu
    if "$python" -c 'import transformers' 2>/dev/null; then
        stage "the same shapes in transformers" "$python" benches/peers/transformers_bench.py all --device cuda \
            --shapes 72b/8,72b/4,7b --batches 1,32 --context 1024 --prefill 2048,8192 --sides 72,144
    else
        say "the same shapes in transformers: not measured, $python has no transformers"
    fi
fi

if [ ${#failed[@]} -gt 0 ]; then
    say "FAILED: $(printf '%s; ' "${failed[@]}")"
    exit 1
fi
say "all stages passed"
