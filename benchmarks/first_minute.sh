#!/usr/bin/env bash
# A newcomer's first minute: clone, new environment, README's first command with an empty compile cache, then again.
#
#     bash benchmarks/first_minute.sh
#
# Prints the seconds of each step. Installation is measured apart: it depends on the network alone.
set -euo pipefail
here="$(cd "$(dirname "$0")/.." && pwd)"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
export XDG_CACHE_HOME="$work/cache"
unset DJAX_COMPILE_CACHE LD_PRELOAD

step() {
    local began seconds
    began=$(date +%s.%N)
    "${@:2}"
    seconds=$(echo "$(date +%s.%N) - $began" | bc)
    printf '>>> %s: %.1f s\n' "$1" "$seconds"
}

command=$(grep -m1 -o 'djax generate ".*"' "$here/README.md")
step "clone" git clone -q "$here" "$work/djax"
cd "$work/djax"
step "new environment" python3 -m venv "$work/env"
source "$work/env/bin/activate"
step "install" pip install -q --disable-pip-version-check -e .
step "first answer, empty compile cache" eval "$command"
step "second answer" eval "$command"
step "third answer" eval "$command"
