/* STAND-IN, not NVIDIA's driver. Each export is a stub as drivers have it, of the version that DRIVER says, so that a
 * probe placed by decoding a real libcuda meets the same bytes here. The branch is never taken: it goes to the driver's
 * own "already torn down" answer, CUDA_ERROR_DEINITIALIZED. See gpuguard/sensors/launches/libcuda.py.
 */
#include "exports.h"

#ifndef DRIVER
#define DRIVER 555
#endif

#define BEGIN(name)                   \
        .p2align 5, 0xcc             ;\
        .globl name                  ;\
        .type name, @function        ;\
name:
#define END(name)                     \
        .size name, . - name         ;
#define GATE                          \
        cmpl $0x321cba00, gate(%rip) ;
/* Up to five arguments that lie on the stack. The real ones pass as many as a call has, those of 32 bits as such. */
#define PASS                          \
        push 0x30(%rbp)              ;\
        push 0x28(%rbp)              ;\
        push 0x20(%rbp)              ;\
        push 0x18(%rbp)              ;\
        push 0x10(%rbp)              ;

#if DRIVER >= 595
#define STUB(name) BEGIN(name) GATE   \
        .byte 0x74, 1f - . - 1       ;\
        push %rbp                    ;\
        mov %rsp, %rbp               ;\
        sub $0x18, %rsp              ;\
        PASS                          \
        call *slot_##name(%rip)      ;\
        leave                        ;\
        ret                          ;\
1:      movl $4, %eax                ;\
        ret                          ;\
        END(name)
#elif DRIVER >= 580
#define STUB(name) BEGIN(name)        \
        push %rbp                    ;\
        mov %rsp, %rbp               ;\
        push %r12                    ;\
        sub $8, %rsp                 ;\
        GATE                          \
        .byte 0x0f, 0x84             ;\
        .long 1f - . - 4             ;\
        sub $8, %rsp                 ;\
        PASS                          \
        call *slot_##name(%rip)      ;\
        add $0x30, %rsp              ;\
        mov -8(%rbp), %r12           ;\
        leave                        ;\
        ret                          ;\
1:      movl $4, %eax                ;\
        mov -8(%rbp), %r12           ;\
        leave                        ;\
        ret                          ;\
        END(name)
#else
#define STUB(name) BEGIN(name) GATE   \
        .byte 0x74, 0x0c             ;\
        jmp *slot_##name(%rip)       ;\
        .byte 0x66, 0x0f, 0x1f, 0x44, 0x00, 0x00 ;\
        movl $4, %eax                ;\
        ret                          ;\
        END(name)
#endif

#define SLOT(name)                    \
        .hidden standin_##name       ;\
slot_##name: .quad standin_##name    ;

        .text
EXPORTS(STUB)

        .section .data.rel, "aw", @progbits
        .p2align 3
EXPORTS(SLOT)
gate:   .long 0
        .section .note.GNU-stack, "", @progbits
