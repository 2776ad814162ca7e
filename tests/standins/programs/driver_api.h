/* The part of the CUDA driver API (cuda.h 12) that the stand-in programs call, and helpers that both need. */
#ifndef DRIVER_API_H
#define DRIVER_API_H
#include <elf.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef struct { unsigned grid[3], block[3], shared; void *stream; void *attributes; unsigned count; } LaunchConfig;

int cuInit(unsigned);
int cuDeviceGet(int *, int);
int cuCtxCreate_v2(void **, unsigned, int);
int cuModuleLoadData(void **, const void *);
int cuModuleGetFunction(void **, void *, const char *);
int cuLibraryLoadData(void **, const void *, void *, void **, unsigned, void *, void **, unsigned);
int cuLibraryGetKernel(void **, void *, const char *);
int cuKernelGetFunction(void **, void *);
#define GEOMETRY unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned
int cuLaunchKernel(void *, GEOMETRY, void *, void **, void **);
int cuLaunchKernel_ptsz(void *, GEOMETRY, void *, void **, void **);
int cuLaunchKernelEx(const LaunchConfig *, void *, void **, void **);
int cuLaunchCooperativeKernel(void *, GEOMETRY, void *, void **);
int cuGraphCreate(void **, unsigned);
int cuGraphInstantiateWithFlags(void **, void *, uint64_t);
int cuGraphLaunch(void *, void *);
int cuMemAlloc_v2(uint64_t *, size_t);
int cuMemcpyHtoD_v2(uint64_t, const void *, size_t);
int cuMemcpyDtoH_v2(void *, uint64_t, size_t);
int cuStreamCreate(void **, unsigned);
int cuStreamSynchronize(void *);

static inline void check(int error, const char *what) {
    if (error) {
        fprintf(stderr, "%s: CUDA error %d\n", what, error);
        exit(1);
    }
}

static inline int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

static inline void sleep_until(int64_t time_ns) {
    struct timespec until = {time_ns / 1000000000LL, time_ns % 1000000000LL};
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL)) { }
}

/* A cubin in shape only: an ELF file of machine EM_CUDA (190) with one .text.<kernel> section of `code` bytes each.
 * The bytes are a fixed pattern, no instructions. */
static inline void *make_cubin(char *const *names, unsigned count, unsigned code, size_t *size) {
    size_t strings = 1 + sizeof ".shstrtab";
    for (unsigned i = 0; i < count; i++) strings += sizeof ".text." + strlen(names[i]);
    size_t text_at = sizeof(Elf64_Ehdr), strings_at = text_at + (size_t)count * code;
    size_t headers_at = (strings_at + strings + 63) & ~(size_t)63;
    *size = headers_at + (count + 2) * sizeof(Elf64_Shdr);
    char *image = calloc(1, *size);
    Elf64_Ehdr *header = (Elf64_Ehdr *)image;
    memcpy(header->e_ident, ELFMAG, SELFMAG);
    header->e_ident[EI_CLASS] = ELFCLASS64;
    header->e_ident[EI_DATA] = ELFDATA2LSB;
    header->e_ident[EI_VERSION] = EV_CURRENT;
    header->e_type = ET_EXEC;
    header->e_machine = 190;
    header->e_version = EV_CURRENT;
    header->e_ehsize = sizeof *header;
    header->e_shoff = headers_at;
    header->e_shentsize = sizeof(Elf64_Shdr);
    header->e_shnum = count + 2;
    header->e_shstrndx = 1;
    Elf64_Shdr *sections = (Elf64_Shdr *)(image + headers_at);
    char *string = image + strings_at + 1;
    sections[1] = (Elf64_Shdr){.sh_name = 1, .sh_type = SHT_STRTAB, .sh_offset = strings_at, .sh_size = strings};
    string += sprintf(string, ".shstrtab") + 1;
    for (unsigned i = 0; i < count; i++) {
        for (unsigned b = 0; b < code; b++)
            image[text_at + (size_t)i * code + b] = (char)(b * 31 + strlen(names[i]) * 7 + i);
        sections[i + 2] = (Elf64_Shdr){.sh_name = string - (image + strings_at), .sh_type = SHT_PROGBITS,
                                       .sh_flags = SHF_ALLOC | SHF_EXECINSTR, .sh_offset = text_at + (size_t)i * code,
                                       .sh_size = code};
        string += sprintf(string, ".text.%s", names[i]) + 1;
    }
    return image;
}

static inline void *read_whole(const char *path, size_t *size) {
    FILE *file = fopen(path, "rb");
    if (!file || fseek(file, 0, SEEK_END)) { perror(path); exit(1); }
    *size = ftell(file);
    rewind(file);
    char *bytes = calloc(1, *size + 1);
    if (fread(bytes, 1, *size, file) != *size) { perror(path); exit(1); }
    fclose(file);
    return bytes;
}
#endif
