#!/usr/bin/env bash
# Table 1, 350M: see paper_run.py. Published perplexities: POST 1368.33, DEEPNORM 1362.59, MIX 1363.21, PRE 19.58,
# LNS 18.20.
#SBATCH --nodes=1 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=8
#SBATCH --time=24:00:00 --signal=USR1@120 --requeue --open-mode=append --output=%x-%j.log
here=$(dirname "$0")
if [[ ! -e $here/paper_run.py ]]; then here=$SLURM_SUBMIT_DIR/scripts; fi  # sbatch runs a copy
exec "$here/paper_run.py" table1_350m --model llama-350m --lr 5e-4 --steps 60000 --warmup 6000 -- "$@"
