# shellcheck shell=bash
# What all jobs in this folder share.  Sourced by them; docs/slurm.md says what for.
#
# Site settings come from the environment, see site.example.sh.

set -euo pipefail

GPC_VENV=${GPC_VENV:-$ROOT/.venv}
GPC_WRAP=${GPC_WRAP:-}                 # put before every command, such as: apptainer exec --nv IMAGE
GPC_SRUN=${GPC_SRUN:-}                 # more options for every srun, such as pyxis' --container-image
GPC_MAX_ATTEMPTS=${GPC_MAX_ATTEMPTS:-20}
GPC_SECRETS=${GPC_SECRETS:-}           # a file with mode 0600 of `export NAME=value` lines

# Ranks and engines open many files; a login shell's soft limit comes along with the job.
ulimit -n "$(ulimit -Hn)" 2>/dev/null || true

say() { echo "[$(date +%T)] $*" >&2; }
die() { echo "slurm: $*" >&2; exit 2; }
((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || die "bash $BASH_VERSION is too old: 4.4 is needed"

# gpc COMMAND...: megatron-gpc as configured.  The unquoted words are meant to split.
# shellcheck disable=SC2206
GPC=($GPC_WRAP "$GPC_VENV/bin/megatron-gpc")

check_venv() {
  [[ -x $GPC_VENV/bin/megatron-gpc || -n $GPC_WRAP ]] ||
    die "$GPC_VENV has no megatron-gpc: run 'make .venv/.installed' in $ROOT, or set GPC_VENV"
}

# value KEY: of the resolved configuration, such as rollout.replay; empty if it is null or an empty list.
# shellcheck disable=SC2086
value() {
  $GPC_WRAP "$GPC_VENV/bin/python" -c 'import functools, sys, yaml
print(functools.reduce(dict.__getitem__, sys.argv[1].split("."), yaml.safe_load(sys.stdin)) or "")' "$1" <<<"$RESOLVED"
}

# read_secrets: from GPC_SECRETS into the environment.
read_secrets() {
  [[ -n $GPC_SECRETS ]] || return 0
  [[ $(stat -c %a "$GPC_SECRETS") == 600 ]] || die "$GPC_SECRETS: must have mode 0600"
  # shellcheck source=/dev/null
  source "$GPC_SECRETS"
}

# read_arguments [--dry-run] CONFIG [key=value ...]: sets DRY_RUN, RUN (for megatron-gpc), RUN_DIR.
read_arguments() {
  local word
  DRY_RUN='' RUN=()
  for word in "$@"; do
    if [[ $word == --dry-run ]]; then DRY_RUN=1; else RUN+=("$word"); fi
  done
  ((${#RUN[@]} > 0)) || die "no configuration: sbatch $(basename "$0") CONFIG [key=value ...]"
  check_venv
  RESOLVED=$("${GPC[@]}" train "${RUN[@]}" --dry-run) || exit 2
  RUN_DIR=$(value run_dir)
  if [[ -n $DRY_RUN ]]; then
    grep '^#SBATCH' "$0" || true
    printf '%s\n' "# would run: ${GPC[*]} train ${RUN[*]}" "$RESOLVED"
    exit 0
  fi
  [[ -n ${SLURM_JOB_ID:-} ]] || die "not in a job: submit this with sbatch, or add --dry-run"
  read_secrets
}

# ---- attempts ----

newest_step() { # the newest complete checkpoint's; 0 if there is none
  find "$RUN_DIR/checkpoints" -maxdepth 1 -name 'step_*' 2>/dev/null |
    sed -n 's/.*step_0*\([0-9][0-9]*\)$/\1/p' | sort -n | tail -n 1 | grep . || echo 0
}

# The environment but for what may be secret, by its name or as an address with a password.
kept_environment() {
  env -0 | grep -zEiv '^[^=]*(key|token|secret|pass|credential|cookie|auth|jwt)[^=]*=|^[^=]*=.*://[^[:space:]]*@' |
    sort -z | tr '\0' '\n'
}

# begin_attempt: numbers this attempt, keeps what it starts from, refuses to go on in vain.
begin_attempt() {
  ATTEMPT=${SLURM_RESTART_COUNT:-0}
  local step lock number=1 log=$RUN_DIR/attempts/log
  for lock in "$RUN_DIR/lock" "$RUN_DIR/launch.lock"; do # before anything of a run that goes on is moved
    if [[ -e $lock ]] && ! flock --nonblock "$lock" true; then
      die "run_dir: $RUN_DIR is in use by a run that has not ended; wait for it, or choose another run_dir"
    fi
  done
  # resume=none is for the first attempt alone, and before anything of it lies in the folder.
  if ((ATTEMPT == 0)) && [[ $(value resume) == none && -d $RUN_DIR ]]; then
    while [[ -e $RUN_DIR.old-$number ]]; do ((number += 1)); done
    mv "$RUN_DIR" "$RUN_DIR.old-$number"
    say "resume=none: the old run was set aside as $RUN_DIR.old-$number"
  fi
  RUN+=(resume=auto)
  step=$(newest_step)
  ATTEMPT_DIR=$RUN_DIR/attempts/$SLURM_JOB_ID.$ATTEMPT
  mkdir -p "$ATTEMPT_DIR"
  ((ATTEMPT < GPC_MAX_ATTEMPTS)) ||
    die "attempt $ATTEMPT: no more than GPC_MAX_ATTEMPTS=$GPC_MAX_ATTEMPTS are made"
  if (($(tail -n 2 "$log" 2>/dev/null | grep -c "^$SLURM_JOB_ID [0-9]* $step\$" || true) == 2)); then
    die "no progress: two attempts began at step $step and so would this; see $RUN_DIR/attempts, mend the cause, submit anew"
  fi
  echo "$SLURM_JOB_ID $ATTEMPT $step" >>"$log"
  # What the attempt before said stays with it.
  if [[ -d $RUN_DIR/logs ]]; then mv "$RUN_DIR/logs" "$ATTEMPT_DIR/logs_before"; fi
  git -C "$ROOT" rev-parse HEAD >"$ATTEMPT_DIR/commit" 2>/dev/null || echo unknown >"$ATTEMPT_DIR/commit"
  printf '%s\n' "$RESOLVED" >"$ATTEMPT_DIR/config.yaml"
  (umask 077 && kept_environment >"$ATTEMPT_DIR/environment")
  say "job $SLURM_JOB_ID, attempt $ATTEMPT, from step $step, run $RUN_DIR"
}

# ---- where processes meet ----

# The job's ports, all below ip_local_port_range: a block of 40 from the job's number.
MASTER_PORT_OFFSET=0 # where ranks meet
ENGINE_PORT_OFFSET=8 # the first engine of a node
BLOCK=40

port_is_free() {
  ! (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null && ! (exec 3<>"/dev/tcp/$MASTER_ADDR/$1") 2>/dev/null
}

# network interface PEER | network adapters: which interface leads there; which adapters are active.
# shellcheck disable=SC2086
network() { $GPC_WRAP "$GPC_VENV/bin/python" -P -m megatron_gpc.run.network "$@"; }

# find_each_other: exports MASTER_ADDR, MASTER_PORT and the interfaces; sets NODES, ENGINE_PORT.
find_each_other() {
  mapfile -t NODES < <(scontrol show hostnames "${1:-$SLURM_JOB_NODELIST}")
  export MASTER_ADDR=${NODES[0]} MASTER_PORT
  local try base found=
  for try in {0..19}; do
    base=$((20000 + (SLURM_JOB_ID + 61 * try) % 300 * BLOCK))
    MASTER_PORT=$((base + MASTER_PORT_OFFSET))
    ENGINE_PORT=$((base + ENGINE_PORT_OFFSET))
    if port_is_free "$MASTER_PORT" && port_is_free "$ENGINE_PORT"; then found=1; break; fi
    say "port $MASTER_PORT or $ENGINE_PORT is taken; trying the next block"
  done
  [[ -n $found ]] || die "20 blocks of ports are taken on $(hostname): ss -ltnp names who listens there"
  local other=${NODES[-1]} interface adapters
  if [[ $other != "$MASTER_ADDR" || -n ${2:-} ]]; then
    other=${2:-$other}
    interface=${GPC_INTERFACE:-$(network interface "$other" || true)}
    [[ -n $interface ]] || die "no route to $other; set GPC_INTERFACE"
    export GLOO_SOCKET_IFNAME=$interface
    export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$interface}
  fi
  adapters=$(network adapters || true)
  if [[ -n $adapters ]]; then export NCCL_IB_HCA=${NCCL_IB_HCA:-$adapters}; fi
  say "ranks meet at $MASTER_ADDR:$MASTER_PORT${interface:+ over $interface}"
}

# ---- steps ----

# step OPTION... -- COMMAND...: srun, one task a node.
step() {
  local options=()
  while [[ $1 != -- ]]; do options+=("$1"); shift; done
  shift
  # shellcheck disable=SC2086
  exec srun --overlap --ntasks-per-node=1 --kill-on-bad-exit=1 --label --export=ALL --wait=60 \
    ${SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK} $GPC_SRUN "${options[@]}" "$@"
}

# preflight [OPTION...] -- DOCTOR_OPTION...: every node is looked at before anything is started on it.
preflight() {
  local where=()
  while [[ $1 != -- ]]; do where+=("$1"); shift; done
  shift
  if [[ ${GPC_PREFLIGHT:-1} == 0 ]]; then return; fi
  say "preflight"
  (step "${where[@]}" -- "${GPC[@]}" doctor "$@") ||
    die "preflight failed: the lines above name the node and what to do (GPC_PREFLIGHT=0 goes on without)"
}

TRAIN='' SERVE='' SIGNALLED='' CANCELLED=''
alive() { [[ -n $1 ]] && kill -0 "$1" 2>/dev/null; }

# The ranks save at the end of their step.  srun passes the signal on to every process of the step;
# SIGTERM would make it kill them.
on_usr1() {
  say "asked to make room: the run saves and ends"
  SIGNALLED=1
  if alive "$TRAIN"; then kill -USR1 "$TRAIN"; fi
}
# Slurm has sent it to the ranks as well: they are saving already.
on_term() {
  say "cancelled or out of time: the run saves, if KillWait lets it"
  CANCELLED=1
}
trap on_usr1 USR1
trap on_term TERM

# engines_are_ours: the configuration does not say that they are elsewhere, or not needed.
engines_are_ours() { [[ -z $(value rollout.server.urls)$(value rollout.server.urls_file)$(value rollout.replay) ]]; }

# start_serving OPTION...: engines on every node of the component, in the background.
start_serving() {
  URLS_FILE=$ATTEMPT_DIR/urls
  (umask 077 && head -c 24 /dev/urandom | base64 >"$ATTEMPT_DIR/api_key")
  SERVED=(rollout.server.urls_file="$URLS_FILE" rollout.server.api_key_file="$ATTEMPT_DIR/api_key")
  step "$@" -- "${GPC[@]}" serve "${RUN[@]}" "${SERVED[@]}" rollout.server.port="$ENGINE_PORT" &
  SERVE=$!
  RUN+=("${SERVED[@]}")
}

start_training() { # OPTION...
  if [[ -n $SIGNALLED ]]; then
    say "asked to make room before training began: is --time longer than the signal's lead?"
    requeue
  fi
  step "$@" -- "${GPC[@]}" train "${RUN[@]}" &
  TRAIN=$!
}

# supervise: waits for the training; sets CODE.  The end of the engines ends it.
supervise() { # without `wait -n -p`, which bash has from 5.1 on
  local code=0 watched=$SERVE
  while alive "$TRAIN"; do
    if [[ -n $watched ]] && ! alive "$watched"; then
      wait "$watched" || code=$?
      say "the engines have ended (exit code $code): ending the training"
      kill -TERM "$TRAIN" || true
      watched=''
    fi
    sleep 0.5 &
    wait $! || true # a signal ends it at once, and its trap has run
  done
  CODE=0
  wait "$TRAIN" || CODE=$?
  if alive "$SERVE"; then kill -TERM "$SERVE"; wait "$SERVE" || true; fi
}

# Where a site does not send a preempted job its own signal, only the ranks have heard of it.
preempted() { scontrol show job --oneliner "$SLURM_JOB_ID" | grep -q ' PreemptTime=[0-9]'; }

requeue() {
  scontrol requeue "$SLURM_JOB_ID" ||
    die "the job cannot go back into the queue (submitted with --no-requeue?): submit it again to continue"
  sleep 60 # Slurm ends this script
  exit 1
}

# end_attempt: requeues a run that was asked to end and has saved; otherwise exits with its code.
end_attempt() {
  "${GPC[@]}" status "$RUN_DIR" ${GPC_LEAD_S:+--lead "$GPC_LEAD_S"} >&2 || true
  if ((CODE == 0)); then say "the run has come to its end"; exit 0; fi
  if [[ -n $CANCELLED ]]; then exit "$CODE"; fi
  if [[ -f $RUN_DIR/stopped.json ]] && { [[ -n $SIGNALLED ]] || preempted; }; then
    say "saved at step $(newest_step): the job goes back into the queue"
    requeue
  fi
  say "the run failed with exit code $CODE; the first traceback: slurm/job.sh traceback $RUN_DIR"
  exit "$CODE"
}
