#!/usr/bin/env bash
# Trains one model of the zoo from scratch on one GPU, 8 minutes a call: gpu/train_zoo.sh MODEL OUT
#   MODEL: mini-qwen2-vl, mini-internvl or mini-llava-onevision; three calls train all, 25 minutes in all.
# OUT/MODEL is the checkpoint (2 MB): copy it to src/effivlm/zoo/checkpoints/, then run benchmarks/zoo_quality.py.
set -euo pipefail
model=$1 out=$2
train() { python -m effivlm.zoo.training "$1" "$model" "$out" --minutes "$2" --batch "$3" --device cuda --workers 12; }
train language 3.2 64
train vision 1.8 256
train joint 2.6 64
rm -f "$out"/*.pt
