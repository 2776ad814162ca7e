// Ordinary GPU work that counters or code may take for mining, on a real GPU: the hard negatives of the recording.
//
//   negative KIND [--seconds S]      sort | checksum | random | sparse | bigint | copies | video | idle
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <unistd.h>

#include <thrust/device_vector.h>
#include <thrust/sequence.h>
#include <thrust/sort.h>

#include "../../../tests/fixtures/cuda/bigint.cu"
#include "../../../tests/fixtures/cuda/crcaesrng.cu"
#include "device.cuh"

__global__ void scrambled(uint32_t *keys, uint32_t n, uint32_t salt) {
  for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
    keys[i] = (i ^ salt) * 2654435761u;
}

// Rows of 32 entries at scattered columns.
__global__ void sparse_times(const float *values, const uint32_t *columns, const float *x, float *y, uint32_t rows) {
  for (uint32_t r = blockIdx.x * blockDim.x + threadIdx.x; r < rows; r += gridDim.x * blockDim.x) {
    float sum = 0;
    for (uint32_t k = 0; k < 32; k++)
      sum += values[(size_t)k * rows + r] * x[columns[(size_t)k * rows + r] % rows];
    y[r] = sum;
  }
}

// One frame: luma from RGB, a 5 x 5 blur, quantisation, as a video filter does.
__global__ void filtered(const uchar4 *in, uint8_t *out, int width, int height) {
  int x = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y * blockDim.y + threadIdx.y;
  if (x >= width || y >= height)
    return;
  float sum = 0;
  for (int dy = -2; dy <= 2; dy++)
    for (int dx = -2; dx <= 2; dx++) {
      uchar4 p = in[min(max(y + dy, 0), height - 1) * width + min(max(x + dx, 0), width - 1)];
      sum += (0.299f * p.x + 0.587f * p.y + 0.114f * p.z) * (3 - abs(dx)) * (3 - abs(dy)) / 81;
    }
  out[y * width + x] = (uint8_t)sum & 0xf8;
}

template <class Step> static long repeat(double seconds, Step step) {
  long steps = 0;
  step();  // what it allocates, it allocates here
  check(cudaDeviceSynchronize(), "first step");
  begin_work();
  for (double begun = now_s(); now_s() - begun < seconds; steps++) {
    step();
    check(cudaGetLastError(), "step");
    check(cudaDeviceSynchronize(), "step");
  }
  return steps;
}

int main(int argc, char **argv) {
  if (argc != 2 && !(argc == 4 && !strcmp(argv[2], "--seconds")))
    return fprintf(stderr, "usage: negative KIND [--seconds S]\n"), 2;
  const char *kind = argv[1];
  double seconds = argc == 4 ? atof(argv[3]) : 8;
  long steps = 0;
  if (!strcmp(kind, "sort")) {
    thrust::device_vector<uint32_t> keys(1u << 27);
    uint32_t salt = 0;
    steps = repeat(seconds, [&] {
      scrambled<<<4096, 256>>>(thrust::raw_pointer_cast(keys.data()), (uint32_t)keys.size(), salt++);
      thrust::sort(keys.begin(), keys.end());
    });
  } else if (!strcmp(kind, "checksum")) {
    uint32_t table[256];
    for (uint32_t i = 0; i < 256; i++) {
      table[i] = i;
      for (int bit = 0; bit < 8; bit++)
        table[i] = table[i] & 1 ? table[i] >> 1 ^ 0xedb88320 : table[i] >> 1;
    }
    check(cudaMemcpyToSymbol(crc_table, table, sizeof table), "crc_table");
    uint8_t *data = noise<uint8_t>(1u << 30);
    uint32_t *sums = room<uint32_t>(1u << 20, 1);
    steps = repeat(seconds, [&] { crc32<<<4096, 256>>>(data, sums, 1024); });
  } else if (!strcmp(kind, "random")) {
    float4 *out = room<float4>(1u << 26, 1);
    uint32_t seed = 0;
    steps = repeat(seconds, [&] { philox<<<8192, 256>>>(out, seed++, 1 << 26); });
  } else if (!strcmp(kind, "sparse")) {
    const uint32_t rows = 1u << 24;
    float *values = noise<float>((size_t)rows * 32), *x = noise<float>(rows), *y = room<float>(rows, 1);
    uint32_t *columns = noise<uint32_t>((size_t)rows * 32);
    steps = repeat(seconds, [&] { sparse_times<<<8192, 256>>>(values, columns, x, y, rows); });
  } else if (!strcmp(kind, "bigint")) {
    const int n = 1 << 24;
    uint64_t *x = noise<uint64_t>(n), *w = noise<uint64_t>(n);
    steps = repeat(seconds, [&] {
      for (int half = 1; half < n; half *= 2)
        ntt<<<8192, 256>>>(x, w, half, n);
    });
  } else if (!strcmp(kind, "copies")) {
    const size_t bytes = 256u << 20;
    char *device = noise<char>(bytes), *other = room<char>(bytes, 1), *host;
    check(cudaMallocHost(&host, bytes), "cudaMallocHost");
    check(cudaMemcpy(host, device, bytes, cudaMemcpyDeviceToHost), "cudaMemcpy");
    steps = repeat(seconds, [&] {
      check(cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice), "to the device");
      check(cudaMemcpyAsync(other, device, bytes, cudaMemcpyDeviceToDevice), "on the device");
      check(cudaMemcpyAsync(host, other, bytes, cudaMemcpyDeviceToHost), "to the host");
    });
  } else if (!strcmp(kind, "video")) {
    const int width = 7680, height = 4320;
    uchar4 *in = noise<uchar4>((size_t)width * height);
    uint8_t *out = room<uint8_t>((size_t)width * height, 1);
    uchar4 *host;
    check(cudaMallocHost(&host, sizeof(uchar4) * width * height), "cudaMallocHost");
    check(cudaMemcpy(host, in, sizeof(uchar4) * width * height, cudaMemcpyDeviceToHost), "cudaMemcpy");
    steps = repeat(seconds, [&] {
      check(cudaMemcpyAsync(in, host, sizeof(uchar4) * width * height, cudaMemcpyHostToDevice), "frame");
      filtered<<<dim3((width + 31) / 32, (height + 7) / 8), dim3(32, 8)>>>(in, out, width, height);
      check(cudaDeviceSynchronize(), "frame");
      usleep(16000);
    });
  } else if (!strcmp(kind, "idle")) {
    room<char>(1u << 30, 1);
    check(cudaDeviceSynchronize(), "memory");
    begin_work();
    usleep((useconds_t)(seconds * 1e6));
  } else {
    return fprintf(stderr, "unknown kind %s\n", kind), 2;
  }
  tell("steps", steps);
}
