#!/usr/bin/env bash
# Trains on the GPUs of this machine until the run is finished: `gpu.sh --help`.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# shellcheck source=scripts/launch/command.sh
source "$ROOT/scripts/launch/command.sh"
# shellcheck source=scripts/launch/xla_flags.sh
source "$ROOT/scripts/launch/xla_flags.sh"

usage() {
  cat << 'END'
usage: scripts/launch/gpu.sh COMMAND [--SETTING=VALUE ...] [-- TRAIN_ARGUMENT ...]

Trains on the GPUs of this machine, and again while train says that it was preempted (exit code 75).

  install      make .venv and add JAX for NVIDIA GPUs (the `cuda` extra, at the versions of requirements.lock)
  train        run `python -m train TRAIN_ARGUMENT ...` in .venv, again after 75
  run          both

  --log=FILE         append everything to FILE as well; --detach sets it to WORKDIR.log
  --detach=HOW       go on without this terminal: in `tmux` or under `nohup`
  --pause=10         seconds before another start
  --max_stalled=5    give up after so many starts in a row that left no newer checkpoint
  --xla="FLAG ..."   flags of the XLA compiler, which win over the usual ones of scripts/launch/xla_flags.sh and over
                     your own XLA_FLAGS; `none` switches the usual ones off
  --dry_run          print the commands, run none

Each setting can be given as TESSERA_<SETTING> too; paths are relative to the repository. SIGINT and SIGTERM are passed
on to the training process, which saves; then it is not started again. Exit codes: 0 finished, 75 stopped and saved, 2 a
mistake, 1 anything else.

  scripts/launch/gpu.sh run --detach=tmux -- --config=configs/scenes/dalle.py --workdir=runs/dalle
END
}

PYTHON=$ROOT/.venv/bin/python

install() {
  local stamp=$ROOT/.venv/.cuda
  if [ "$stamp" -nt "$ROOT/setup.py" ] && [ "$stamp" -nt "$ROOT/requirements.lock" ]; then return; fi
  execute make --no-print-directory -C "$ROOT" .venv/.base
  # If this is cut short, `make` finds .venv-incomplete and makes the environment anew: see the Makefile.
  execute mkdir -p "$ROOT/.venv-incomplete"
  execute "$PYTHON" -m pip --disable-pip-version-check --quiet install -c "$ROOT/requirements.lock" -e "${ROOT}[cuda]"
  execute touch "$stamp"
  execute rmdir "$ROOT/.venv-incomplete"
}

# stop NAME SIGNAL: what a signal NAME does: the training process gets SIGNAL.
stop() {
  SIGNALS=$((SIGNALS + 1))
  say "SIG$1: no other start"
  [ -z "$CHILD" ] || kill -s "$2" "$CHILD" 2> /dev/null || true
}

train() {
  local code before step
  [ -n "$DRY_RUN" ] || [ -x "$PYTHON" ] || mistake "there is no .venv; run: scripts/launch/gpu.sh install"
  trap 'stop INT INT' INT
  trap 'stop TERM TERM' TERM
  trap 'stop HUP TERM' HUP
  export_xla_flags XLA_FLAGS "${GPU_FLAGS[@]}"
  step=$(newest_step "$WORKDIR")
  while :; do
    code=0
    run_watched "$PYTHON" -m train "${ARGUMENTS[@]}" || code=$?
    [ -z "$DRY_RUN" ] || return 0 # one start, without trouble
    say "train ended with exit code $code"
    if [ "$code" -ne "$EXIT_PREEMPTED" ] || [ "$SIGNALS" -gt 0 ]; then break; fi
    before=$step
    step=$(newest_step "$WORKDIR")
    if [ "$step" -gt "$before" ]; then STALLED=0; else STALLED=$((STALLED + 1)); fi
    if [ "$STALLED" -ge "$MAX_STALLED" ]; then
      say "giving up: $STALLED starts in a row left no newer checkpoint in $WORKDIR"
      exit 1
    fi
    rest "$PAUSE"
    [ "$SIGNALS" -eq 0 ] || break
  done
  exit_as "$code"
}

# detach: this command again, apart from the terminal.
detach() {
  local self=(bash "$ROOT/scripts/launch/gpu.sh" "$COMMAND" "--pause=$PAUSE" "--max_stalled=$MAX_STALLED"
    "--xla=$XLA" "--detach=") session
  LOG=${LOG:-${WORKDIR%/}.log}
  [[ $DETACH =~ ^(tmux|nohup)$ ]] || mistake "--detach=$DETACH is neither tmux nor nohup"
  execute mkdir -p "$(dirname "$LOG")"
  case $DETACH in
    tmux)
      session=$(basename "$WORKDIR" | tr -c '[:alnum:]_\n' -)
      execute tmux new-session -d -s "$session" -c "$PWD" "${self[@]}" "--log=$LOG" -- "${ARGUMENTS[@]}"
      say "follow: tmux attach -t $session; stop: Ctrl-C there"
      ;;
    nohup)
      if [ -n "$DRY_RUN" ]; then
        printf '%s >> %s 2>&1 < /dev/null &\n' "$(quoted nohup "${self[@]}" -- "${ARGUMENTS[@]}")" "$(quoted "$LOG")"
        return
      fi
      set -m # so that the new process does not start with SIGINT ignored
      nohup "${self[@]}" -- "${ARGUMENTS[@]}" >> "$LOG" 2>&1 < /dev/null 3>&- &
      set +m
      say "follow: tail -f $(quoted "$LOG"); stop: kill $!"
      ;;
  esac
}

main() {
  COMMAND=${1:-}
  case $COMMAND in
    install | train | run) shift ;;
    --help | -h | help) usage && exit ;;
    "") mistake "say what to do: install, train or run; see --help" ;;
    *) mistake "unknown command $COMMAND: install, train or run; see --help" ;;
  esac
  read_settings "log detach pause max_stalled xla" "dry_run" "$@"
  PAUSE=${PAUSE:-10} MAX_STALLED=${MAX_STALLED:-5}
  require_number pause max_stalled
  check_xla
  [ "$COMMAND" = install ] || require_training
  cd "$ROOT"
  if [ "$COMMAND" != install ] && [ -n "$DETACH" ]; then
    detach
    return
  fi
  if [ -n "$LOG" ] && [ -z "$DRY_RUN" ]; then
    mkdir -p "$(dirname "$LOG")"
    exec > >(tee -i -a "$LOG") 2>&1
  fi
  [ "$COMMAND" = train ] || install
  [ "$COMMAND" = install ] || train
}

main "$@"
