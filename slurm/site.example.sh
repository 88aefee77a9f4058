# shellcheck shell=bash
# A site's settings.  Copy to site.sh (which git ignores), and before submitting: source slurm/site.sh
#
# Everything that starts with SBATCH_ is read by sbatch itself.

# export SBATCH_ACCOUNT=my-account
# export SBATCH_PARTITION=gpu

# export GPC_VENV=/shared/megatron-gpc/.venv        # default: .venv in the repository
# export GPC_WRAP="apptainer exec --nv /shared/images/megatron-gpc.sif"
# export GPC_SRUN="--container-image=/shared/images/megatron-gpc.sqsh --container-mounts=/shared"  # pyxis:
#                                                   # GPC_VENV is needed outside the container as well
# export GPC_INTERFACE=eth0                         # default: the one that leads to the other nodes
# export GPC_SECRETS=~/.config/megatron-gpc/secrets # mode 0600, lines of `export NAME=value`
# export GPC_PREFLIGHT=0                           # start without looking at the nodes first
# export GPC_LEAD_S=1800                           # as in sbatch --signal=B:USR1@1800; default: 900
# export GPC_MAX_ATTEMPTS=20                        # how often a job goes back into the queue
