# shellcheck shell=bash
# The paper's runs. Sourced by table1_*.sh, one column of Table 1 each, and by pretrain_7b.sh:
#
#   scripts/table1_130m.sh            on the GPUs of this machine
#   sbatch scripts/table1_130m.sh     as a Slurm job, which queues itself again until all is done
#   scripts/table1_130m.sh --print    only says what it takes
#
# In the environment: NORMS ["POST DEEPNORM MIX PRE LNS"], SEEDS [1], GPUS [all], BATCH, sequences a GPU takes at a time
# [64], DATA [data/c4], OUT [runs/NAME]; MFU [0.4] and PEAK_TFLOPS [989: H100, bf16], from which the hours follow.
#
# A step takes 512 documents, each cut or padded to 256 tokens; Adam without decay or clipping, cosine to a tenth.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() { echo "$name: $*" >&2; exit 1; }
calculate() { awk "BEGIN { print ($1) }"; }

# Builds the trainer of a NORM, prints its path.
build() {
    local said
    said=$(make --no-print-directory --silent -j"$(nproc)" train_gpt NORM="$1") || return
    sed -n 's/^\.\/train_gpt is \([^ ]*\).*/\1/p' <<<"$said"
}

# What --dry-run says: parameters, steps, tokens, operations, MiB, and how many of these do not depend on the batch.
needs() {
    awk '{ gsub(",", "") }
        /^model/ { parameters = $(NF - 1) }
        /^work/ { steps = $2; tokens = $8; operations = $(NF - 2) }
        /^  (parameters|gradients|AdamW)/ { state += $(NF - 1) }
        /^  total/ { mib = $(NF - 1) }
        END { if (mib) print parameters, steps, tokens, operations, mib, state }'
}

hours() { printf '%.1f h' "$(calculate "$1 / ($gpus * $peak * 1e12 * $mfu) / 3600")"; }

# Prints what each variant takes. Afterwards `trainer` is the last, `steps` what it says, `mib` the most memory of any.
plan() {
    local norm said all=0 most=0 parameters tokens operations each
    for norm in $norms; do
        trainer=$(build "$norm") || exit
        said=$("$trainer" "${flags[@]}" --dry-run | needs) || exit
        read -r parameters steps tokens operations each state <<<"$said"
        printf '%-9s%s parameters, %s steps, %s tokens with padding, %s operations: %s, %s MiB a GPU\n' "$norm" \
            "$parameters" "$steps" "$tokens" "$operations" "$(hours "$operations")" "$each"
        all=$(calculate "$all + $operations") most=$(calculate "$each > $most ? $each : $most")
    done
    mib=$most
    echo "together $(hours "$all") on $gpus GPUs of $peak TFLOP/s (PEAK_TFLOPS) at an MFU of $mfu (MFU), without" \
        "validation; memory as planned by ${trainer%/*}"
}

# Fails where the GPUs cannot do it.
check_gpus() {
    local memory
    if [[ $trainer == build/cpu-* ]]; then
        [[ ${DEVICE:-} == cpu ]] ||
            fail "this is the CPU's build: start it where nvcc and GPUs are, or with DEVICE=cpu"
        return
    fi
    memory=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits 2>/dev/null | sort -n | head -1) || true
    [[ $memory =~ ^[0-9]+$ ]] || fail "no GPU answers: start it on a machine that has one, or: sbatch scripts/$name.sh"
    local own=1024  # MiB that CUDA and NCCL take for themselves, a guess on the safe side
    if (($(calculate "$mib + $own <= $memory"))); then return; fi
    local advice="lower BATCH (now $batch)"
    if (($(calculate "$state + $own > $memory"))); then
        advice="$state MiB of it whatever BATCH is, so it takes larger GPUs"
    fi
    fail "needs $mib MiB a GPU and $own for CUDA, the smallest GPU has $memory: $advice"
}

check_data() {
    if compgen -G "$data/train_*.bin" >/dev/null; then return; fi
    local documents_a_file=356317  # of C4: 364,868,892 in 1024 files
    fail "no shards in $data: scripts/fetch_data.py c4 --files $(((steps * 512 - 1) / documents_a_file + 1)) --out $data" \
        "(a new document for each sequence)"
}

# paper_run NAME FLAGS... -- [--print]
paper_run() {
    name=$1
    flags=()
    while shift && [[ $1 != -- ]]; do flags+=("$1"); done
    if (($# > 2)) || [[ ${2:---print} != --print ]]; then echo "usage: scripts/$name.sh [--print]" >&2; exit 2; fi

    norms=${NORMS:-POST DEEPNORM MIX PRE LNS} data=${DATA:-data/c4} peak=${PEAK_TFLOPS:-989} mfu=${MFU:-0.4}
    gpus=${GPUS:-${SLURM_NTASKS:-$(nvidia-smi --list-gpus 2>/dev/null | grep -c ^GPU || true)}}
    if ((gpus == 0)); then gpus=1; fi
    batch=${BATCH:-$((gpus > 8 ? 512 / gpus : 64))}
    ((512 % (batch * gpus) == 0)) || fail "BATCH=$batch on $gpus GPUs: their product must divide a step's 512 sequences"
    # A login node has nvcc and no GPU: its plan is the GPU's all the same.
    if PATH=$PATH:/usr/local/cuda/bin command -v nvcc >/dev/null; then export DEVICE=${DEVICE:-cuda}; fi

    flags+=(--total-batch-size 131072 --seq-len 256 --batch-size "$batch" --pack documents
        --beta1 0.9 --beta2 0.999 --eps 1e-8 --weight-decay 0 --grad-clip 0 --schedule cosine --min-lr-ratio 0.1
        --train "$data/train_*.bin" --val "$data/val_*.bin" --eval-every 1000 --eval-tokens 10000000
        --save-every 1000 --keep 2)
    plan
    if [[ ${2:-} ]]; then return; fi
    check_gpus
    check_data
    local status=0
    scripts/sweep.py --norms "$norms" --seeds "${SEEDS:-1}" --ranks "$gpus" --out "${OUT:-runs/$name}" -- \
        "${flags[@]}" || status=$?
    if ((status == 3)) && [[ ${SLURM_JOB_ID:-} ]]; then scontrol requeue "$SLURM_JOB_ID"; fi
    return $status
}
