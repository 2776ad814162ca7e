/* STAND-IN, not NVIDIA's driver. Each export is the 3-instruction stub that drivers 470..555 have:
 *     cmpl $0x321cba00, gate(%rip)     10 bytes, at +0x0
 *     je   +0x18                        2 bytes, at +0xa
 *     jmp  *slot(%rip)                  6 bytes, at +0xc
 * so that a probe placed by decoding a real libcuda meets the same bytes here. The branch is never taken: it goes to
 * the driver's own "already torn down" answer, CUDA_ERROR_DEINITIALIZED.
 */
#include "exports.h"

#define STUB(name)                    \
        .p2align 5, 0xcc             ;\
        .globl name                  ;\
        .type name, @function        ;\
name:   cmpl $0x321cba00, gate(%rip) ;\
        .byte 0x74, 0x0c             ;\
        jmp *slot_##name(%rip)       ;\
        .byte 0x66, 0x0f, 0x1f, 0x44, 0x00, 0x00 ;\
        movl $4, %eax                ;\
        ret                          ;\
        .size name, . - name         ;

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
