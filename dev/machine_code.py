#!/usr/bin/env python3
"""Reads the machine code (SASS) that nvcc made and holds it to dev/machine_code.txt.

  dev/machine_code.py OBJECT PRECISION [PROMISES]  an object or program with CUDA code, by cuobjdump
  dev/machine_code.py --find                       prints cuobjdump's path, or exits 1 where there is none

Of every hot kernel, for every architecture in the object:
- it keeps nothing in local memory (LDL, STL: spilled registers, or arrays that a loop indexes);
- in an innermost loop, loads of under 8 bytes move at most a quarter of the bytes that the loop loads from global
  memory, and so for stores. So a token's number or a row's statistic beside whole rows is fine, and an array that is
  moved element by element is not. A loop is where control can come back to (a strongly connected part of the control
  flow graph, searched again without the edges back to its head); innermost: there is no other inside it. Where no loop
  touches global memory, the threads are the loop, and the kernel is looked at as a whole;
- the instructions promised are there, those ruled out are not;
- as many blocks as promised fit a multiprocessor, with the promised threads and dynamic shared memory.
Each line of what is wrong names the kernel and the instruction. What PROMISES lists as known is printed, and does not
fail.
"""

import os
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

Instruction = namedtuple("Instruction", "address predicate opcode operands")
Finding = namedtuple("Finding", "kernel architecture what text")

# Bytes of shared memory a multiprocessor, what a block takes besides its own, and threads a multiprocessor.
SHARED = {"80": 164 << 10, "86": 100 << 10, "87": 164 << 10, "89": 100 << 10, "90": 228 << 10, "100": 228 << 10}
SHARED_OF_SYSTEM = 1 << 10
THREADS = {"86": 1536, "87": 1536, "89": 1536}
REGISTERS = 64 << 10
NARROW = 8  # bytes
NARROW_SHARE = 4  # one byte in so many may be moved in narrow words

INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")


def read_sass(lines):
    """Yields (mangled name, architecture, instructions) of each function."""
    architecture = name = None
    code = []
    for line in lines:
        if match := re.search(r"code for sm_(\d+)", line):
            if name:
                yield name, architecture, code
            architecture, name = match[1], None
        elif match := re.search(r"Function : (\S+)", line):
            if name:
                yield name, architecture, code
            name, code = match[1], []
        elif match := INSTRUCTION.match(line):
            code.append(Instruction(int(match[1], 16), (match[2] or "").strip(), match[3], match[4].strip()))
    if name:
        yield name, architecture, code


def target(instruction):
    """The address that a branch names last, or None."""
    numbers = re.findall(r"0x[0-9a-f]+", instruction.operands)
    return int(numbers[-1], 16) if numbers else None


def successors(code):
    """For each instruction, by its index, those that may follow it."""
    index = {instruction.address: i for i, instruction in enumerate(code)}
    meeting = {}  # of BSSY's register: where the threads meet again
    result = []
    for i, instruction in enumerate(code):
        kind = instruction.opcode.split(".")[0]
        after = [i + 1] if i + 1 < len(code) else []
        if kind == "BSSY":
            meeting[instruction.operands.split(",")[0]] = target(instruction)
        if kind in ("BRA", "JMP"):
            always = not instruction.predicate and re.fullmatch(r"`?\(?0x[0-9a-f]+\)?", instruction.operands)
            to = index.get(target(instruction))
            following = ([] if always else after) + ([to] if to is not None else [])
        elif kind == "BSYNC" and instruction.operands in meeting:
            to = index.get(meeting[instruction.operands])
            following = ([to] if to is not None else []) + (after if instruction.predicate else [])
        elif kind in ("EXIT", "RET", "BRX", "JMX", "KILL"):
            following = after if instruction.predicate else []
        else:
            following = after
        result.append(following)
    return result


def connected_parts(nodes, following):
    """Tarjan's strongly connected components of the nodes, those of one node without an edge to itself left out."""
    number, low, stack, on_stack, parts = {}, {}, [], set(), []
    for root in sorted(nodes):
        if root in number:
            continue
        work = [(root, iter(following(root)))]
        number[root] = low[root] = len(number)
        stack.append(root)
        on_stack.add(root)
        while work:
            node, rest = work[-1]
            for child in rest:
                if child not in number:
                    number[child] = low[child] = len(number)
                    stack.append(child)
                    on_stack.add(child)
                    work.append((child, iter(following(child))))
                    break
                if child in on_stack:
                    low[node] = min(low[node], number[child])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == number[node]:
                    part = set()
                    while node not in part:
                        on_stack.remove(stack[-1])
                        part.add(stack.pop())
                    if len(part) > 1 or node in following(node):
                        parts.append(part)
    return parts


def innermost_loops(code):
    """The loops, as sets of indices into the code, that have no other inside."""
    follows = successors(code)
    comes_from = [[] for _ in code]
    for node, after in enumerate(follows):
        for child in after:
            comes_from[child].append(node)
    found = []
    open_parts = [(set(range(len(code))), None)]
    while open_parts:
        nodes, head = open_parts.pop()
        inner = connected_parts(nodes, lambda n: [c for c in follows[n] if c in nodes and c != head])
        if not inner and head is not None:
            # An instruction that branches to itself: what stands behind a function's end.
            if len(nodes) > 1:
                found.append(nodes)
        for part in inner:
            entered = [n for n in part if any(c not in part for c in comes_from[n])]
            open_parts.append((part, min(entered or part)))
    return sorted(found, key=min)


def global_access(opcode):
    """("load" or "store", bytes) of a global access; None of all else. Copies to shared memory (LDGSTS) are loads."""
    parts = opcode.split(".")
    if parts[0] not in ("LDG", "STG", "LDGSTS"):
        return None
    sizes = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
    size = next((sizes[part] for part in parts[1:] if part in sizes), 4)
    return ("store" if parts[0] == "STG" else "load"), size


def narrow_accesses(code):
    """(kind, sentence) of each innermost loop that moves too many of its bytes in narrow words."""
    is_global = [global_access(instruction.opcode) is not None for instruction in code]
    loops = [loop for loop in innermost_loops(code) if any(is_global[i] for i in loop)]
    for loop in loops or [set(range(len(code)))]:
        accesses = [(code[i], *access) for i in sorted(loop) if (access := global_access(code[i].opcode))]
        for kind in ("load", "store"):
            narrow = [(instruction, size) for instruction, k, size in accesses if k == kind and size < NARROW]
            moved = sum(size for _, k, size in accesses if k == kind)
            if NARROW_SHARE * sum(size for _, size in narrow) > moved:
                first = narrow[0][0]
                yield kind, (
                    f"{first.opcode} at 0x{first.address:x} in the {'loop' if loops else 'code'} "
                    f"0x{code[min(loop)].address:x} to 0x{code[max(loop)].address:x}: {len(narrow)} {kind}s of under "
                    f"{NARROW} bytes, {sum(size for _, size in narrow)} of the {moved} bytes"
                )


def blocks_that_fit(architecture, registers, static_shared, threads, dynamic_shared):
    warps = -(-threads // 32)
    by_registers = REGISTERS // (warps * -(-registers * 32 // 256) * 256)
    by_shared = SHARED.get(architecture, 228 << 10) // (static_shared + dynamic_shared + SHARED_OF_SYSTEM)
    return min(by_registers, by_shared, THREADS.get(architecture, 2048) // (32 * warps))


Line = namedtuple("Line", "kind kernel arguments reason")


class Promises:
    """dev/machine_code.txt, its lines for this precision."""

    def __init__(self, path, precision):
        self.lines = []
        counts = {"hot": 0, "has": 1, "lacks": 1, "blocks": 3, "known": 1}
        for number, line in enumerate(Path(path).read_text().splitlines(), 1):
            words, _, reason = line.partition("#")
            words = words.split()
            if not words:
                continue
            if counts.get(words[0]) != len(words) - 3 or words[1] not in ("fp32", "bf16", "any"):
                sys.exit(f"{path}:{number}: not understood: {line}")
            if words[1] in (precision, "any"):
                self.lines.append(Line(words[0], re.compile(words[2]), tuple(words[3:]), reason.strip()))

    def of(self, kind, kernel):
        return [line.arguments for line in self.lines if line.kind == kind and line.kernel.search(kernel)]


def check_kernel(kernel, architecture, code, resources, promises):
    """Yields (what, sentence) of all that is wrong with it."""
    opcodes = [instruction.opcode.split(".")[0] for instruction in code]
    if promises.of("hot", kernel):
        for name in ("STL", "LDL"):
            if name in opcodes:
                first = code[opcodes.index(name)]
                yield "local", f"{first.opcode} at 0x{first.address:x}: {opcodes.count(name)} times local memory"
        yield from narrow_accesses(code)
    for (name, *_) in promises.of("has", kernel):
        if name not in opcodes:
            yield "has", f"no {name} among its {len(code)} instructions"
    for (name, *_) in promises.of("lacks", kernel):
        if name in opcodes:
            yield "lacks", f"{code[opcodes.index(name)].opcode} at 0x{code[opcodes.index(name)].address:x}"
    for threads, shared, blocks, *_ in promises.of("blocks", kernel):
        registers, static_shared = resources
        fit = blocks_that_fit(architecture, registers, static_shared, int(threads), int(shared))
        if fit < int(blocks):
            yield "blocks", (
                f"{fit} blocks of {threads} threads fit a multiprocessor, not {blocks}: {registers} registers, "
                f"{static_shared} + {shared} bytes of shared memory"
            )


def demangle(names):
    """{mangled: kernel<its arguments>}"""
    text = subprocess.run(["c++filt", "-p"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return dict(zip(names, text.splitlines()))


def read_resources(lines):
    """{(mangled name, architecture): (registers, static shared memory)} of cuobjdump -res-usage"""
    result, architecture, name = {}, None, None
    for line in lines:
        if match := re.search(r"^arch = sm_(\d+)", line):
            architecture = match[1]
        elif match := re.search(r"Function (\S+?):$", line.rstrip()):
            name = match[1]
        elif name and (match := re.search(r"REG:(\d+).*SHARED:(\d+)", line)):
            result[name, architecture] = int(match[1]), int(match[2])
            name = None
    return result


def check(sass, usage, precision, path):
    """(findings, {line that knows them: findings}, lines that know none, number of kernels read)"""
    promises, resources = Promises(path, precision), read_resources(usage)
    functions = list(read_sass(sass))
    names = demangle(sorted({name for name, _, _ in functions}))
    kernels = {name: re.sub(r"^void ", "", names[name]) for name in names}
    found = [
        Finding(kernels[name], f"sm_{architecture}", *fault)
        for name, architecture, code in functions
        for fault in check_kernel(kernels[name], architecture, code, resources[name, architecture], promises)
    ]
    for line in promises.lines:
        if line.kind != "known" and not any(line.kernel.search(kernel) for kernel in kernels.values()):
            promise = " ".join([line.kind, *line.arguments])
            found.append(Finding(line.kernel.pattern, "any", "absent", f"no kernel has this name, for '{promise}'"))
    findings, known = [], {}
    for finding in found:
        excuse = next(
            (line for line in promises.lines
             if line.kind == "known" and line.kernel.search(finding.kernel) and line.arguments[0] == finding.what),
            None,
        )
        if excuse:
            known.setdefault(excuse, []).append(finding)
        else:
            findings.append(finding)
    mended = [line for line in promises.lines if line.kind == "known" and line not in known]
    return findings, known, mended, len(functions)


def find_cuobjdump():
    """cuobjdump of PATH, of the toolkit, or of PyPI's wheel; beside which nvdisasm must be."""
    folders = [*os.environ.get("PATH", "").split(os.pathsep), "/usr/local/cuda/bin"]
    for root in [os.environ.get("CUOBJDUMP_WHEELS", "build/cuobjdump"), *sys.path]:
        folders += sorted(str(path) for path in Path(root or ".").glob("nvidia/*/bin"))
    found = shutil.which("cuobjdump", path=os.pathsep.join(folders))
    disassembler = shutil.which("nvdisasm", path=os.pathsep.join(folders))
    return (found, disassembler) if found and disassembler else (None, None)


def main(arguments):
    if arguments == ["--find"]:
        found, _ = find_cuobjdump()
        if found:
            print(found)
        return 0 if found else 1
    if len(arguments) not in (2, 3) or arguments[1] not in ("fp32", "bf16"):
        print(f"machine_code: OBJECT PRECISION [PROMISES], not: {' '.join(arguments)}", file=sys.stderr)
        return 2
    found, disassembler = find_cuobjdump()
    if not found:
        print("machine_code: there is no cuobjdump with nvdisasm here", file=sys.stderr)
        return 1
    path = os.pathsep.join([os.environ.get("PATH", ""), str(Path(disassembler).parent)])
    dumps = []
    for option in ("-sass", "-res-usage"):
        result = subprocess.run(
            [found, option, arguments[0]], capture_output=True, text=True, env={**os.environ, "PATH": path}
        )
        if result.returncode != 0:
            print(f"machine_code: cuobjdump {option} {arguments[0]}: {result.stderr.strip()}", file=sys.stderr)
            return 1
        dumps.append((result.stdout + result.stderr).splitlines())
    promises = arguments[2] if len(arguments) == 3 else str(Path(__file__).parent / "machine_code.txt")
    findings, known, mended, count = check(*dumps, arguments[1], promises)
    for finding in findings:
        print(f"  {finding.kernel} ({finding.architecture}), {finding.what}: {finding.text}")
    for line, excused in known.items():
        finding, more = excused[0], f" (and {len(excused) - 1} more)" if len(excused) > 1 else ""
        where = f"{finding.kernel} ({finding.architecture})"
        print(f"  known ({line.reason}): {where}, {finding.what}: {finding.text}{more}")
    for line in mended:
        print(f"  known {line.kernel.pattern} {line.arguments[0]}: is not found any more; take it out of {promises}")
    print(f"  {count} kernels read, {len(findings)} faults, {sum(map(len, known.values()))} known ones")
    return 1 if findings or count == 0 else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
