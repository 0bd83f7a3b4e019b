#!/usr/bin/env bash
# Builds the extension in place on a machine with a GPU, tests it, checks it with compute-sanitizer and measures it.
# Every step has a time limit and a log; a failing step does not stop the later ones.
#   tools/gpu_session.sh [STEP...]    steps: build test sanitize bench (these four if none is named), inference, tune
# Environment: OUT (where logs and CSVs go), PYTHON, NM_ACT_CMAKE_ARGS and MAX_JOBS (as setup.py reads them), COMMIT (for
# the CSVs where there is no git), QUICK=1 (shorter benchmarks), TEST_ARGS, BENCH_ARGS, INFERENCE_ARGS, TUNE_ARGS, and
# limits in seconds: BUILD_LIMIT, TEST_LIMIT, SANITIZE_LIMIT (each tool), BENCH_LIMIT (each benchmark), INFERENCE_LIMIT,
# TUNE_LIMIT.
set -u
cd "$(dirname "$0")/.." || exit 1
out=${OUT:-build/gpu-session}
logs=$out/logs
python=${PYTHON:-python3}
steps=" ${*:-build test sanitize bench} "
mkdir -p "$logs"
rm -f "$logs"/*.log
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
summary=()
failed=0

# step NAME LIMIT COMMAND...: runs it, adds its output to the log LOG or NAME, shows the end of the log.
step() {
  local name=$1 limit=$2 log=$logs/${LOG:-$1}.log start=$SECONDS status
  shift 2
  echo "== $name: $*"
  timeout --kill-after=10 "$limit" "$@" >>"$log" 2>&1
  status=$?
  tail -n "${TAIL_LINES:-15}" "$log"
  case $status in
    0) summary+=("ok      $name $((SECONDS - start)) s") ;;
    124 | 137) summary+=("TIMEOUT $name after $limit s") ;;
    *) summary+=("FAILED  $name with status $status after $((SECONDS - start)) s"); failed=1 ;;
  esac
  return $status
}

wanted() { [[ $steps == *" $1 "* ]]; }

if wanted build; then
  step build "${BUILD_LIMIT:-360}" "$python" setup.py build_ext --inplace
fi
if ! "$python" -c 'import nm_act, sys; sys.exit(not nm_act.build_info()["cuda"])'; then
  echo "expected an importable nm_act with CUDA kernels, found none: see $logs/build.log"
  exit 1
fi

if wanted test; then
  # shellcheck disable=SC2086
  step test "${TEST_LIMIT:-400}" "$python" -m pytest -m gpu -q --timeout 120 tests/cuda ${TEST_ARGS:-}
fi

if wanted sanitize; then
  sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
  if [[ -z $sanitizer ]]; then
    summary+=("SKIPPED sanitize: no compute-sanitizer")
  else
    # Without torch's cache each tensor is an allocation of its own, so that overruns and unwritten bytes show.
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    for tool in memcheck initcheck racecheck synccheck; do
      # cuDNN's attention, which torch may choose, has hazards, and torch's reductions read what nothing wrote.
      cases=$([[ $tool == racecheck ]] && echo "not fused_model" || echo "")
      found=$([[ $tool == initcheck ]] && echo 0 || echo 3)
      LOG=sanitize step "$tool" "${SANITIZE_LIMIT:-240}" \
        "$sanitizer" --tool "$tool" --error-exitcode "$found" --print-limit 20 \
        "$python" -m pytest -m sanitizer -k "$cases" -q -x --timeout 0 -p no:cacheprovider tests/cuda
    done
    unset PYTORCH_NO_CUDA_MEMORY_CACHING
  fi
fi

if wanted bench; then
  options=(${COMMIT:+--commit "$COMMIT"} ${QUICK:+--quick})
  # shellcheck disable=SC2206
  options+=(${BENCH_ARGS:-})
  TAIL_LINES=40 step bench_compress "${BENCH_LIMIT:-280}" "$python" benchmarks/bench_compress.py \
    --csv "$out/compress.csv" "${options[@]}"
  TAIL_LINES=40 step bench_sparse_linear "${BENCH_LIMIT:-280}" "$python" benchmarks/bench_sparse_linear.py \
    --csv "$out/sparse_linear.csv" "${options[@]}"
  TAIL_LINES=40 step bench_decode "${BENCH_LIMIT:-280}" "$python" benchmarks/bench_decode.py \
    --csv "$out/decode.csv" "${options[@]}"
  TAIL_LINES=40 step bench_patterns "${BENCH_LIMIT:-280}" "$python" benchmarks/bench_patterns.py \
    --csv "$out/patterns.csv" "${options[@]}"
fi

if wanted tune; then
  TAIL_LINES=80 step tune "${TUNE_LIMIT:-560}" "$python" benchmarks/tune.py --csv "$out/gemm_tuning.csv" \
    --seconds "${TUNE_SECONDS:-480}" ${COMMIT:+--commit "$COMMIT"} ${TUNE_ARGS:-}
fi

if wanted inference; then
  # shellcheck disable=SC2086
  TAIL_LINES=60 step bench_inference "${INFERENCE_LIMIT:-560}" "$python" benchmarks/bench_inference.py \
    --csv "$out/inference.csv" ${COMMIT:+--commit "$COMMIT"} ${INFERENCE_ARGS:-}
fi

nvidia-smi --query-gpu=name,driver_version,clocks.sm,power.draw --format=csv,noheader
echo "== summary (logs in $logs)"
printf '%s\n' "${summary[@]}"
exit $failed
