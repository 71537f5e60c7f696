#!/usr/bin/env bash
# What tpu_vm.sh runs on every worker of a Cloud TPU slice (Ubuntu), in the copy of the repository there.
#
#   tpu_worker.sh install --python_version=VERSION --mount=FOLDER (--bucket=NAME | --nfs=HOST:/SHARE)
#   tpu_worker.sh train --attempt=ID [--xla="FLAG ..."] -- TRAIN_ARGUMENT ...
#                                                             prints what training prints; exits with its code
#   tpu_worker.sh stop                                        asks it to save and end
#   tpu_worker.sh step --workdir=FOLDER                       step of the newest checkpoint, -1 without one
#
# Training does not hang on the ssh connection that started it: a lost connection leaves it running, and the same
# command, which gcloud repeats by itself, finds it again by its ID or takes the exit code that it left.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# shellcheck source=scripts/launch/command.sh
source "$ROOT/scripts/launch/command.sh"
# shellcheck source=scripts/launch/xla_flags.sh
source "$ROOT/scripts/launch/xla_flags.sh"
FOLDER=$HOME/tessera_launch # lock, pid, command and log of the training process, and the code it left

usage() {
  sed -n '2,/^set /{/^#/s/^# \{0,1\}//p;}' "$ROOT/scripts/launch/tpu_worker.sh"
}

install() {
  export PATH=$HOME/.local/bin:$PATH
  # Images of TPU VMs may have a Python older than 3.11; uv brings its own.
  command -v uv > /dev/null || curl --retry 5 -LsSf https://astral.sh/uv/install.sh | sh
  cd "$ROOT"
  [ -x .venv/bin/python ] || uv venv --quiet --python "$PYTHON_VERSION" .venv
  uv pip install --quiet --python .venv/bin/python -c requirements.lock -e '.[tpu]'
  mount_storage
  if ! is_running; then rm -f "$FOLDER/code"; fi
}

mount_storage() {
  if mountpoint --quiet "$MOUNT"; then return; fi
  sudo mkdir -p "$MOUNT"
  if [ -n "$NFS" ]; then
    command -v mount.nfs > /dev/null || apt_install nfs-common
    sudo mount -t nfs "$NFS" "$MOUNT"
    return
  fi
  if ! command -v gcsfuse > /dev/null; then
    curl --retry 5 -LsSf https://packages.cloud.google.com/apt/doc/apt-key.gpg |
      sudo tee /usr/share/keyrings/cloud.google.asc > /dev/null
    echo "deb [signed-by=/usr/share/keyrings/cloud.google.asc] https://packages.cloud.google.com/apt" \
      "gcsfuse-$(lsb_release -cs) main" | sudo tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null
    apt_install gcsfuse
  fi
  sudo chown "$(id -u):$(id -g)" "$MOUNT"
  # Without caches, since workers read what others wrote; large machines would keep metadata for ever.
  gcsfuse --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 --kernel-list-cache-ttl-secs=0 \
    "$BUCKET" "$MOUNT"
}

apt_install() {
  # A fresh VM may still be upgrading itself, and holds the lock then.
  sudo apt-get -o DPkg::Lock::Timeout=600 update --quiet
  sudo DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=600 install --yes --quiet "$1"
}

is_running() {
  mkdir -p "$FOLDER"
  ! flock --nonblock "$FOLDER/lock" true
}

train() {
  local command id="" code="" pid lines=+1
  mkdir -p "$FOLDER"
  cd "$ROOT"
  command=$(quoted "${ARGUMENTS[@]}")
  exec 9>> "$FOLDER/lock"
  if flock --nonblock 9; then
    if [ -f "$FOLDER/code" ]; then read -r id code < "$FOLDER/code"; fi
    if [ "$id" = "$ATTEMPT" ]; then
      say "it ended with exit code $code while the connection was lost"
      exit "$code"
    fi
    printf '%s\n' "$command" > "$FOLDER/command"
    : > "$FOLDER/log"
    # The lock is held by whoever has descriptor 9 open.
    setsid bash "$ROOT/scripts/launch/tpu_worker.sh" supervise "--attempt=$ATTEMPT" "--xla=$XLA" \
      -- "${ARGUMENTS[@]}" \
      >> "$FOLDER/log" 2>&1 < /dev/null 3>&- &
    pid=$!
    printf '%s\n' "$pid" > "$FOLDER/pid"
  else
    [ "$(cat "$FOLDER/command")" = "$command" ] || mistake "this worker is training something else:" \
      "$(cat "$FOLDER/command"); end it with: scripts/launch/tpu_vm.sh stop"
    pid=$(cat "$FOLDER/pid") lines=20
    say "already training; its last $lines lines and what follows:"
  fi
  exec 9>&-
  tail --pid="$pid" --sleep-interval=0.2 --lines="$lines" --follow "$FOLDER/log" # until that process ends
  if [ -f "$FOLDER/code" ]; then read -r id code < "$FOLDER/code"; fi
  [ -n "$code" ] || say "the training process was killed"
  exit "${code:-1}"
}

supervise() {
  local code=0 seen
  rm -f "$FOLDER/code"
  trap 'SIGNALS=$((SIGNALS + 1)); kill -s TERM "$CHILD" 2> /dev/null || true' TERM
  export_xla_flags LIBTPU_INIT_ARGS "${TPU_FLAGS[@]}"
  "$ROOT/.venv/bin/python" -m train "${ARGUMENTS[@]}" 9>&- &
  CHILD=$!
  while :; do
    seen=$SIGNALS code=0
    wait "$CHILD" || code=$?
    [ "$seen" != "$SIGNALS" ] || break
  done
  printf '%s %s\n' "$ATTEMPT" "$code" > "$FOLDER/code.tmp"
  mv "$FOLDER/code.tmp" "$FOLDER/code"
}

stop() {
  if is_running; then kill -s TERM "$(cat "$FOLDER/pid")"; fi
}

main() {
  local command=${1:-}
  case $command in
    install | train | supervise | stop | step) shift ;;
    *) usage && exit "$EXIT_MISTAKE" ;;
  esac
  read_settings "python_version mount bucket nfs attempt workdir xla" "" "$@"
  "$command"
}

step() {
  newest_step "$WORKDIR"
}

main "$@"
