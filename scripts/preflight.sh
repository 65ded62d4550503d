#!/usr/bin/env bash
# Says what a build needs and does not find, before anything is downloaded.
#
#   scripts/preflight.sh              report; exit 1 when something is missing
#   scripts/preflight.sh --packages   only the names of missing apt packages, on one line; exit 0
#
# With --neon first, also what `make test-neon` needs: a compiler for AArch64 and an emulator; with --page first, what
# `make test-page` needs: Chromium. PYTHON names the interpreter (default python3). It needs 3.11 or newer, venv and
# the C headers.
set -euo pipefail

python=${PYTHON:-python3}
root=$(cd "$(dirname "$0")/.." && pwd)
# .venv with torch's CPU build takes 1.5 GB, the model cache 0.8 GB; the CUDA build and its libraries bring 8 GB more.
readonly needed_cpu_gb=3 needed_cuda_gb=12
missing=()
notes=()

python_runs() { "$python" -c "$1" >/dev/null 2>&1; }

check_python() {
    if ! command -v "$python" >/dev/null; then
        missing+=(python3 python3-venv python3-dev)
        return
    fi
    if ! python_runs 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        notes+=("$python is $("$python" -V 2>&1), 3.11 or newer is needed: install it, then 'make PYTHON=python3.11 ...'")
        missing+=(python3.11 python3.11-venv python3.11-dev)
        return
    fi
    # Debian names these packages after the default interpreter or after its version.
    local name=python3
    if [ "$(command -v "$python")" != /usr/bin/python3 ] && [ "${python##*/}" != python3 ]; then
        name=${python##*/}
    fi
    python_runs 'import venv, ensurepip' || missing+=("$name-venv")
    python_runs 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' ||
        missing+=("$name-dev")
}

check_compiler() {
    local cxx=${CXX:-g++}
    if ! command -v "$cxx" >/dev/null; then
        missing+=(g++)
    elif ! printf '#include <bit>\n#include <version>\n#include <span>\nint main() { return std::has_single_bit(4u) ? 0 : 1; }\n' |
        "$cxx" -std=c++20 -x c++ -fsyntax-only - >/dev/null 2>&1; then
        notes+=("$cxx does not compile C++20: g++ 11 or newer is needed")
        missing+=(g++)
    fi
    command -v make >/dev/null || missing+=(make)
}

check_neon() {
    command -v aarch64-linux-gnu-g++ >/dev/null || missing+=(g++-aarch64-linux-gnu)
    command -v qemu-aarch64 >/dev/null || missing+=(qemu-user)
}

check_page() {
    command -v chromium >/dev/null || missing+=(chromium)
}

free_disk_gb() { df -Pk "$root" | awk 'NR == 2 { print int($4 / 1048576) }'; }

report() {
    local free_gb
    free_gb=$(free_disk_gb)
    echo "preflight: free disk ${free_gb} GB; needed about ${needed_cpu_gb} GB with torch's CPU build," \
        "about ${needed_cuda_gb} GB with its CUDA build (what PyPI serves for Linux)"
    echo "preflight: first set-up downloads about 0.5 GB with the CPU build (2 to 5 minutes)," \
        "about 4 GB with the CUDA build (5 to 20 minutes); the default model is 0.1 GB more"
    for note in ${notes[@]+"${notes[@]}"}; do echo "preflight: $note"; done
    if [ "$free_gb" -lt "$needed_cpu_gb" ]; then
        echo "preflight: not enough free disk under $root" >&2
        return 1
    fi
    if [ ${#missing[@]} -gt 0 ]; then
        local sudo=
        [ "$(id -u)" -eq 0 ] || sudo="sudo "
        echo "preflight: missing; run:" >&2
        echo "${sudo}apt-get update && ${sudo}apt-get install -y ${missing[*]}" >&2
        return 1
    fi
    echo "preflight: $("$python" -V), $(${CXX:-g++} --version | head -n 1): all there"
}

check_python
check_compiler
case ${1:-} in
    --neon) check_neon && shift ;;
    --page) check_page && shift ;;
esac
if [ "${1:-}" = --packages ]; then
    echo "${missing[*]-}"
else
    report
fi
