#!/bin/bash
# Look at a job or a run.
#
#   slurm/job.sh status RUN            how far it is, and what its last attempts were
#   slurm/job.sh traceback RUN         what the rank that failed first said
#   slurm/job.sh stacks JOB RUN        where every rank is at this moment
#   slurm/job.sh attach JOB [NODE]     a shell in the job
ROOT=${GPC_ROOT:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
# shellcheck source=slurm/common.sh
source "$ROOT/slurm/common.sh"

usage() { sed -n '2,8s/^# \?//p' "${BASH_SOURCE[0]}"; exit 2; }
case ${1:-} in
status | traceback | attach) (($# >= 2)) || usage ;;
stacks) (($# == 3)) || usage ;;
*) usage ;;
esac

case $1 in
status)
  "${GPC[@]}" status "$2"
  if [[ -f $2/attempts/log ]]; then
    echo "attempts (job, number, from step):"
    tail -n 5 "$2/attempts/log"
  fi ;;
traceback) "${GPC[@]}" status --traceback "$2" ;;
stacks)
  scancel --signal=USR2 "$2"
  sleep 2
  tail -n +1 "$3"/logs/rank_*.stacks ;;
attach)
  srun --jobid="$2" --overlap --pty ${3:+--nodelist="$3"} --ntasks=1 bash ;;
esac
