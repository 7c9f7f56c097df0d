#!/usr/bin/env bash
# PRE and LNS at 7B on 20B tokens: see paper_run.py. The paper reports losses of 2.69 and 2.50, of an OLMo-style
# model; learning rate, warm-up and the shape of a step are chosen here. With the whole AdamW state on each GPU a
# parameter takes 18 bytes (fp32 master, gradient and two moments, bf16 copy): 113 GiB before any activation.
#SBATCH --nodes=1 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=8
#SBATCH --time=24:00:00 --signal=USR1@120 --requeue --open-mode=append --output=%x-%j.log
here=$(dirname "$0")
if [[ ! -e $here/paper_run.py ]]; then here=$SLURM_SUBMIT_DIR/scripts; fi  # sbatch runs a copy
export NORMS=${NORMS:-PRE LNS} BATCH=${BATCH:-16}
exec "$here/paper_run.py" pretrain_7b --model llama-7b --lr 3e-4 --steps 152588 --warmup 2000 -- "$@"
