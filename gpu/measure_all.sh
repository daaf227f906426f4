#!/usr/bin/env bash
# Speed on one GPU: 7B and 8B shapes with random weights. No hub and no network are needed.
#
#   bash gpu/measure_all.sh                  list the parts
#   bash gpu/measure_all.sh PART [OUT]       one part, at most 9 minutes on one H200; results go to OUT (default results/h200)
#
# A part is an experiment in gpu/measure/. Samples, floors, environment (with the commit) and tables are written to
# OUT/PART; commit that folder. State: pending, no GPU was lent yet. What the parts must show is in docs/measuring.md.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ $# -eq 0 ]; then
    for file in gpu/measure/*.yaml; do basename "$file" .yaml; done
    echo decode
    exit 0
fi
part=$1 out=${2:-results/h200} python=.venv/bin/python
[ -x "$python" ] || python=python3
if [ "$part" = decode ]; then
    timeout 540 "$python" gpu/captured_decode.py "$out/decode"
    exit
fi
timeout 540 "$python" -m effivlm.cli measure "gpu/measure/$part.yaml" --root "$out"
rm -f "$out/$part/lock"
