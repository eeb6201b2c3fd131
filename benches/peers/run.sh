#!/usr/bin/env bash
# Tessera's `cpu` backend beside llama.cpp and Hugging Face transformers. See README.md beside this file.
#
#   benches/peers/run.sh            set up what is missing, measure, print the table
#   benches/peers/run.sh setup      set up only
#   benches/peers/run.sh measure    measure only, adding to earlier results
#   benches/peers/run.sh table      print the table of the results so far
#
# Variables, all optional:
#   PEERS_DIR        scratch directory (default: a folder of that name in the system's temporary directory; 20 GB)
#   PEERS_PARTS      default "decode prefill vision"
#   PEERS_OF         default "llama.cpp transformers"
#   PEERS_ROUNDS     adjacent pairs of each part (default 5)
#   PEERS_THREADS    default 2
#   PEERS_REPEATS    runs inside a pair, of which the median counts (default 3)
#   PEERS_BUILD      command put before builds, for example "nice"
#   PEERS_QUIET      command put before each pair, for example one that waits until the machine is idle
#   PEERS_TESSERA    binary to measure (default: a release build of this tree)
#   PEERS_PYTHON     interpreter that has torch and transformers (default: an environment made here)
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
scratch=${PEERS_DIR:-${TMPDIR:-/tmp}/tessera-peers}
threads=${PEERS_THREADS:-2}
results=$scratch/results.jsonl
tools=$scratch/tools
llama=$scratch/llama-build
tessera=${PEERS_TESSERA:-$root/target/release/tessera}
python=${PEERS_PYTHON:-$scratch/torch/bin/python}

# llama.cpp has no source release on PyPI of its own; this package carries the whole tree.
package=llama_cpp_python
package_version=0.3.36
source=$scratch/$package-$package_version/vendor/llama.cpp
torch_version=2.15.0
transformers_version=5.23.0

say() { printf 'peers: %s\n' "$*"; }

set_up_llama() {
  if [[ ! -x $tools/bin/python ]]; then
    say "environment for the package's metadata and for GGUF files"
    python3 -m venv "$tools"
    "$tools/bin/pip" install --quiet scikit-build-core gguf numpy
  fi
  if [[ ! -d $source ]]; then
    say "source of llama.cpp, from $package $package_version"
    "$tools/bin/pip" download --quiet --no-deps --no-build-isolation --no-binary :all: \
      --dest "$scratch" "$package==$package_version"
    tar -xzf "$scratch/$package-$package_version.tar.gz" -C "$scratch"
    rm "$scratch/$package-$package_version.tar.gz"
  fi
  if [[ ! -x $llama/bin/llama-batched-bench ]]; then
    say "building llama.cpp for this machine"
    cmake -S "$source" -B "$llama" -G Ninja -Wno-dev \
      -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=OFF -DGGML_CCACHE=OFF \
      -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
      -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_APP=OFF \
      -DCMAKE_C_COMPILER_LAUNCHER="${PEERS_BUILD:-}" -DCMAKE_CXX_COMPILER_LAUNCHER="${PEERS_BUILD:-}"
    ninja -C "$llama" -j "$threads" llama-batched-bench mtmd
  fi
  if [[ ! -x $llama/bin/llama_vision || $here/llama_vision.cpp -nt $llama/bin/llama_vision ]]; then
    say "building the driver of its vision tower"
    ${PEERS_BUILD:-} g++ -O2 -std=c++17 -fopenmp \
      -I"$source/include" -I"$source/ggml/include" -I"$source/tools/mtmd" "$here/llama_vision.cpp" \
      "$llama/tools/mtmd/libmtmd.a" "$llama/src/libllama.a" "$llama/ggml/src/libggml.a" \
      "$llama/ggml/src/libggml-cpu.a" "$llama/ggml/src/libggml-base.a" -lpthread -ldl -o "$llama/bin/llama_vision"
  fi
  ${PEERS_BUILD:-} "$tools/bin/python" "$here/make_gguf.py" "$scratch/models"
}

set_up_transformers() {
  if [[ ! -x $python ]]; then
    say "environment with torch $torch_version and transformers $transformers_version"
    python3 -m venv "$scratch/torch"
    "$scratch/torch/bin/pip" install --quiet "torch==$torch_version" "torchvision" "transformers==$transformers_version"
  fi
}

set_up() {
  mkdir -p "$scratch"
  case " ${PEERS_OF:-llama.cpp transformers} " in *" llama.cpp "*) set_up_llama ;; esac
  case " ${PEERS_OF:-llama.cpp transformers} " in *" transformers "*) set_up_transformers ;; esac
  if [[ -z ${PEERS_TESSERA:-} ]]; then
    say "release build of tessera"
    (cd "$root" && ${PEERS_BUILD:-} cargo build --locked --release --package tessera)
  fi
}

measure() {
  for ((round = 0; round < ${PEERS_ROUNDS:-5}; round++)); do
    for part in ${PEERS_PARTS:-decode prefill vision}; do
      for peer in ${PEERS_OF:-llama.cpp transformers}; do
        say "round $round, $part, beside $peer"
        ${PEERS_QUIET:-} python3 "$here/compare.py" pair "$part" "$peer" "$round" "$results" \
          --tessera "$tessera" --llama "$llama/bin" --models "$scratch/models" --python "$python" \
          --threads "$threads" --repeats "${PEERS_REPEATS:-3}"
      done
    done
  done
}

case ${1:-all} in
  setup) set_up ;;
  measure) measure ;;
  table) python3 "$here/compare.py" table "$results" ;;
  all) set_up && measure && python3 "$here/compare.py" table "$results" ;;
  *) sed -n '2,21p' "$here/run.sh" && exit 2 ;;
esac
