#!/usr/bin/env bash
# Sets up the CUDA compiler in target/cuda-toolkit from NVIDIA's Python wheels, and says what it does. Needs no GPU, no
# driver and no root. Downloads about 105 MB, takes 270 MB; a second run finds everything in place.
#
# Every wheel is pinned by version and by content: the compiler's own dependencies are not, and a mixture of versions
# either does not compile or makes code that drivers of CUDA 13.0 refuse.
set -euo pipefail
cd "$(dirname "$0")/.."

wheels='
nvidia-cuda-nvcc==13.0.88 --hash=sha256:56fe502eb77625a12f25172caa3cdddb4e4c8ba2c8c17dba44b164761b380f03
nvidia-cuda-crt==13.0.88 --hash=sha256:2c8043c7c9e02492716426e9919fc78d2c5b3b2a7a768a88e952676b08aa55a4
nvidia-nvvm==13.0.88 --hash=sha256:c5f41ffeb6466944a026dfa5317d7d85355c119bbec279205d22f1869d1054e0
nvidia-cuda-runtime==13.0.96 --hash=sha256:7f82250d7782aa23b6cfe765ecc7db554bd3c2870c43f3d1821f1d18aebf0548
nvidia-cuda-cccl==13.0.85 --hash=sha256:e0da7ad981f3a8aff08241b5bfc1af868742a63e2762f53a5171c492ef242649
'
toolkit=target/cuda-toolkit

say() { printf 'cuda-toolkit: %s\n' "$*"; }

wanted=$(printf '%s' "$wheels" | sha256sum | cut -d' ' -f1)
if [ "$(cat "$toolkit/.wheels" 2>/dev/null)" = "$wanted" ]; then
    say "$toolkit is complete"
    exit 0
fi
if [ "$(uname -s)-$(uname -m)" != Linux-x86_64 ]; then
    say "the pinned wheels are for Linux on x86_64; elsewhere set CUDA_HOME to an installed CUDA 13.0"
    exit 1
fi
for command in python3 gcc g++; do
    if ! command -v "$command" >/dev/null 2>&1; then
        say "$command is missing: install the Debian packages python3, python3-venv, gcc and g++, or their equivalents"
        exit 1
    fi
done

new=target/cuda-toolkit.new
rm -rf "$new"
mkdir -p "$new"
trap 'rm -rf "$new"' EXIT
say "downloading the compiler of CUDA 13.0: $(printf '%s' "$wheels" | cut -d' ' -f1 | tr '\n' ' ')"
python3 -m venv "$new/venv"
printf '%s' "$wheels" >"$new/requirements.txt"
"$new/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes \
    --only-binary=:all: --no-compile --target "$new/site" -r "$new/requirements.txt"

# All wheels of CUDA 13 unpack into one folder, which is laid out as an installed toolkit but for this link.
ln -sfn lib "$new/site/nvidia/cu13/lib64"
echo "$wanted" >"$new/site/nvidia/cu13/.wheels"
rm -rf "$toolkit"
mv "$new/site/nvidia/cu13" "$toolkit"
say "$("$toolkit/bin/nvcc" --version | grep -o 'release.*') is in $toolkit"
