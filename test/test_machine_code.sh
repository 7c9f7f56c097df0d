#!/usr/bin/env bash
# Tests dev/machine_code.py on machine code made up here, which a made-up cuobjdump prints.
# shellcheck disable=SC2016  # the made-up tools expand their variables themselves
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
source test/checks.sh
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
tools=$folder/tools
mkdir "$tools"
export PATH=$tools:$PATH FOLDER=$folder
tool nvdisasm :
tool cuobjdump '[[ -e $2 ]] || { echo "cuobjdump fatal: no $2" >&2; exit 1; }; cat "$FOLDER/${1#-}"'

# kernel NAME REGISTERS SHARED, instructions on stdin: one a line, 16 bytes apart; a line "L:" is a label for "L".
kernel() {
    echo " Function $1:
  REG:$2 STACK:0 SHARED:$3 LOCAL:0 CONSTANT[0]:416 TEXTURE:0 SURFACE:0 SAMPLER:0" >>"$folder/res-usage"
    echo "		Function : $1" >>"$folder/sass"
    awk '
        /^[A-Za-z]+:$/ { sub(":", ""); address[$1] = sprintf("0x%x", 16 * n); next }
        NF { line[n++] = $0 }
        END {
            for (i = 0; i < n; i++) {
                for (label in address) sub("`" label "$", address[label], line[i])
                printf "        /*%04x*/                   %-50s /* 0x00000a00ff017b82 */\n", 16 * i, line[i] " ;"
                print "                                      /* 0x000fe20000000800 */"
            }
        }' >>"$folder/sass"
}
begin() {
    printf 'Fatbin elf code:\n================\narch = sm_90\n\tcode for sm_90\n' >"$folder/sass"
    printf 'Fatbin elf code:\n================\narch = sm_90\n\nResource usage:\n' >"$folder/res-usage"
}
touch "$folder/object"
# promised LINE...: what becomes of the kernels under these promises
promised() {
    printf '%s\n' "$@" >"$folder/promises"
    run dev/machine_code.py "$folder/object" bf16 "$folder/promises"
}

# Rows in words of 16 bytes, each with a statistic of 4, and a token before; behind the loop, in the middle of its
# addresses, an epilogue that stores narrowly, once.
begin
kernel _Z4widev 32 0 <<'END'
LDG.E R1, desc[UR4][R2.64]
Row:
LDG.E R3, desc[UR4][R2.64]
LDG.E.128 R4, desc[UR4][R2.64]
@P0 BRA `Next
STG.E desc[UR4][R2.64], R4
EXIT
Next:
STG.E.128 desc[UR4][R2.64], R4
@P1 BRA `Row
EXIT
Stop:
BRA `Stop
NOP
END
promised 'hot any ^wide'
check "wide words, a statistic a row: no fault" exits 0
check "is one kernel" says "1 kernels read, 0 faults, 0 known ones"

# Inside a loop over rows, one over channels, whose stores are split: only the inner one, and only the stores.
begin
kernel _Z6narrowv 32 0 <<'END'
Row:
LDG.E.U16 R3, desc[UR4][R2.64]
Channel:
LDG.E.64 R4, desc[UR4][R2.64]
STG.E.U16 desc[UR4][R2.64], R4
STG.E desc[UR4][R2.64+0x4], R4
@P0 BRA `Channel
@P1 BRA `Row
EXIT
END
promised 'hot bf16 ^narrow'
check "an array stored element by element: fails" exits 1
check "with the kernel, the instruction and the loop" says \
    "narrow (sm_90), store: STG.E.U16 at 0x20 in the loop 0x10 to 0x40: 2 stores of under 8 bytes, 6 of the 6 bytes"
check "not what is loaded once a row" says "1 kernels read, 1 faults"
promised 'hot fp32 ^narrow'
check "promised for fp32, read for bf16: no fault" exits 0
promised 'hot any ^narrow' 'known any ^narrow store  # nvcc splits them'
check "known: exits 0" exits 0
check "known: is printed with its reason" says "known (nvcc splits them): narrow (sm_90), store: STG.E.U16"
promised 'hot any ^narrow' 'known any ^narrow load  # wrong'
check "another fault is known: fails" exits 1
check "what is known and not found is said" says "known ^narrow load: is not found any more"

# Threads that part meet again where BSSY says, not behind their BSYNC: what stands there would lead back into the loop.
begin
kernel _Z5meetsv 32 0 <<'END'
BSSY B0, `Met
Again:
@!P0 BRA `Out
LDG.E.128 R4, desc[UR4][R2.64]
BRA `Again
Out:
BSYNC B0
LDG.E R4, desc[UR4][R2.64]
LDG.E R4, desc[UR4][R2.64]
BRA `Again
Met:
EXIT
END
promised 'hot any meets'
check "threads that meet behind a loop leave it" exits 0

begin
kernel _Z8straightv 32 0 <<'END'
LDG.E.128 R4, desc[UR4][R2.64]
STG.E.U8 desc[UR4][R2.64], R4
EXIT
END
promised 'hot any ^straight'
check "a kernel without a loop is looked at as a whole" says "store: STG.E.U8 at 0x10 in the code 0x0 to 0x20"

begin
kernel _Z7productILi64EEvv 168 1024 <<'END'
LDGSTS.E.BYPASS.128 [R4], desc[UR4][R2.64]
HMMA.16816.F32.BF16 R4, R8, R12, R4
STL [R1], R4
EXIT
END
promised 'has any ^product<64>$ HMMA' 'has any ^product LDGSTS' 'lacks any ^product ATOMG' \
    'blocks any ^product 128 36864 3'
check "what is promised is there, 3 blocks fit" exits 0
promised 'has any ^product LDSM'
check "an instruction is missing: named" says "product<64> (sm_90), has: no LDSM among its 4 instructions"
promised 'lacks any ^product HMMA'
check "an instruction that should not be there: where" says "lacks: HMMA.16816.F32.BF16 at 0x10"
promised 'hot any ^product'
check "local memory" says "local: STL at 0x20"
promised 'blocks any ^product 128 36864 4'  # 65536 / (128 * 168) = 3
check "registers for one block less" says "3 blocks of 128 threads fit a multiprocessor, not 4: 168 registers"
promised 'blocks any ^product 128 115712 2'  # 2 * (115712 + 1024 + 1024) > 228 KiB
check "shared memory for one block less" says "1 blocks of 128 threads fit a multiprocessor, not 2"
promised 'blocks any ^product 128 114688 2'
check "shared memory that just fits" exits 0
promised 'hot any ^product_tensor'
check "a promise for no kernel: fails" exits 1
check "and names it" says "^product_tensor (any), absent"
promised 'hot sometimes ^product'
check "a line that is not understood: one line, with its place" says "$folder/promises:1: not understood"

run dev/machine_code.py "$folder/none" bf16
check "no such object: one line" says "cuobjdump -sass $folder/none"
check "no such object: fails" exits 1
run dev/machine_code.py "$folder/object" fp16
check "wrong usage: exits 2" exits 2

conclude
