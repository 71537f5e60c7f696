#!/usr/bin/env bash
# Trains on a Cloud TPU slice through gcloud, from asking for it to giving it back: `tpu_vm.sh --help`.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# shellcheck source=scripts/launch/command.sh
source "$ROOT/scripts/launch/command.sh"
# shellcheck source=scripts/launch/xla_flags.sh
source "$ROOT/scripts/launch/xla_flags.sh"

usage() {
  cat << 'END'
usage: scripts/launch/tpu_vm.sh COMMAND [--SETTING=VALUE ...] [-- TRAIN_ARGUMENT ...]

Trains on a Cloud TPU slice (v4 to v6e) as a queued resource; docs/launching.md goes through it step by step.

  run       create, setup, train; again after exit code 75 and on a new slice when this one is lost; then delete,
            whatever happened. Ctrl-C saves first. A slice of that name that exists is used, and deleted.
  create    ask for a slice and wait until it is there
  setup     on every worker: the repository at a commit, Python, the `tpu` extra, the storage that workers share
  train     the same training command on every worker, once; after a lost connection it finds the training again
  stop      ask the training to save and end with exit code 75
  status    the request's state, and the slice's
  delete    the request and the slice with it

  --name=NAME               of the slice and its request (all commands)
  --zone=ZONE               such as us-east5-b (all commands)
  --project=PROJECT         default: gcloud's
  --accelerator_type=TYPE   such as v6e-16 (create, run)
  --runtime_version=VERSION default: the usual one for v4, v5e (v5litepod), v5p and v6e (create, run)
  --spot                    cheaper, may be taken away at any time
  --service_account=EMAIL   that workers act as; default: Compute Engine's
  --network=N --subnetwork=N
  --internal_ip             no external addresses: ssh from a machine of the same network
  --bucket=NAME             Cloud Storage bucket, or --nfs=HOST:/SHARE, that every worker mounts (setup, run)
  --mount=/mnt/tessera      where; the run folder must lie below it
  --commit=COMMIT           default: HEAD, with nothing uncommitted (setup, run)
  --repository=URL          clone from there; default: this clone is copied, with its history
  --python_version=3.11     for the workers
  --poll=30                 seconds between two looks at a state
  --wait=86400              seconds to wait for a slice
  --settle=120              seconds in which a failure may turn out to be a lost slice
  --pause=30                seconds before another attempt
  --max_stalled=5           give up after so many attempts in a row that left no newer checkpoint
  --xla="FLAG ..."          flags of libtpu's compiler, which win over the usual ones of scripts/launch/xla_flags.sh and
                            over a worker's own LIBTPU_INIT_ARGS; `none` switches the usual ones off (train, run)
  --dry_run                 print the commands of a run without trouble, run none

Each setting can be given as TESSERA_<SETTING> too. Exit codes: 0 finished, 75 stopped and saved, 2 a mistake, 1 other.

  scripts/launch/tpu_vm.sh run --name=dalle --zone=us-east5-b --accelerator_type=v6e-16 --spot --bucket=my-runs \
    -- --config=configs/scenes/dalle.py --workdir=/mnt/tessera/dalle --config.data.data_dir=/mnt/tessera/data
END
}

STATE=""    # of the request, as `look` found it
HELD=""     # not empty: the slice was there
READY=""    # not empty: the slice exists and is set up
CREATED=""  # not empty: there may be something to delete
TRAINING="" # not empty: a training command is running
LAST_STEP=""

# tpus GROUP VERB ARGUMENT...: sets TPUS to gcloud's command for this slice.
# shellcheck disable=SC2153 # read_settings sets NAME
tpus() {
  TPUS=(gcloud compute tpus "$@" "--zone=$ZONE")
  [ -z "$PROJECT" ] || TPUS+=("--project=$PROJECT")
}

# on_workers WHICH LINE: sets TPUS to the command that runs a shell line on workers.
# shellcheck disable=SC2153 # read_settings sets NAME
on_workers() {
  tpus tpu-vm ssh "$NAME" "--worker=$1" "--command=$2" --quiet
  [ -z "$INTERNAL_IP" ] || TPUS+=(--internal-ip)
}

# worker_line VERB ARGUMENT...: shell line that runs tpu_worker.sh on a worker.
worker_line() {
  quoted bash tessera/scripts/launch/tpu_worker.sh "$@"
}

# look ANSWER: sets STATE: the request's state, MISSING if there is none, UNKNOWN if gcloud cannot say. ANSWER is for
# --dry_run.
look() {
  tpus queued-resources describe "$NAME" "--format=value(state.state)"
  look_with "$1"
}

# look_at_node ANSWER: the same for the slice itself.
look_at_node() {
  tpus tpu-vm describe "$NAME" "--format=value(state)"
  look_with "$1"
}

look_with() {
  local errors
  errors=$(mktemp)
  if ! STATE=$(query "$1" "${TPUS[@]}" 2> "$errors"); then
    if grep -qi 'NOT_FOUND\|not found' "$errors"; then STATE=MISSING; else STATE=UNKNOWN; fi
    [ "$STATE" = MISSING ] || cat "$errors" >&2
  fi
  rm -f "$errors"
}

# default_runtime: Google's runtime version for JAX on this type.
default_runtime() {
  case $ACCELERATOR_TYPE in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v2-* | v3-* | v4-*) echo tpu-ubuntu2204-base ;;
    *) mistake "--accelerator_type=$ACCELERATOR_TYPE has no usual --runtime_version; give one" ;;
  esac
}

# check_bucket: folders of the bucket can be renamed in one step, as a checkpoint that is complete is.
check_bucket() {
  [ -n "$BUCKET" ] || return 0
  local describe=(gcloud storage buckets describe "gs://$BUCKET" --raw "--format=value(hierarchicalNamespace.enabled)")
  local answer
  [ -z "$PROJECT" ] || describe+=("--project=$PROJECT")
  answer=$(query True "${describe[@]}") || mistake "the bucket gs://$BUCKET cannot be read; see gcloud's message above"
  [ "$answer" = True ] || mistake "gs://$BUCKET has no hierarchical namespace, so a half-written checkpoint could" \
    "look complete; make a bucket with: gcloud storage buckets create --enable-hierarchical-namespace" \
    "--uniform-bucket-level-access"
}

create() {
  local request
  tpus queued-resources create "$NAME" "--node-id=$NAME" "--accelerator-type=$ACCELERATOR_TYPE" \
    "--runtime-version=$RUNTIME_VERSION"
  request=("${TPUS[@]}")
  [ -z "$SPOT" ] || request+=(--spot)
  [ -z "$SERVICE_ACCOUNT" ] || request+=("--service-account=$SERVICE_ACCOUNT")
  [ -z "$NETWORK" ] || request+=("--network=$NETWORK")
  [ -z "$SUBNETWORK" ] || request+=("--subnetwork=$SUBNETWORK")
  [ -z "$INTERNAL_IP" ] || request+=(--internal-ips)
  execute "${request[@]}" --quiet || return 1
  await
}

# await: until the slice is there.
await() {
  local waited=0
  while :; do
    look ACTIVE
    case $STATE in
      ACTIVE)
        HELD=yes
        return 0
        ;;
      FAILED | SUSPENDING | SUSPENDED | DELETING | MISSING)
        [[ $STATE != SUSPEND* ]] || HELD=yes # preempted before anybody saw it
        say "the request for $NAME is $STATE; gcloud's reason: scripts/launch/tpu_vm.sh status"
        return 1
        ;;
    esac
    if [ "$waited" -ge "$WAIT" ]; then
      say "no slice after $waited s ($STATE)"
      return 1
    fi
    say "$NAME: $STATE"
    rest "$POLL"
    waited=$((waited + POLL))
  done
}

setup() {
  local source=$REPOSITORY bundle line
  if [ -z "$source" ]; then
    bundle=$(git -C "$ROOT" rev-parse --absolute-git-dir)/launch.bundle source=../tessera.bundle
    execute git -C "$ROOT" bundle create --quiet "$bundle" HEAD --branches || return 1
    tpus tpu-vm scp "$bundle" "$NAME:tessera.bundle" --worker=all --quiet
    [ -z "$INTERNAL_IP" ] || TPUS+=(--internal-ip)
    execute "${TPUS[@]}" || return 1
  fi
  line="set -e; [ -d tessera/.git ] || git init --quiet tessera; cd tessera; "
  line+="$(quoted git fetch --quiet --force "$source" '+refs/heads/*:refs/launch/*' +HEAD:refs/launch-head); "
  line+="$(quoted git checkout --quiet --force --detach "$COMMIT"); cd ..; "
  line+=$(worker_line install "--python_version=$PYTHON_VERSION" "--mount=$MOUNT" "--bucket=$BUCKET" "--nfs=$NFS")
  on_workers all "$line"
  execute "${TPUS[@]}" || return 1
}

# train: once, on all workers. gcloud exits with the first worker's code that is not 0.
train() {
  local code=0
  on_workers all "$(worker_line train "--attempt=$ATTEMPT" "--xla=$XLA" -- "${ARGUMENTS[@]}")"
  TRAINING=yes
  run_watched "${TPUS[@]}" || code=$?
  TRAINING=""
  return "$code"
}

stop() {
  on_workers all "$(worker_line stop)"
  execute "${TPUS[@]}"
}

status() {
  tpus queued-resources describe "$NAME"
  execute "${TPUS[@]}" || return 1
  tpus tpu-vm describe "$NAME" "--format=yaml(name,state,health,healthDescription,acceleratorType,createTime)"
  execute "${TPUS[@]}" || return 1
}

delete() {
  tpus queued-resources delete "$NAME" --force --quiet
  execute "${TPUS[@]}"
}

new_attempt() {
  ATTEMPT=$(date +%s)-$$
}

# slice_is_lost CODE: whether the slice is gone or broken. A preemption may show a while after training felt it.
slice_is_lost() {
  local waited=0 unknown=0
  while :; do
    look ACTIVE
    if [ "$STATE" = ACTIVE ]; then look_at_node READY; fi
    case $STATE in
      UNKNOWN)
        [ "$unknown" -lt "$WAIT" ] || return 0
        unknown=$((unknown + POLL))
        ;;
      READY)
        # Preempted as train says, or a lost connection: no reason to look again.
        case $1 in "$EXIT_PREEMPTED" | 255) return 1 ;; esac
        [ "$waited" -lt "$SETTLE" ] || return 1
        waited=$((waited + POLL))
        ;;
      *)
        say "the slice is lost: $STATE"
        return 0
        ;;
    esac
    rest "$POLL"
  done
}

# attempt: everything that is missing, up to and including a training command.
attempt() {
  local line step
  if [ -z "$READY" ]; then
    look MISSING
    case $STATE in
      UNKNOWN) return 1 ;;
      MISSING) ;;
      *) say "there is a request $NAME already: $STATE" ;;
    esac
    CREATED=yes
    case $STATE in
      FAILED | SUSPENDING | SUSPENDED) delete && create || return 1 ;;
      MISSING) create || return 1 ;;
      *) await || return 1 ;;
    esac
    setup || return 1
    READY=yes
  fi
  on_workers 0 "$(worker_line step "--workdir=$WORKDIR")"
  step=$(query -1 "${TPUS[@]}") || return 1
  if [ -n "$LAST_STEP" ] && [ "$step" -gt "$LAST_STEP" ]; then STALLED=0; fi
  LAST_STEP=$step
  [ "$STALLED" -lt "$MAX_STALLED" ] || return 1
  train
}

run() {
  local code
  check_bucket
  trap 'tear_down $?' EXIT
  trap 'interrupted INT 130' INT
  trap 'interrupted TERM 143' TERM
  trap 'interrupted HUP 129' HUP
  new_attempt
  while :; do
    code=0
    attempt || code=$?
    if [ "$code" -eq 0 ]; then return 0; fi
    say "this attempt ended with exit code $code"
    if [ "$SIGNALS" -gt 0 ] || [ "$code" -eq "$EXIT_MISTAKE" ]; then return "$code"; fi
    STALLED=$((STALLED + 1))
    if [ "$STALLED" -gt "$MAX_STALLED" ]; then
      say "giving up: $MAX_STALLED attempts in a row left no newer checkpoint"
      return 1
    fi
    if [ -n "$HELD" ] && slice_is_lost "$code"; then
      delete || true
      READY="" HELD=""
      new_attempt
    elif [ "$code" -eq 255 ] && [ -n "$READY" ]; then
      say "the connection was lost, the slice was not: looking for the training"
    elif [ "$code" -eq "$EXIT_PREEMPTED" ]; then
      new_attempt
    else
      return 1
    fi
    rest "$PAUSE"
    if [ "$SIGNALS" -gt 0 ]; then return "$EXIT_PREEMPTED"; fi
  done
}

# interrupted NAME CODE: a training is asked to save, and the run ends with it; anything else ends now.
# shellcheck disable=SC2329 # called by a trap
interrupted() {
  SIGNALS=$((SIGNALS + 1))
  [ -n "$TRAINING" ] || exit "$2"
  say "SIG$1: saving, then deleting the slice"
  stop || say "the workers could not be told; a second signal deletes the slice at once"
  [ "$SIGNALS" -lt 2 ] || exit "$2"
}

# tear_down CODE: nothing may stay that is billed. Signals are ignored meanwhile.
# shellcheck disable=SC2329 # called by a trap
tear_down() {
  trap '' INT TERM HUP
  trap - EXIT
  [ -z "$CHILD" ] || kill "$CHILD" 2> /dev/null || true
  [ -z "$CREATED" ] || delete ||
    say "THE SLICE MAY STILL EXIST AND BE BILLED; run: scripts/launch/tpu_vm.sh delete --name=$NAME --zone=$ZONE"
  exit_as "$1"
}

# check_training: train's arguments name a run folder that all workers see; gets the flag that joins the processes.
check_training() {
  require_training
  case $WORKDIR in
    gs://*) mistake "--workdir=$WORKDIR: this launcher watches run folders through the mount; give a folder below $MOUNT" ;;
    "$MOUNT"/?*) ;;
    *) mistake "--workdir=$WORKDIR is on the worker's own disk and would be lost with it; give a folder below $MOUNT" ;;
  esac
  [ -n "$(train_argument distributed)" ] || ARGUMENTS+=(--distributed=auto)
}

check_commit() {
  if [ -z "$COMMIT" ]; then
    COMMIT=$(git -C "$ROOT" rev-parse HEAD) || mistake "this is no git clone; give --repository and --commit"
    [ -z "$(git -C "$ROOT" status --porcelain)" ] ||
      mistake "there are uncommitted changes, which the workers would not get; commit them or give --commit=HEAD"
  elif [ -z "$REPOSITORY" ]; then
    COMMIT=$(git -C "$ROOT" rev-parse --verify --quiet "$COMMIT^{commit}") || mistake "this clone has no such --commit"
  fi
}

main() {
  local command=${1:-} code=0
  case $command in
    create | setup | train | run | stop | status | delete) shift ;;
    --help | -h | help) usage && exit ;;
    "") mistake "say what to do: run, create, setup, train, stop, status or delete; see --help" ;;
    *) mistake "unknown command $command: run, create, setup, train, stop, status or delete; see --help" ;;
  esac
  read_settings "name zone project accelerator_type runtime_version service_account network subnetwork bucket nfs \
    mount commit repository python_version poll wait settle pause max_stalled xla" "spot internal_ip dry_run" "$@"
  BUCKET=${BUCKET#gs://} BUCKET=${BUCKET%/} MOUNT=${MOUNT:-/mnt/tessera} MOUNT=${MOUNT%/}
  PYTHON_VERSION=${PYTHON_VERSION:-3.11}
  POLL=${POLL:-30} WAIT=${WAIT:-86400} SETTLE=${SETTLE:-120} PAUSE=${PAUSE:-30} MAX_STALLED=${MAX_STALLED:-5}
  require name zone
  require_number poll wait settle pause max_stalled
  check_xla
  [ "$POLL" -gt 0 ] || mistake "--poll must be at least 1 second"
  case $command in
    create | run)
      require accelerator_type
      [ -n "$RUNTIME_VERSION" ] || RUNTIME_VERSION=$(default_runtime)
      ;;
  esac
  case $command in
    setup | run)
      [ -n "$BUCKET$NFS" ] || mistake "--bucket is missing; give --bucket=NAME, or --nfs=HOST:/SHARE"
      [ -z "$BUCKET" ] || [ -z "$NFS" ] || mistake "give --bucket or --nfs, not both"
      [[ $BUCKET != */* ]] || mistake "--bucket=$BUCKET must be the name of a whole bucket"
      check_commit
      ;;
  esac
  case $command in train | run) check_training ;; esac
  case $command in
    run) run || code=$? ;;
    create) create || code=$? ;;
    setup)
      check_bucket
      setup || code=$?
      ;;
    train)
      new_attempt
      train || code=$?
      ;;
    stop) stop || code=$? ;;
    status) status || code=$? ;;
    delete) delete || code=$? ;;
  esac
  exit_as "$code"
}

main "$@"
