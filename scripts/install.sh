#!/bin/sh
# Make .venv and install pyro_vae with its development tools into it, or bring it up to date.
#   sh scripts/install.sh [--which]     --which only prints the interpreter that a new .venv is made from
# PYTHON: an interpreter to try first.  PIP_ARGS: options handed to pip as they stand.
# .venv/.installing holds the process that is at it, and marks an unfinished .venv, which the next call makes anew;
# .venv/.installed marks a finished one.
set -eu
cd "$(dirname "$0")/.."
[ -n "${HOME:-}" ] || unset HOME
candidates="python3.13 python3.12 python3.11 python3 python3.14 python"

# Every candidate is run before it is picked: a version manager's shim is found on PATH and then fails. The answer is the
# interpreter behind it, which outlives .venv even where .venv is activated.
base() {
    "$1" -c 'import sys, venv, ensurepip
sys.version_info < (3, 11) and sys.exit(1)
print(sys._base_executable)' 2>/dev/null </dev/null
}

pick() {
    if [ -n "${PYTHON:-}" ]; then
        base "$PYTHON" && return
        echo "expected PYTHON to be Python >= 3.11 with venv, got $PYTHON: looking for another" >&2
    fi
    for candidate in $candidates; do
        base "$candidate" && return
    done
    for candidate in ${PYTHON:+"$PYTHON"} $candidates; do
        version=$("$candidate" -c 'import sys
sys.version_info < (3, 11) and sys.exit(1)
print("%d.%d" % sys.version_info[:2])' 2>/dev/null </dev/null) || continue
        echo "expected a Python with the venv module, got $candidate ($version) without it:" \
            "install it (Debian, Ubuntu: apt install python$version-venv)" >&2
        return 1
    done
    echo "expected Python >= 3.11, found none that runs among $candidates:" \
        "install one, or name it: make install PYTHON=/path/to/python3.12" >&2
    return 1
}

# A path entry, and no hook on imports: Python started beside a clone called pyro_vae takes the folder for the package else.
install() {
    if [ -z "${PIP_ARGS:-}" ] && uv --version >/dev/null 2>&1; then
        uv pip install --python .venv/bin/python --config-setting editable_mode=compat -e '.[dev]' && return
        echo "uv could not install: trying pip" >&2
    fi
    .venv/bin/python -m pip --version >/dev/null 2>&1 || .venv/bin/python -m ensurepip --default-pip || return
    # shellcheck disable=SC2086
    .venv/bin/python -m pip install ${PIP_ARGS:-} --config-settings editable_mode=compat -e '.[dev]'
}

if [ "${1:-}" = --which ]; then
    pick
    exit
fi

if [ -s .venv/.installing ] && kill -0 "$(cat .venv/.installing)" 2>/dev/null; then
    echo "expected no other installation into .venv, process $(cat .venv/.installing) is at it:" \
        "wait for its end, or remove .venv if that process is something else" >&2
    exit 1
fi
if [ -e .venv/.installing ] || ! .venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    python=$(pick)
    [ ! -e .venv ] || echo "making .venv anew: it is unfinished, or its Python does not run"
    rm -rf .venv
    mkdir .venv
    echo $$ >.venv/.installing
    "$python" -m venv .venv
elif [ -n "${PYTHON:-}" ]; then
    echo "keeping the Python of .venv: run make clean first for another"
fi
.venv/bin/python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)' ||
    echo "installing pyro_vae into .venv: this downloads a few GB, mostly torch (make help names smaller wheels)"
echo $$ >.venv/.installing
if ! install; then
    [ ! -e .venv/.installed ] || rm -f .venv/.installing
    echo "expected the installation into .venv to finish, it failed (see above): run make again to retry" >&2
    exit 1
fi
rm -f .venv/.installing
: >.venv/.installed
