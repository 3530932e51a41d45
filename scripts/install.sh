#!/bin/sh
# Make a virtual environment with Tandem in it: install.sh FOLDER [EXTRAS]
# On Linux without an NVIDIA GPU it asks for the CPU build of torch by name, so CUDA packages never come along.
set -eu
folder=$1
extras=${2:-demo,dev}
python=${PYTHON:-python3}
torch=$(sed -n 's/^torch==//p' constraints.txt)

"$python" -m venv "$folder" || {
    echo "could not make a virtual environment; on Debian: apt install python3-venv" >&2
    exit 1
}
pip="$folder/bin/python -m pip install --quiet --disable-pip-version-check"

if [ "$(uname -s)" = Linux ] && ! nvidia-smi -L >/dev/null 2>&1; then
    echo "installing torch $torch (CPU build)"
    $pip "torch==$torch+cpu" 2>/dev/null || $pip --index-url https://download.pytorch.org/whl/cpu "torch==$torch"
else
    echo "installing torch $torch"
    $pip "torch==$torch"
fi
echo "installing Tandem and what it needs"
$pip --constraint constraints.txt --editable ".[$extras]"
touch "$folder/ready"
