#!/bin/sh
# Installs a source archive and then a wheel into an empty environment, far from the checkout, and runs the quickstart there:
# scripts/try_dist.sh dist/*.tar.gz dist/*.whl
set -eu
archive=$(realpath "$1")
wheel=$(realpath "$2")
empty=$(mktemp -d)
trap 'rm -rf "$empty"' EXIT
unset PYTHONPATH
"${PYTHON:-python3}" -m venv "$empty"
cd "$empty"
bin/pip install -q "$archive" # by itself: the models, and no trainer
bin/debiformer models
bin/pip uninstall -q -y debiformer
bin/pip install -q "$wheel[train,explain]"
bin/debiformer quickstart
