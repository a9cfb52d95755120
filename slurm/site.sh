# What your cluster needs.  Copy this to ~/.config/referral/site.sh, for all your runs, or to
# RUN/site.sh, for one, which goes before it, and take the marks away from the lines that you want.
# It is read twice: where you submit, and again in every job.

if [ -z "${SLURM_JOB_ID:-}" ]; then
    # Where you submit: sbatch's own variables (man sbatch, INPUT ENVIRONMENT VARIABLES).  A key of
    # [slurm.STAGE] in the config goes before them.
    #export SBATCH_ACCOUNT=my-project
    #export SBATCH_PARTITION=gpu
    #export SBATCH_QOS=normal
    :
else
    # In a job, on its first node, before anything else.
    #module load cuda/12.4
    #export GLOO_SOCKET_IFNAME=ib0 NCCL_SOCKET_IFNAME=ib0
    #python=/shared/venvs/referral/bin/python           # otherwise the one that ran `referral`
    #container=(apptainer exec --nv /shared/referral.sif)  # before python; bind the run and shards
    #address_command=(hostname -I)                      # its first word must reach the other nodes
    :
fi
