// A search for nonces on a real GPU, one program a family: the kernels of tests/fixtures/cuda, launched as a miner
// does. No pool, no network, no target that could be met: nothing is earned.
//
//   search_FAMILY [--seconds S] [--intensity 0..1] [--on-s S --off-s S] [--launches N]
//
// A launch is made to last some 10 ms (or --launch-ms). --intensity below 1 sleeps after each launch, as miners
// throttle; --on-s and --off-s work and rest in turn. Ends after --seconds or --launches, and prints one JSON line.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <unistd.h>

#include "device.cuh"

#include KERNELS

#ifdef FAMILY_heavyhash
// The round constants of Keccak (FIPS 202, 3.2.5).
static const uint64_t keccak_rounds[24] = {
    0x0000000000000001, 0x0000000000008082, 0x800000000000808a, 0x8000000080008000, 0x000000000000808b,
    0x0000000080000001, 0x8000000080008081, 0x8000000000008009, 0x000000000000008a, 0x0000000000000088,
    0x0000000080008009, 0x000000008000000a, 0x000000008000808b, 0x800000000000008b, 0x8000000000008089,
    0x8000000000008003, 0x8000000000008002, 0x8000000000000080, 0x000000000000800a, 0x800000008000000a,
    0x8000000080008081, 0x8000000000008080, 0x0000000080000001, 0x8000000080008008};
#endif

// One launch of `blocks` blocks, which tries `blocks` times TRIES nonces from `first` on.
#if defined(FAMILY_sha256d)
enum { TRIES = 256 * 16 };
static uint32_t *found;
static void prepare() {
  const uint32_t state[8] = {0x47505547, 0x75617264, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 7};
  const uint32_t rest[3] = {0x8d1f3a52, 0x67452301, 0x1d00ffff};
  check(cudaMemcpyToSymbol(midstate, state, sizeof state), "midstate");
  check(cudaMemcpyToSymbol(tail, rest, sizeof rest), "tail");
  found = room<uint32_t>(64, 0);
}
static void launch(uint32_t blocks, uint64_t first) { search<<<blocks, 256>>>((uint32_t)first, 0, found, 16); }
#elif defined(FAMILY_keccak) || defined(FAMILY_heavyhash)
enum { TRIES = 256 };
static uint64_t *block, *found;
static void prepare() {
#ifdef FAMILY_heavyhash
  uint32_t nibbles[64][16];
  for (uint32_t i = 0; i < 64 * 16; i++)
    nibbles[i / 16][i % 16] = (i * 2654435761u ^ i << 13) & 0x0f0f0f0f;
  check(cudaMemcpyToSymbol(matrix, nibbles, sizeof nibbles), "matrix");
  check(cudaMemcpyToSymbol(RC, keccak_rounds, sizeof keccak_rounds), "RC");
#endif
  block = noise<uint64_t>(32), found = room<uint64_t>(16, 0);
}
static void launch(uint32_t blocks, uint64_t first) { search<<<blocks, 256>>>(block, first, 0, found); }
#elif defined(FAMILY_blake3)
enum { TRIES = 256 };
static uint32_t *block, *found;
static void prepare() { block = noise<uint32_t>(16), found = room<uint32_t>(16, 0); }
static void launch(uint32_t blocks, uint64_t first) { search<<<blocks, 256>>>(block, (uint32_t)first, 0, found); }
#elif defined(FAMILY_dagwalk)
// 4 GiB of pages of 128 bytes, about the size of Ethereum Classic's.
enum { TRIES = 128 };
static const uint32_t pages = 1u << 25, blocks_max = 1u << 18;
static uint4 *dag;
static uint32_t *seed, *out;
static void prepare() {
  dag = noise<uint4>((size_t)pages * 8), seed = noise<uint32_t>(16), out = room<uint32_t>(blocks_max * 128, 0);
}
static void launch(uint32_t blocks, uint64_t first) {
  search<<<blocks < blocks_max ? blocks : blocks_max, 128>>>(dag, pages, seed, (uint32_t)first, out);
}
#elif defined(FAMILY_siptrim)
// Three kernels a round, as Cuckoo Cycle trimmers do; the table of degrees is 64 MiB. `first` makes the next graph.
enum { TRIES = 1 };
static const uint32_t mask = (1u << 28) - 1;
static uint64_t *key;
static uint32_t *alive, *degree, *fill, *kept_count;
static uint2 *buckets, *kept;
static void prepare() {
  key = noise<uint64_t>(4), alive = room<uint32_t>(1u << 25, 0xff), degree = room<uint32_t>(1u << 24, 0);
  fill = room<uint32_t>(256, 0), kept_count = room<uint32_t>(1, 0);
  buckets = room<uint2>(256 * 4096, 0), kept = room<uint2>(256 * 4096, 0);
}
static void launch(uint32_t blocks, uint64_t first) {
  uint32_t edges = blocks < 1u << 20 ? blocks * 1024 : 1u << 30;
  check(cudaMemcpyAsync(key, &first, sizeof first, cudaMemcpyHostToDevice), "key");
  check(cudaMemsetAsync(degree, 0, sizeof *degree << 24), "degrees");
  count<<<2048, 256>>>(key, alive, degree, mask, edges);
  bucket<<<256, 256>>>(key, buckets, fill, mask, edges / 64);
  check(cudaMemsetAsync(kept_count, 0, 4), "cudaMemsetAsync");
  trim<<<4096, 256>>>(buckets, degree, kept, kept_count, 256 * 4096);
}
#elif defined(FAMILY_matmulpow)
enum { TRIES = 1 };
static signed char *weights;
static uint32_t *found;
static void prepare() { weights = noise<signed char>(64 * 256), found = room<uint32_t>(16, 0); }
static void launch(uint32_t blocks, uint64_t first) { search<<<blocks, 32>>>(weights, (uint32_t)first, 0, found); }
#else
#error "name a family"
#endif

// Double the blocks until a launch lasts about as long as asked.
static uint32_t fitting(double launch_s) {
  launch(1, 0);
  check(cudaDeviceSynchronize(), "first launch");
  for (uint32_t blocks = 64;; blocks *= 2) {
    double begun = now_s();
    launch(blocks, 0);
    check(cudaDeviceSynchronize(), "launch");
    if (now_s() - begun > launch_s / 2 || blocks >= 1u << 24)
      return blocks;
  }
}

int main(int argc, char **argv) {
  double seconds = 8, intensity = 1, on_s = 0, off_s = 0, launch_s = 0.01;
  long launches_max = 0, launches = 0;
  for (int i = 1; i + 1 < argc; i += 2) {
    double value = atof(argv[i + 1]);
    if (!strcmp(argv[i], "--seconds")) seconds = value;
    else if (!strcmp(argv[i], "--intensity")) intensity = value;
    else if (!strcmp(argv[i], "--on-s")) on_s = value;
    else if (!strcmp(argv[i], "--off-s")) off_s = value;
    else if (!strcmp(argv[i], "--launch-ms")) launch_s = value / 1e3;
    else if (!strcmp(argv[i], "--launches")) launches_max = (long)value;
    else return fprintf(stderr, "unknown option %s\n", argv[i]), 2;
  }
  if (argc % 2 == 0 || seconds <= 0 || intensity <= 0 || intensity > 1)
    return fprintf(stderr, "usage: see the head of search.cu\n"), 2;
  prepare();
  // A counted run launches nothing that is not counted.
  uint32_t blocks = launches_max ? 64 : fitting(launch_s);
  begin_work();
  double begun = now_s();
  while (now_s() - begun < seconds && (!launches_max || launches < launches_max)) {
    if (on_s > 0 && fmod(now_s() - begun, on_s + off_s) > on_s) {
      usleep(5000);
      continue;
    }
    double launched = now_s();
    launch(blocks, (uint64_t)launches * blocks * TRIES);
    check(cudaGetLastError(), "launch");
    check(cudaDeviceSynchronize(), "search");
    launches++;
    if (intensity < 1)
      usleep((useconds_t)((now_s() - launched) * (1 / intensity - 1) * 1e6));
  }
  tell("launches", launches);
}
