// What the programs here need of the device: calls that end the program where they fail, memory, and the time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <ctime>

static void check(cudaError_t error, const char *what) {
  if (error != cudaSuccess) {
    fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
    exit(1);
  }
}

static double seconds_of(clockid_t clock) {
  timespec now;
  clock_gettime(clock, &now);
  return now.tv_sec + now.tv_nsec * 1e-9;
}

static double now_s() { return seconds_of(CLOCK_MONOTONIC); }

// The last line of every program: what it did, and between which times of day it did it. A recording calls only
// that stretch by the program's name, not the driver's start and the filling of memory before it.
static double working_since_s;
static void begin_work() { working_since_s = seconds_of(CLOCK_REALTIME); }
static void tell(const char *unit, long count) {
  printf("{\"%s\": %ld, \"begun_s\": %.6f, \"ended_s\": %.6f}\n", unit, count, working_since_s,
         seconds_of(CLOCK_REALTIME));
}

// Every byte of it is `fill`.
template <class T> static T *room(size_t count, int fill) {
  T *p;
  check(cudaMalloc(&p, count * sizeof(T)), "cudaMalloc");
  check(cudaMemset(p, fill, count * sizeof(T)), "cudaMemset");
  return p;
}

static __device__ uint32_t noise_at(size_t i) {
  uint32_t x = (uint32_t)i * 2654435761u ^ (uint32_t)(i >> 32);
  x ^= x >> 16, x *= 0x7feb352du, x ^= x >> 15, x *= 0x846ca68bu;
  return x ^ x >> 16;
}

static __global__ void noise_words(uint32_t *words, size_t count) {
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < count; i += (size_t)gridDim.x * blockDim.x)
    words[i] = noise_at(i);
}

static __global__ void noise_floats(float *values, size_t count) {
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < count; i += (size_t)gridDim.x * blockDim.x)
    values[i] = noise_at(i) * 4.6566129e-10f - 1;
}

// Noise where real work has data: over constants fewer bits turn, and the chip draws less power.
template <class T> static T *noise(size_t count) {
  T *p = room<T>(count, 0);
  noise_words<<<4096, 256>>>((uint32_t *)p, count * sizeof(T) / 4);
  check(cudaDeviceSynchronize(), "noise");
  return p;
}

template <> inline float *noise<float>(size_t count) {
  float *p = room<float>(count, 0);
  noise_floats<<<4096, 256>>>(p, count);
  check(cudaDeviceSynchronize(), "noise");
  return p;
}
