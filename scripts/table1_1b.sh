#!/usr/bin/env bash
# Table 1, 1B: see paper_run.py. Published perplexities: POST 1390.75, DEEPNORM 1409.08, MIX 1414.78, PRE 17.02,
# LNS 15.71. The warm-up is as short as the released script has it.
#SBATCH --nodes=1 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=8
#SBATCH --time=24:00:00 --signal=USR1@120 --requeue --open-mode=append --output=%x-%j.log
here=$(dirname "$0")
if [[ ! -e $here/paper_run.py ]]; then here=$SLURM_SUBMIT_DIR/scripts; fi  # sbatch runs a copy
exec "$here/paper_run.py" table1_1b --model llama-1b --lr 5e-4 --steps 100000 --warmup 1000 -- "$@"
