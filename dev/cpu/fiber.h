// Switching between stacks of one OS thread.
//
// On x86-64 the switch is a function of a dozen instructions: a thread that shuffles across a warp of 32 is switched
// away from at every shuffle. It is entered by a call and left by a return, which keeps the processor's prediction of
// returns in step; that matters more than the instructions saved (Boost.Context's switch leaves by a jump). Elsewhere
// Boost.Context does it. Floating-point modes are not switched: a kernel must not change them.
#pragma once
#include <cstddef>
#include <cstdint>

#ifdef __x86_64__

asm(R"(
    .pushsection .text
    .p2align 4
    .hidden cpu_device_switch_stack
    .globl cpu_device_switch_stack
    .type cpu_device_switch_stack, @function
cpu_device_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size cpu_device_switch_stack, . - cpu_device_switch_stack
    .popsection
)");

// Saves in *from where this stack stops, and goes on where the stack `to` stopped.
extern "C" void cpu_device_switch_stack(void** from, void* to);

namespace cpu_device {

inline void switch_stack(void** from, void* to) { cpu_device_switch_stack(from, to); }

// A stack that, when switched to, calls entry(), which must not return. `top` is a multiple of 16.
inline void* new_stack(char* top, size_t, void (*entry)()) {
    auto* slots = reinterpret_cast<uintptr_t*>(top);
    slots[-1] = 0;  // where entry would return to: debuggers end their backtrace here
    slots[-2] = reinterpret_cast<uintptr_t>(entry);
    for (int saved = 3; saved <= 8; saved++) slots[-saved] = 0;
    return slots - 8;
}

}  // namespace cpu_device

#else
#include <boost/context/detail/fcontext.hpp>

namespace cpu_device {

inline void switch_stack(void** from, void* to) {
    const auto previous = boost::context::detail::jump_fcontext(to, from);
    *static_cast<void**>(previous.data) = previous.fctx;
}

inline void* new_stack(char* top, size_t size, void (*entry)()) {
    static void (*const start)() = entry;  // there is one entry
    return boost::context::detail::make_fcontext(top, size, [](boost::context::detail::transfer_t previous) {
        *static_cast<void**>(previous.data) = previous.fctx;
        start();
    });
}

}  // namespace cpu_device
#endif
