// How long one launch takes the program that makes it: an empty kernel, again and again.
//
//   rate COUNT       prints one JSON line: nanoseconds a launch, without the synchronisation at the end
#include <cstdio>
#include <cstdlib>
#include <ctime>

__global__ void counted_by_rate() {}

int main(int argc, char **argv) {
  long count = argc == 2 ? atol(argv[1]) : 0;
  if (count <= 0)
    return fprintf(stderr, "usage: rate COUNT\n"), 2;
  counted_by_rate<<<1, 32>>>();
  if (cudaDeviceSynchronize() != cudaSuccess)
    return fprintf(stderr, "%s\n", cudaGetErrorString(cudaGetLastError())), 1;
  double total_ns = 0;
  // In parts that the driver's queue holds: a launch into a full queue waits for the GPU instead.
  for (long done = 0; done < count; done += 512) {
    timespec begun, ended;
    clock_gettime(CLOCK_MONOTONIC, &begun);
    long part = count - done < 512 ? count - done : 512;
    for (long i = 0; i < part; i++)
      counted_by_rate<<<1, 32>>>();
    clock_gettime(CLOCK_MONOTONIC, &ended);
    total_ns += (ended.tv_sec - begun.tv_sec) * 1e9 + (ended.tv_nsec - begun.tv_nsec);
    if (cudaDeviceSynchronize() != cudaSuccess)
      return fprintf(stderr, "%s\n", cudaGetErrorString(cudaGetLastError())), 1;
  }
  printf("{\"name\": \"counted_by_rate\", \"launches\": %ld, \"ns_per_launch\": %.1f}\n", count + 1, total_ns / count);
}
