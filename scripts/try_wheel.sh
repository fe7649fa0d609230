#!/bin/sh
# Installs a wheel into an empty environment, far from the checkout, and runs the quickstart there: scripts/try_wheel.sh dist/*.whl
set -eu
wheel=$(realpath "$1")
empty=$(mktemp -d)
trap 'rm -rf "$empty"' EXIT
unset PYTHONPATH
"${PYTHON:-python3}" -m venv "$empty"
cd "$empty"
bin/pip install -q "$wheel" # by itself: the models, and no trainer
bin/debiformer models
bin/pip install -q "$wheel[train,explain]"
bin/debiformer quickstart
