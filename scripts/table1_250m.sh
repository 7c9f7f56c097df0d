#!/usr/bin/env bash
# Table 1, 250M: see paper_run.py. Published perplexities: POST 1409.79, DEEPNORM 22.77, MIX 21.39, PRE 21.92,
# LNS 20.35.
#SBATCH --nodes=1 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=8
#SBATCH --time=24:00:00 --signal=USR1@120 --requeue --open-mode=append --output=%x-%j.log
here=$(dirname "$0")
if [[ ! -e $here/paper_run.py ]]; then here=$SLURM_SUBMIT_DIR/scripts; fi  # sbatch runs a copy
exec "$here/paper_run.py" table1_250m --model llama-250m --lr 1e-3 --steps 40000 --warmup 4000 -- "$@"
