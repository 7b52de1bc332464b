#!/bin/sh
# Installs torch into a virtual environment that holds a lock already. Torch is in no lock, because which build is right
# depends on the machine: it comes from wheels in a folder where there are some, else from where pip's own settings and
# arguments point. What it needs is locked. Nothing of that may change here, and nothing may come beside torch but what it
# computes on GPUs with, in versions that torch names: those packages differ between its builds.
#
#   install_torch.sh VENV WHEELS [ARGUMENT OF PIP]...      TORCH_VERSION, TORCH_SHA256 from the environment
set -eu
venv=$1 wheels=$2
shift 2
with_torch='^(torch|(pytorch[-_])?triton([-_]rocm)?)==|^(cuda|nvidia)[-_]'
work=$(mktemp -d)
trap 'rm -r "$work"' EXIT

if ls "$wheels"/torch-*.whl >/dev/null 2>&1; then
  set -- "$@" --no-index --find-links "$wheels"
fi
echo "torch==${TORCH_VERSION:?}${TORCH_SHA256:+ --hash=sha256:$TORCH_SHA256}" >"$work/torch"
"$venv/bin/pip" list --format=freeze | grep -vE "$with_torch" >"$work/locked"
"$venv/bin/pip" install --no-deps --requirement "$work/torch" "$@"
"$venv/bin/pip" install --constraint "$work/locked" "torch==$TORCH_VERSION" "$@"
if "$venv/bin/pip" list --format=freeze | grep -vE "$with_torch" | grep -vxFf "$work/locked" >&2; then
  echo "error: torch brought these, which are not locked: add them to the group torch of pyproject.toml" >&2
  exit 1
fi
