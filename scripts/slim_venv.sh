#!/bin/sh
# Makes the virtual environment of an image small: without packages that its service never imports, tests, sources of what
# is compiled, and debug symbols, and with the bytecode of what it does import alone, which no read-only container writes.
#
#   slim_venv.sh VENV SERVICE PACKAGE...
set -eu
venv=$1 service=$2
shift 2

"$venv/bin/pip" check
"$venv/bin/pip" uninstall --yes pip setuptools "$@"
find "$venv/lib" -name __pycache__ -prune -exec rm -r {} +
find "$venv/lib" -type d \( -name test -o -name tests \) -prune -exec rm -r {} +
find "$venv/lib" -regex '.*\.\(pyi\|proto\|pyx\|pxd\|c\|h\)' -delete
find "$venv/lib" -name '*.so' -exec strip --strip-unneeded {} +
PYTHONDONTWRITEBYTECODE='' "$venv/bin/python" -c "import $service.__main__, alora_serve.cli.app, alora_serve.cli.probe"
