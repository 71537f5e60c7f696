#!/usr/bin/env bash
# Trains as a SLURM job that puts itself back in the queue: `slurm.sh --help`.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# shellcheck source=scripts/launch/command.sh
source "$ROOT/scripts/launch/command.sh"
# shellcheck source=scripts/launch/xla_flags.sh
source "$ROOT/scripts/launch/xla_flags.sh"

usage() {
  cat << 'END'
usage: scripts/launch/slurm.sh submit [--SETTING=VALUE ...] -- TRAIN_ARGUMENT ...

Submits a job that runs `python -m train TRAIN_ARGUMENT ...` and requeues itself while train says that it was preempted
(exit code 75). The repository, its .venv and the run folder must be on storage that all nodes share.

  --name=NAME            of the job; default: the run folder's
  --nodes=1
  --gpus_per_node=N      0 for none
  --processes=gpu        one process per `gpu`, or one per `node` with all its GPUs
  --time=LIMIT           such as 24:00:00; default: the partition's
  --notice=300           seconds before the limit at which train gets SIGTERM; must cover a save
  --partition=P --account=A --qos=Q --constraint=C --cpus_per_task=N --mem=SIZE    passed to sbatch
  --log=FILE             what the job prints, appended over requeues; default: JOBNAME-JOBID.log in the repository
  --python=.venv/bin/python
  --pause=10             seconds before the job goes back to the queue
  --max_stalled=5        give up after so many starts in a row that left no newer checkpoint
  --xla="FLAG ..."       flags of the XLA compiler, which win over the usual ones of scripts/launch/xla_flags.sh and
                         over your own XLA_FLAGS; `none` switches the usual ones off
  --dry_run              print the sbatch command, submit nothing

Each setting can be given as TESSERA_<SETTING> too. End a job for good with `scancel JOBID`.

  scripts/launch/gpu.sh install        # once, where nodes have a network
  scripts/launch/slurm.sh submit --nodes=2 --gpus_per_node=8 --time=12:00:00 --partition=gpu \
    -- --config=configs/paper/dalle_12b.py --workdir=runs/dalle_12b
END
}

# tasks_per_node: JAX on SLURM takes one process for each GPU, unless JAX_LOCAL_DEVICE_IDS says otherwise.
tasks_per_node() {
  case $PROCESSES in
    gpu) echo $((GPUS_PER_NODE > 0 ? GPUS_PER_NODE : 1)) ;;
    node) echo 1 ;;
    *) mistake "--processes=$PROCESSES is neither gpu nor node" ;;
  esac
}

submit() {
  local tasks job sbatch name
  tasks=$(tasks_per_node)
  job=("$ROOT/scripts/launch/slurm.sh" job "--nodes=$NODES" "--gpus_per_node=$GPUS_PER_NODE"
    "--processes=$PROCESSES" "--python=$PYTHON" "--pause=$PAUSE" "--max_stalled=$MAX_STALLED" "--xla=$XLA"
    -- "${ARGUMENTS[@]}")
  # SIGTERM goes to the tasks, not to the batch script. Nothing asks for GPUs per task: JAX picks one of the node's.
  sbatch=(sbatch "--job-name=${NAME:-$(basename "$WORKDIR")}" "--nodes=$NODES" "--ntasks-per-node=$tasks"
    "--signal=TERM@$NOTICE" --requeue --open-mode=append "--output=${LOG:-$ROOT/%x-%j.log}" "--chdir=$ROOT")
  [ "$GPUS_PER_NODE" -eq 0 ] || sbatch+=("--gpus-per-node=$GPUS_PER_NODE")
  for name in time partition account qos constraint cpus_per_task mem; do
    set_option "$name"
  done
  execute "${sbatch[@]}" "--wrap=exec $(quoted bash "${job[@]}")"
}

# set_option NAME: adds sbatch's option of that name, if it has a value, to the array `sbatch` of the caller.
set_option() {
  upper "$1"
  [ -z "${!UPPER}" ] || sbatch+=("--${1//_/-}=${!UPPER}")
}

# job: the batch script, on the job's first node.
job() {
  local processes before code=0 state
  [ -n "${SLURM_JOB_ID:-}" ] || mistake "this runs inside a job; submit one with: scripts/launch/slurm.sh submit"
  # On preemption SLURM sends SIGTERM to this script too, which must outlive the save. A trap, unlike ignoring the
  # signal, is not inherited by what it starts.
  trap 'SIGNALS=$((SIGNALS + 1)) && say "SIGTERM"' TERM
  processes=$((NODES * $(tasks_per_node)))
  if [ "$processes" -gt 1 ] && [ -z "$(train_argument distributed)" ]; then ARGUMENTS+=(--distributed=auto); fi
  if [ "$PROCESSES" = node ] && [ "$GPUS_PER_NODE" -gt 0 ]; then
    JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((GPUS_PER_NODE - 1)))
    export JAX_LOCAL_DEVICE_IDS
  fi
  if [ "$GPUS_PER_NODE" -gt 0 ]; then
    export_xla_flags XLA_FLAGS "${GPU_FLAGS[@]}"
  else
    export_xla_flags XLA_FLAGS
  fi
  # srun does not take this over from sbatch.
  if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi
  before=$(newest_step "$WORKDIR")
  # A task that has saved and ended must not take the others with it while they close their files.
  run_watched srun --kill-on-bad-exit=0 --wait=600 "$PYTHON" -m train "${ARGUMENTS[@]}" || code=$?
  say "train ended with exit code $code"
  [ "$code" -eq "$EXIT_PREEMPTED" ] || exit_as "$code"

  if [ "$(newest_step "$WORKDIR")" -gt "$before" ]; then
    rm -f "$WORKDIR/slurm_stalled"
  else
    STALLED=$(($(stalled_before) + 1))
    mkdir -p "$WORKDIR"
    echo "$STALLED" > "$WORKDIR/slurm_stalled"
  fi
  if [ "$STALLED" -ge "$MAX_STALLED" ]; then
    say "giving up: $STALLED starts in a row left no newer checkpoint in $WORKDIR"
    exit 1
  fi
  # A job that is being cancelled, or that SLURM requeues itself, is running no longer.
  state=$(squeue --noheader "--jobs=$SLURM_JOB_ID" --format=%T)
  if [ "$state" != RUNNING ]; then
    say "the job is $state: SLURM decides what becomes of it"
    exit "$EXIT_PREEMPTED"
  fi
  rest "$PAUSE"
  execute scontrol requeue "$SLURM_JOB_ID"
}

# stalled_before: starts without a newer checkpoint, in a row, up to this one.
stalled_before() {
  if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && [ -f "$WORKDIR/slurm_stalled" ]; then
    cat "$WORKDIR/slurm_stalled"
  else
    echo 0
  fi
}

main() {
  local command=${1:-}
  case $command in
    submit | job) shift ;;
    --help | -h | help) usage && exit ;;
    "") mistake "say what to do: submit; see --help" ;;
    *) mistake "unknown command $command: submit; see --help" ;;
  esac
  read_settings "name nodes gpus_per_node processes time notice partition account qos constraint cpus_per_task mem \
    log python pause max_stalled xla" "dry_run" "$@"
  NODES=${NODES:-1} PROCESSES=${PROCESSES:-gpu} NOTICE=${NOTICE:-300} PAUSE=${PAUSE:-10} MAX_STALLED=${MAX_STALLED:-5}
  PYTHON=${PYTHON:-$ROOT/.venv/bin/python}
  require gpus_per_node
  require_number nodes gpus_per_node notice pause max_stalled
  check_xla
  require_training
  cd "$ROOT"
  [ -n "$DRY_RUN" ] || command -v "$PYTHON" > /dev/null ||
    mistake "--python=$PYTHON is not there; make it with: scripts/launch/gpu.sh install"
  "$command"
}

main "$@"
