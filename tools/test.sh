#!/usr/bin/env bash
# Everything that has to pass, from a clean clone with nothing but Python 3.11 or later: lint, format, types, tests.
# Two files of tests run at a time, in their order. Arguments go to pytest (`-n 0`: one at a time). PYTHON chooses the
# interpreter that .venv is made with. Where CI is set and a virtual environment is active already, that one is used.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv
if [[ -n ${CI:-} && -n ${VIRTUAL_ENV:-} ]]; then
    venv=$VIRTUAL_ENV
fi
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_ROOT_USER_ACTION=ignore PIP_RETRIES=10 PIP_TIMEOUT=60

if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed")'
    "${PYTHON:-python3}" -m venv --clear "$venv"
fi
"$venv/bin/python" -m pip install --quiet --editable '.[cpu,dev]'

"$venv/bin/ruff" check --quiet
"$venv/bin/ruff" format --check --quiet
"$venv/bin/mypy" --no-error-summary
# Two at a time on two cores: threads of BLAS that share a core with others wait for each other most of the time.
export OPENBLAS_NUM_THREADS="${OPENBLAS_NUM_THREADS:-1}"
exec "$venv/bin/python" -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder "$@"
