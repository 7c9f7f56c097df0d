#!/usr/bin/env bash
# Table 1, 130M: see paper_run.py. Published perplexities: POST 26.95, DEEPNORM 27.17, MIX 26.07, PRE 26.73,
# LNS 25.76.
#SBATCH --nodes=1 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=8
#SBATCH --time=24:00:00 --signal=USR1@120 --requeue --open-mode=append --output=%x-%j.log
here=$(dirname "$0")
if [[ ! -e $here/paper_run.py ]]; then here=$SLURM_SUBMIT_DIR/scripts; fi  # sbatch runs a copy
exec "$here/paper_run.py" table1_130m --model llama-130m --lr 1e-3 --steps 20000 --warmup 2000 -- "$@"
