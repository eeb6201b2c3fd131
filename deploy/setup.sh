#!/usr/bin/env bash
# Installs what Tessera needs to build (`setup.sh build`) and to test (`setup.sh test`), and says so.
# Installs only what is missing, so a second run is quick. Debian packages by apt-get; Python wheels
# into .venv beside the sources.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf 'setup: %s\n' "$*"; }

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi
}

# need COMMAND PACKAGE...: installs the packages unless the command is there.
missing=()
need() {
    local command=$1
    shift
    command -v "$command" >/dev/null 2>&1 || missing+=("$@")
}

install_missing() {
    [ ${#missing[@]} -gt 0 ] || return 0
    if ! command -v apt-get >/dev/null 2>&1; then
        say "please install the equivalents of these Debian packages: ${missing[*]}"
        exit 1
    fi
    say "installing Debian packages: ${missing[*]}"
    as_root env DEBIAN_FRONTEND=noninteractive apt-get update -qq
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
}

python_venv() {
    local wanted
    wanted=$(sha256sum tests/clients/requirements.txt | cut -d' ' -f1)
    if [ "$(cat .venv/.requirements 2>/dev/null)" = "$wanted" ]; then return 0; fi
    say "installing Python wheels into .venv: $(grep -v '^#' tests/clients/requirements.txt | tr '\n' ' ')"
    python3 -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r tests/clients/requirements.txt
    echo "$wanted" >.venv/.requirements
}

if ! command -v cargo >/dev/null 2>&1; then
    say "cargo is missing: install Rust 1.90 or newer with rustup, then run this again"
    exit 1
fi

need cc gcc libc6-dev
need c++ g++
need protoc protobuf-compiler
case "${1:-build}" in
build) install_missing ;;
test)
    need etcd etcd-server
    need python3 python3
    python3 -c 'import venv, ensurepip' 2>/dev/null || missing+=(python3-venv)
    install_missing
    python_venv
    ;;
*)
    echo "usage: setup.sh build|test" >&2
    exit 2
    ;;
esac
