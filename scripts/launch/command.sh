# shellcheck shell=bash disable=SC2034 # some variables are used only by those who source this
# What the launchers share: settings, quoting, commands that run or are only printed, and the count of fruitless
# attempts. Sourced; kept to what bash 3.2 (macOS) knows.

# Exit codes of `python -m train`, and of the launchers: 0 finished, and
EXIT_MISTAKE=2    # a user's mistake, said in one line
EXIT_PREEMPTED=75 # saved; the same command continues. Anything else is a failure, and is 1 by rule

DRY_RUN=""
ARGUMENTS=() # what stood behind --, for `python -m train`
SIGNALS=0    # how many stop signals have come
CHILD=""     # process that `run_watched` waits for
STALLED=0    # attempts in a row that ended without a newer checkpoint
exec 3>&1    # where --dry_run prints, also from inside $(...)

# mistake WORD...: one line, exit code 2.
mistake() {
  printf 'error: %s\n' "$*" >&2
  exit "$EXIT_MISTAKE"
}

# say WORD...: what the launcher does, apart from what training prints.
say() {
  printf '[%s] %s\n' "$(date '+%F %T')" "$*" >&2
}

# quoted WORD...: the words as one line that any POSIX shell splits into the same words again.
quoted() {
  local LC_ALL=C line="" word mark="'" escaped="'\\''"
  for word in "$@"; do
    case $word in
      "" | *[!A-Za-z0-9_@%+=:,./-]*) word="'${word//$mark/$escaped}'" ;;
    esac
    line="$line${line:+ }$word"
  done
  printf '%s\n' "$line"
}

# upper NAME: sets UPPER to it in capitals, without the ${NAME^^} of newer shells or another process.
upper() {
  local LC_ALL=C letters=abcdefghijklmnopqrstuvwxyz capitals=ABCDEFGHIJKLMNOPQRSTUVWXYZ letter before index
  UPPER=""
  for ((index = 0; index < ${#1}; index++)); do
    letter=${1:index:1}
    before=${letters%%"$letter"*}
    if [ "$before" != "$letters" ]; then letter=${capitals:${#before}:1}; fi
    UPPER+=$letter
  done
}

# read_settings "SETTING ..." "SWITCH ..." ARGUMENT...: fills a variable for each setting and switch, SETTING, from
# --setting=VALUE or --switch, else from the environment variable TESSERA_SETTING; what stands behind -- goes to
# ARGUMENTS.
read_settings() {
  local settings=" $1 " switches=" $2 " name variable
  shift 2
  for name in $settings $switches; do
    upper "$name"
    variable=TESSERA_$UPPER
    printf -v "$UPPER" '%s' "${!variable:-}"
  done
  while [ $# -gt 0 ]; do
    name=${1%%=*}
    name=${name#--}
    upper "$name"
    case $1 in
      --)
        shift
        ARGUMENTS=("$@")
        return
        ;;
      --help | -h)
        usage
        exit 0
        ;;
      --*=*)
        [[ $settings == *" $name "* ]] || mistake "unknown setting --$name; see --help"
        printf -v "$UPPER" '%s' "${1#*=}"
        ;;
      --*)
        [[ $settings != *" $name "* ]] || mistake "--$name needs a value: --$name=VALUE"
        [[ $switches == *" $name "* ]] || mistake "unknown switch --$name; see --help (train's own go behind --)"
        printf -v "$UPPER" yes
        ;;
      *) mistake "unexpected argument $1; see --help (train's own go behind --)" ;;
    esac
    shift
  done
}

# require SETTING...: they have values.
require() {
  local name
  for name in "$@"; do
    upper "$name"
    [ -n "${!UPPER}" ] || mistake "--$name is missing; give --$name=VALUE or set TESSERA_$UPPER"
  done
}

# require_number SETTING...: they are whole numbers.
require_number() {
  local name
  for name in "$@"; do
    upper "$name"
    [[ ${!UPPER} =~ ^[0-9]+$ ]] || mistake "--$name=${!UPPER} must be a whole number"
  done
}

# train_argument NAME: the value of --NAME among ARGUMENTS, the last one if there are several.
train_argument() {
  local word value="" next=""
  for word in ${ARGUMENTS[@]+"${ARGUMENTS[@]}"}; do
    case $word in
      "--$1="*) value=${word#*=} ;;
      *) [ -z "$next" ] || value=$word ;;
    esac
    next=""
    [ "$word" != "--$1" ] || next=yes
  done
  printf '%s\n' "$value"
}

# require_training: ARGUMENTS name a config and a run folder, which becomes WORKDIR.
require_training() {
  [ -n "$(train_argument config)" ] || mistake "give train's arguments behind --: -- --config=FILE --workdir=FOLDER"
  WORKDIR=$(train_argument workdir)
  [ -n "$WORKDIR" ] || mistake "--workdir is missing behind --: a run continues from its run folder"
}

# execute COMMAND...: runs it, or prints it with --dry_run.
execute() {
  if [ -n "$DRY_RUN" ]; then
    quoted "$@" >&3
    return
  fi
  say "+ $(quoted "$@")"
  "$@" 3>&-
}

# query ANSWER COMMAND...: prints what a command prints; with --dry_run prints the command and answers ANSWER.
query() {
  local answer=$1
  shift
  if [ -n "$DRY_RUN" ]; then
    quoted "$@" >&3
    printf '%s\n' "$answer"
    return
  fi
  "$@" 3>&-
}

# run_watched COMMAND...: like execute, but in a process group of its own, so that Ctrl-C reaches the traps of this
# script alone. A trap counts in SIGNALS; the command is waited for until it ends itself.
run_watched() {
  local status seen
  if [ -n "$DRY_RUN" ]; then
    execute "$@"
    return
  fi
  say "+ $(quoted "$@")"
  set -m
  "$@" < /dev/null 3>&- &
  CHILD=$!
  set +m
  while :; do
    seen=$SIGNALS status=0
    wait "$CHILD" || status=$?
    [ "$seen" != "$SIGNALS" ] || break # else a signal, not the command's end, may have ended the wait
  done
  CHILD=""
  return "$status"
}

# rest SECONDS: sleeps, and wakes when a trap has run.
rest() {
  [ -z "$DRY_RUN" ] || return 0
  sleep "$1" > /dev/null 2>&1 3>&- &
  wait $! || true
  kill $! 2> /dev/null || true
}

# newest_step WORKDIR: step of the newest checkpoint, or -1.
newest_step() {
  local newest=-1 path name
  for path in "$1"/checkpoints/*/; do
    name=$(basename "$path")
    if [[ $name =~ ^[0-9]+$ ]] && [ "$((10#$name))" -gt "$newest" ]; then newest=$((10#$name)); fi
  done
  printf '%s\n' "$newest"
}

# exit_as CODE: ends with the code of a training run, in which 1 stands for anything but 0, 2, 75 and a stop signal.
exit_as() {
  case $1 in
    0 | "$EXIT_MISTAKE" | "$EXIT_PREEMPTED" | 129 | 130 | 143) exit "$1" ;;
    *) exit 1 ;;
  esac
}
