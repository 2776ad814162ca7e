/* SPDX-License-Identifier: Apache-2.0 */
/* What the cooperative shim (shim.c) writes and gpuguard/sensors/launches/cooperative.py reads. One file a process,
 * PID-TIME.ring (the pid as its own namespace has it, the time in hex), of this shape: a header page, then
 * CAPTURE_SLOTS records.
 * A record is complete when its `sequence` is its index + 1.
 */
#ifndef GPUGUARD_CAPTURE_H
#define GPUGUARD_CAPTURE_H

#include <stdint.h>

#define CAPTURE_MAGIC 0x3145525554504143ull /* "CAPTURE1" */
#define CAPTURE_SLOTS 16384u
#define CAPTURE_HEADER_BYTES 4096u
#define CAPTURE_TEXT_BYTES 64u

enum capture_kind { CAPTURE_LAUNCH = 0, CAPTURE_NAME = 1, CAPTURE_ALIAS = 2 };

struct capture_header {
	uint64_t magic;
	uint64_t pid;
	uint64_t lost;                              /* records for which there was no room */
	uint64_t unwrapped;                         /* launch calls of this driver whose shape is unknown */
	_Alignas(64) uint64_t head;                 /* next index to write; ours */
	_Alignas(64) uint64_t tail;                 /* next index to read; the reader's */
};

struct capture_record {
	uint64_t sequence;
	uint64_t time_ns;                           /* CLOCK_BOOTTIME */
	uint64_t handle;
	uint32_t kind;
	uint32_t api;                               /* index into LAUNCH_APIS */
	uint32_t grid[3], block[3];
	uint32_t shared_bytes;
	uint32_t zero;
	uint8_t text[CAPTURE_TEXT_BYTES];           /* CAPTURE_NAME: cut and NUL-ended; CAPTURE_ALIAS: the first handle */
};

#endif
