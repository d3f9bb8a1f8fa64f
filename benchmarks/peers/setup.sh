#!/usr/bin/env bash
# Makes one virtual environment per peer, with pinned versions.
#   ./setup.sh [FOLDER] [NAME...]     FOLDER: $PEERS_VENVS or .venvs here; NAME: transformers torchtitan deepspeed megatron
# Then: PEERS_VENVS=FOLDER python run.py
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
folder=${1:-${PEERS_VENVS:-$here/.venvs}}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
names=("${@:2}")
[ ${#names[@]} -gt 0 ] || names=(transformers torchtitan deepspeed megatron)

make_environment() { # NAME: an environment with nothing but the pinned torch in it
    [ -x "$folder/$1/bin/python" ] || "${PYTHON:-python3}" -m venv "$folder/$1"
    install "$1" torch==2.13.0 numpy setuptools wheel ninja
}

install() { # NAME PIP-ARGUMENTS...
    "$folder/$1/bin/python" -m pip install --quiet --constraint "$here/constraints.txt" "${@:2}"
}

for name in "${names[@]}"; do
    echo "== $name"
    make_environment "$name"
    case $name in
        transformers) install "$name" transformers==5.23.0 accelerate safetensors ;;
        torchtitan)
            install "$name" torchtitan==0.3.0 safetensors
            install "$name" --no-deps triton==3.9.0 # imported, never run, on CPU
            ;;
        deepspeed)
            install "$name" --no-build-isolation deepspeed==0.19.8 transformers==5.20.2 accelerate safetensors
            # its first start compiles a shared-memory all-reduce; do that here, run.py looks in the same place
            PATH="$folder/$name/bin:$PATH" TORCH_EXTENSIONS_DIR="$folder/$name/extensions" DS_ACCELERATOR=cpu \
                "$folder/$name/bin/python" -c "from deepspeed.comm.torch import build_shm_op; build_shm_op()"
            ;;
        megatron)
            install "$name" packaging einops safetensors
            install "$name" --no-deps megatron-core==0.16.1 # of what it depends on, the rest is only for GPUs
            ;;
        *) echo "unknown peer: $name" >&2; exit 2 ;;
    esac
done
