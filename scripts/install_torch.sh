#!/bin/sh
# Installs torch into a virtual environment of an image, apart from the hashed lock: which build is right depends on the
# machine. From wheels in a folder where there are some, else from where pip's own settings and TORCH_PIP_ARGS point.
#
#   install_torch.sh VENV WHEELS      TORCH_VERSION, TORCH_PIP_ARGS, TORCH_SHA256 from the environment
set -eu
venv=$1 wheels=$2
fetched=$(mktemp -d)

set -- "torch==${TORCH_VERSION:?}"
if ls "$wheels"/torch-*.whl >/dev/null 2>&1; then
  set -- "$@" --no-index --find-links "$wheels"
fi
# shellcheck disable=SC2086  # several arguments in one variable, as the README says
"$venv/bin/pip" download --dest "$fetched" "$@" ${TORCH_PIP_ARGS:-}
if [ -n "${TORCH_SHA256:-}" ]; then
  echo "$TORCH_SHA256  $(ls "$fetched"/torch-*.whl)" | sha256sum --check -
fi
"$venv/bin/pip" install --no-index --find-links "$fetched" "torch==$TORCH_VERSION"
rm -r "$fetched"
