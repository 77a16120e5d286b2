#!/usr/bin/env bash
# All that only a GPU can tell, in one command under nine minutes: the tests marked gpu, single techniques, gpu_suite.py.
#
#     benchmarks/gpu_day.sh [FOLDER]                          on a machine with a GPU; rows go to FOLDER/rows.jsonl
#     benchmarks/gpu_day.sh FOLDER --device cpu --tiny        runs every path here, in some minutes, and means nothing
#
# Each part has a time of its own, and one that fails or takes too long is a row, and does not end the others.
# Exit code: how many parts failed. PYTHON names the interpreter, .venv/bin/python by default.
set -u
cd "$(dirname "$0")/.."
folder=${1:-outputs/gpu_day}
[ $# -gt 0 ] && shift
python=${PYTHON:-.venv/bin/python}
device=cuda
case " $* " in *" --device cpu "*) device=cpu ;; esac
mkdir -p "$folder"
rows=$folder/rows.jsonl
: >"$rows"
export PYTHONPATH="$PWD:$PWD/tests:$PWD/benchmarks:$PWD/examples${PYTHONPATH:+:$PYTHONPATH}"
end=${LIMIT:-520} # seconds
failed=0

# part NAME SECONDS COMMAND...: at most these seconds, and no more than are left.
part() {
	local name=$1 limit=$2 start=$SECONDS status
	shift 2
	[ $((SECONDS + limit)) -gt "$end" ] && limit=$((end - SECONDS))
	if [ "$limit" -lt 5 ]; then
		echo "{\"part\": \"$name\", \"skipped\": \"no time was left\"}" >>"$rows"
		return
	fi
	timeout -k 5 "$limit" "$@" >"$folder/$name.log" 2>&1
	status=$?
	[ "$status" -ne 0 ] && failed=$((failed + 1))
	echo "{\"part\": \"$name\", \"status\": $status, \"seconds\": $((SECONDS - start)), \"limit_s\": $limit}" >>"$rows"
	tail -n 1 "$rows"
}

if [ "$device" = cuda ]; then
	part tests 90 "$python" -m pytest -q -m gpu tests/gpu tests/test_hardware.py tests/test_loading_fit.py
else
	end=${LIMIT:-3600}
	part tests 900 env ACCEL_GPU_TESTS_ON=cpu "$python" -m pytest -q tests/gpu
fi
for one in fsdp:40 graphs:35 scaler:20 resident:20 streams:15 float8:50 attention:35 compile:60; do
	seconds=${one#*:}
	[ "$device" = cpu ] && seconds=300
	part "${one%:*}" "$seconds" "$python" benchmarks/gpu_parts.py "${one%:*}" --seconds $((seconds / 2)) --output "$rows" "$@"
done
left=$((end - SECONDS))
part gpu_suite "$left" "$python" benchmarks/gpu_suite.py --limit $((left - 15)) --output "$folder/gpu_suite.json" "$@"
echo "gpu_day: $failed parts failed in $SECONDS s; rows in $rows"
exit "$failed"
