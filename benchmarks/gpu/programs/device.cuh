// What the programs here need of the device: calls that end the program where they fail, memory, and the time.
#pragma once

#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <ctime>

static void check(cudaError_t error, const char *what) {
  if (error != cudaSuccess) {
    fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
    exit(1);
  }
}

static double now_s() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec + now.tv_nsec * 1e-9;
}

// Every byte of it is `fill`.
template <class T> static T *room(size_t count, int fill) {
  T *p;
  check(cudaMalloc(&p, count * sizeof(T)), "cudaMalloc");
  check(cudaMemset(p, fill, count * sizeof(T)), "cudaMemset");
  return p;
}
