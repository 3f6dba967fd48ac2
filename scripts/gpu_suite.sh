#!/usr/bin/env bash
# Everything that needs an NVIDIA card, in one go of under 9 minutes: kernels against the reference, their benchmark,
# the six offline workloads on two shapes, start-up, sampling, experts, the tokens of both attention backends, memory.
#
#   bash scripts/gpu_suite.sh OUT_FOLDER [PYTHON [PART ...]]
#
# Leaves OUT_FOLDER/suite.json and OUT_FOLDER/suite.log. PYTHON has the project's dependencies. PARTs, by the names
# below, are those to run: all if there are none.
set -uo pipefail
out=$(mkdir -p "$1" && cd "$1" && pwd)
python=${2:-python3}
wanted=" ${*:3} "
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
parts=$(mktemp -d)
trap 'kill $watcher 2>/dev/null; rm -rf "$parts"' EXIT

nvidia-smi --query-gpu=memory.used,memory.total --format=csv,noheader,nounits -lms 200 >"$parts/memory.csv" &
watcher=$!

part() { # name, seconds, command: what fails or takes too long is named at the end, and the rest goes on
    local name=$1 limit=$2 started=$SECONDS
    shift 2
    [[ $wanted == "  " || $wanted == *" $name "* ]] || return 0
    echo "== $name: $*"
    timeout "$limit" "$@" 2> >(grep -v cuda_timer >&2) && status=0 || status=$?
    echo "$name $status $((SECONDS - started))" >>"$parts/status"
}

full='{"gpu_memory_utilization": 0.95}'
{
    untuned=(env XLA_FLAGS=--xla_gpu_autotune_level=0) # what the reference's products would spend most of the time on
    part kernels 70 "${untuned[@]}" "$python" scripts/check_kernels.py --backend triton --out "$parts/kernels.json"
    part hopper 80 "${untuned[@]}" "$python" scripts/check_kernels.py --few --out "$parts/hopper.json"
    part attention 60 "$python" scripts/bench_kernels.py --out "$parts/attention.json"
    part startup 100 "$python" -m engine.bench startup --shape llama-8b --max-model-len 4096 --num-iters-cold 1 --num-iters-warm 1 --output-json "$parts/startup.json"
    part qwen3-0.6b 110 "$python" scripts/bench_offline.py --shape qwen3-0.6b --settings "$full" --out "$parts/qwen3-0.6b.json"
    part llama-8b 160 "$python" scripts/bench_offline.py --shape llama-8b --settings "$full" --out "$parts/llama-8b.json"
    part sampling 60 "$python" scripts/bench_sampling.py --shape qwen3-0.6b --rows 8,256 --repeat 1 --out "$parts/sampling.json"
    part experts 40 "$python" scripts/bench_moe.py --tokens 8,256,2048 --out "$parts/experts.json"
    part tokens 70 "$python" scripts/check_tokens.py --shape qwen3-0.6b
    kill $watcher
    "$python" - "$parts" "$out/suite.json" <<'PYTHON'
import json, pathlib, sys

parts, out = map(pathlib.Path, sys.argv[1:])
report = {path.stem: json.loads(path.read_text()) for path in sorted(parts.glob("*.json"))}
samples = [line.split(",") for line in (parts / "memory.csv").read_text().splitlines()]
used, total = max((int(used), int(total)) for used, total in samples)
report["memory"] = {"most_used_mib": used, "total_mib": total, "share": used / total}
report["parts"] = {name: {"exit": int(code), "seconds": int(s)} for name, code, s in
                   (line.split() for line in (parts / "status").read_text().splitlines())}
out.write_text(json.dumps(report, indent=1))
print(f"memory: {used} of {total} MiB at most, {used / total:.1%}")
print("\n".join(f"{name:12} exit {p['exit']}, {p['seconds']} s" for name, p in report["parts"].items()))
PYTHON
} 2>&1 | tee "$out/suite.log"
