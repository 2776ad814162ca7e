// One of each: instructions that ordinary kernels seldom use, so that scripts/learn_opcodes.py can read their opcodes.
//   for a in 75 80 86 89 90a 100a 103a 120 121; do nvcc -cubin -rdc=true -arch=sm_$a -o zoo.$a.cubin zoo.cu; done
//   python scripts/learn_opcodes.py zoo.*.cubin
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <mma.h>
#include <stdint.h>
#include <stdio.h>
using namespace nvcuda;
namespace cg = cooperative_groups;

extern "C" __global__ void floats(float *f, double *d, int n) {
  float a = f[0], b = f[1], c = f[2];
  f[3] = fmaxf(fmaxf(a, b), c);
  f[4] = fminf(fminf(a, b), c);
  f[5] = fmaxf(fminf(a, b), 2.5f);
  f[6] = __sinf(a) + __cosf(b) + __logf(c) + rsqrtf(a) + sqrtf(b) + __frcp_rn(c) + exp2f(a) + tanhf(b);
  f[7] = rintf(a) + floorf(b) + ceilf(c) + truncf(a);
  f[8] = fmodf(a, b);
  f[9] = a / b;
  f[10] = sinf(a * 1e6f);
  f[11] = __saturatef(a * b + c);
  f[12] = a > b ? c : a;
  f[13] = copysignf(a, b);
  f[14] = isnan(a) ? 1 : 0;
  d[0] = d[1] * d[2] + d[3];
  d[4] = sqrt(d[1]);
  d[5] = d[1] / d[2];
  d[6] = fmax(d[1], d[2]);
  d[7] = floor(d[3]);
  d[8] = (double)n + (double)(long long)f[1];
  f[15] = (float)d[1];
  d[9] = __longlong_as_double(__double2ll_rz(d[2]));
  ((int *)f)[16] = (int)a + (int)d[1] + __float2uint_ru(b) + (int)(short)c;
  ((long long *)d)[10] = (long long)a;
  f[18] = (float)(unsigned char)n + (float)(signed char)(n >> 8) + (float)(unsigned short)n + (float)(long long)n;
}
extern "C" __global__ void halves(half2 *h, __nv_bfloat162 *b, float *f, __nv_fp8_e4m3 *q) {
  h[0] = __hfma2(h[1], h[2], h[3]);
  h[4] = __hadd2(h[1], h[2]);
  h[5] = __hmul2(h[1], h[2]);
  h[6] = __hmax2(h[1], h[2]);
  h[7] = h2exp(h[1]);
  h[8] = h2sqrt(h[2]);
  h[9] = __hgt2(h[1], h[2]);
  h[10] = __hfma2_relu(h[1], h[2], h[3]);
  h[11] = __floats2half2_rn(f[0], f[1]);
  f[2] = __low2float(h[3]);
  h[12] = __hneg2(__habs2(h[2]));
  h[13] = h2rint(h[1]);
  if (__hbgt2(h[1], h[2]))
    f[3] = 1;
  h[14] = __half2half2(__short2half_rn((short)f[4]));
  f[5] = __half2int_rz(h[1].x);
#if __CUDA_ARCH__ >= 800
  b[0] = __hfma2(b[1], b[2], b[3]);
  b[4] = __hadd2(b[1], b[2]);
  b[5] = __hmul2(b[1], b[2]);
  b[6] = __hmax2(b[1], b[2]);
  b[7] = __floats2bfloat162_rn(f[0], f[1]);
  if (__hbgt2(b[1], b[2]))
    f[6] = 1;
  b[9] = __hgt2(b[1], b[3]);
  b[8] = h2exp(b[1]);
#endif
  q[0] = __nv_fp8_e4m3(f[7]);
  f[8] = (float)q[1];
  f[9] = (float)((__nv_fp8_e5m2 *)q)[5];
}
extern "C" __global__ void integers(int *i, unsigned *u, unsigned long long *l, int n) {
  int a = i[0], b = i[1], c = i[2];
  i[3] = max(max(a, b), c);
  i[4] = min(min(a, b), c);
  i[5] = max(a + b, c);
  i[6] = abs(a - b);
  i[7] = __sad(a, b, c);
  i[8] = __popc(a) + __clz(b) + __ffs(c) + __brev(a);
  i[9] = __byte_perm(a, b, c);
  i[10] = __funnelshift_l(a, b, c);
  i[11] = __mulhi(a, b) + __umulhi(u[0], u[1]) + __mul24(a, c);
  i[12] = __dp4a(a, b, c) + __dp2a_lo(a, b, c);
  i[13] = __vadd4(a, b) + __vabsdiffu4(a, b) + __vmaxs4(a, b) + __vcmpeq4(a, c) + __vadd2(a, b) + __vmaxs2(b, c);
  i[14] = __vimax3_s32(a, b, c) + __vimin3_u32(a, b, c) + __viaddmax_s32(a, b, c) + __vimax_s32_relu(a, b);
  i[15] = __viaddmax_s16x2(a, b, c) + __vimax3_s16x2(a, b, c) + __vibmax_s32(a, b, (bool *)&i[40]);
  i[16] = a / b + a % c;
  u[2] = u[0] / u[1];
  l[0] = l[1] / l[2] + l[3] % l[4];
  l[5] = __umul64hi(l[1], l[2]);
  l[6] = l[1] << n;
  l[7] = __popcll(l[1]) + __clzll(l[2]) + __ffsll(l[3]);
  asm("bfe.u32 %0,%1,%2,%3;" : "=r"(u[3]) : "r"(u[4]), "r"(b), "r"(c));
  asm("bfi.b32 %0,%1,%2,%3,%4;" : "=r"(u[5]) : "r"(u[4]), "r"(u[6]), "r"(b), "r"(c));
  asm("bmsk.clamp.b32 %0,%1,%2;" : "=r"(u[7]) : "r"(a), "r"(b));
  asm("szext.wrap.s32 %0,%1,%2;" : "=r"(i[17]) : "r"(a), "r"(b));
  i[18] = (int)__float2int_rn(__int2float_rn(a)) + (short)a + (signed char)b;
  i[19] = clock() + (int)clock64();
}
extern "C" __global__ void atomics(int *i, float *f, unsigned long long *l, double *d, half2 *h) {
  __shared__ int s[64];
  __shared__ float sf[4];
  __shared__ unsigned long long sl[4];
  s[threadIdx.x] = 0;
  sf[0] = 0;
  sl[0] = 0;
  __syncthreads();
  i[0] =
      atomicAdd(&i[1], 2) + atomicMin(&i[2], 3) + atomicExch(&i[3], 1) + atomicCAS(&i[4], 1, 2) + atomicXor(&i[5], 7);
  atomicAdd(&i[6], 1);
  atomicMax(&i[7], 1);
  atomicOr(&i[8], 1);
  atomicAdd(f, 1.f);
  atomicAdd(d, 1.0);
  atomicAdd(h, h[4]);
  f[1] = atomicAdd(f + 2, 1.f);
  l[0] = atomicCAS(&l[1], 1ULL, 2ULL);
  atomicInc((unsigned *)&i[9], 5);
  atomicAdd_system(&i[10], 1);
  i[11] = atomicAdd(&s[1], 2) + atomicCAS(&s[2], 1, 2) + atomicExch(&s[3], 4) + atomicMin(&s[5], i[12]);
  atomicOr(&s[4], 1);
  atomicAdd(&sf[0], 1.f);
  l[2] = atomicCAS(&sl[0], 1ULL, 2ULL) + atomicAdd(&sl[1], 1ULL);
  __threadfence();
  __threadfence_system();
  __threadfence_block();
  int *g = threadIdx.x & 1 ? s : i;
  atomicAdd(g, 1);
  g[3] = *(volatile int *)(g + 2) + atomicAdd(g + 4, 1);
  *(volatile int *)&i[20] = __ldcg(&i[21]) + __ldcs(&i[22]) + __ldg(&i[23]);
  __stwt(&i[24], 1);
  i[25] = __isShared(g) + __isLocal(g);
#if __CUDA_ARCH__ >= 800
  asm volatile("discard.global.L2 [%0], 128;" ::"l"(i));
  asm volatile("prefetch.global.L2 [%0];" ::"l"(i + 64));
#endif
}
extern "C" __global__ void warps(int *i, int n) {
  cg::thread_block_tile<16> tile = cg::tiled_partition<16>(cg::this_thread_block());
  cg::coalesced_group some = cg::coalesced_threads();
  int x = i[threadIdx.x];
  i[0] = __shfl_sync(~0u, x, 3) + __shfl_up_sync(~0u, x, 1) + __shfl_xor_sync(~0u, x, n) + __ballot_sync(~0u, x) +
         __any_sync(~0u, x > 2);
  i[1] = __match_any_sync(~0u, x) + __match_all_sync(~0u, x, &n) + __activemask() + tile.shfl(x, 2) + some.size();
  i[2] = __syncthreads_or(x) + __syncthreads_count(x) + __syncthreads_and(x);
  tile.sync();
  __syncwarp();
  __nanosleep(100);
#if __CUDA_ARCH__ >= 800
  i[3] = __reduce_add_sync(~0u, x) + __reduce_max_sync(~0u, x) + __reduce_xor_sync(~0u, x);
#endif
  asm volatile("bar.arrive 3, 128; bar.sync 4, 64;");
  if (n == 77)
    asm volatile("trap;");
  if (n == 78)
    asm volatile("brkpt;");
  if (n == 79)
    printf("%d\n", x);
  if (n == 80)
    i[4] = *(int *)malloc(n);
  int stack[40];
  for (int k = 0; k < 40; k++)
    stack[k] = i[k + n];
  i[5] = stack[n & 31] + stack[x & 31];
  switch (n) {
  case 1:
    i[6] = x * 3;
    break;
  case 2:
    i[7] = x ^ 5;
    break;
  case 3:
    i[8] = x / 7;
    break;
  case 4:
    i[9] = x % 9;
    break;
  case 5:
    i[10] = x << 3;
    break;
  case 6:
    i[11] = ~x;
    break;
  case 7:
    i[12] = x & 9;
    break;
  case 8:
    i[13] = x | 9;
  }
  i[14] = threadIdx.y + blockIdx.z + gridDim.y + blockDim.z;
  asm volatile("mov.u32 %0, %%smid;" : "=r"(i[15]));
  asm volatile("mov.u32 %0, %%lanemask_lt;" : "=r"(i[16]));
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(((long long *)i)[10]));
}
extern "C" __device__ __noinline__ int called(int x) { return x > 3 ? called(x - 1) * x : x; }
extern "C" __global__ void calls(int *i, int (**table)(int)) { i[0] = called(i[1]) + table[i[2]](i[3]); }
extern "C" __global__ void tensors(half *h, float *f, signed char *q, int *i, double *d, unsigned *u) {
  wmma::fragment<wmma::matrix_a, 16, 16, 16, half, wmma::row_major> a;
  wmma::fragment<wmma::matrix_b, 16, 16, 16, half, wmma::col_major> b;
  wmma::fragment<wmma::accumulator, 16, 16, 16, half> c;
  wmma::load_matrix_sync(a, h, 16);
  wmma::load_matrix_sync(b, h + 256, 16);
  wmma::fill_fragment(c, __float2half(0.f));
  wmma::mma_sync(c, a, b, c);
  wmma::store_matrix_sync(h + 512, c, 16, wmma::mem_row_major);
  unsigned r[4], p = (unsigned)__cvta_generic_to_shared(h);
  __shared__ int s[256];
  p = (unsigned)__cvta_generic_to_shared(s);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(p));
  u[0] = r[0] ^ r[1] ^ r[2] ^ r[3];
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16; cp.async.commit_group; cp.async.wait_group 0;" ::"r"(p),
               "l"(f));
  wmma::fragment<wmma::matrix_a, 8, 8, 4, double, wmma::row_major> x;
  wmma::fragment<wmma::matrix_b, 8, 8, 4, double, wmma::col_major> y;
  wmma::fragment<wmma::accumulator, 8, 8, 4, double> z;
  wmma::load_matrix_sync(x, d, 4);
  wmma::load_matrix_sync(y, d + 32, 4);
  wmma::fill_fragment(z, 0.0);
  wmma::mma_sync(z, x, y, z);
  wmma::store_matrix_sync(d + 64, z, 8, wmma::mem_row_major);
  wmma::fragment<wmma::matrix_a, 16, 16, 8, wmma::precision::tf32, wmma::row_major> ta;
  wmma::fragment<wmma::matrix_b, 16, 16, 8, wmma::precision::tf32, wmma::col_major> tb;
  wmma::fragment<wmma::accumulator, 16, 16, 8, float> tc;
  wmma::load_matrix_sync(ta, f, 8);
  wmma::load_matrix_sync(tb, f + 128, 8);
  wmma::fill_fragment(tc, 0.f);
  wmma::mma_sync(tc, ta, tb, tc);
  wmma::store_matrix_sync(f + 256, tc, 16, wmma::mem_row_major);
  __shared__ unsigned long long gate;
  unsigned g = (unsigned)__cvta_generic_to_shared(&gate);
  asm volatile("mbarrier.init.shared.b64 [%0], 32; mbarrier.arrive.shared.b64 _, [%0];" ::"r"(g));
#endif
#if __CUDA_ARCH__ >= 890
  asm volatile("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%4,%5},{%0,%1,%2,%3};"
               : "+f"(f[0]), "+f"(f[1]), "+f"(f[2]), "+f"(f[3])
               : "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]));
#endif
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1,%2};" ::"r"(p), "r"(r[0]), "r"(r[1]));
  asm volatile("griddepcontrol.wait; griddepcontrol.launch_dependents;");
  cg::this_cluster().sync();
  i[9] = cg::this_cluster().block_rank();
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], 64, [%2];" ::"r"(p),
               "l"(f), "r"(g));
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], 64;" ::"r"(g));
  i[10] = *cg::this_cluster().map_shared_rank(s, 1);
  asm volatile("{.reg .pred q; mbarrier.try_wait.parity.shared.b64 q, [%0], 0; @q st.global.u32 [%1], 1;}" ::"r"(g),
               "l"(u + 4));
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], 64; cp.async.bulk.commit_group; "
               "cp.async.bulk.wait_group 0;" ::"l"(f),
               "r"(p));
  asm volatile("fence.proxy.async;");
  asm volatile("{.reg .pred q; elect.sync _|q, 0xffffffff; @q st.global.u32 [%0], 2;}" ::"l"(u + 5));
#endif
}
extern "C" __global__ void textures(cudaTextureObject_t t, cudaSurfaceObject_t s, float4 *f) {
  f[0] = tex2D<float4>(t, f[1].x, f[1].y);
  f[2] = tex1Dfetch<float4>(t, 3);
  f[3] = tex2Dgather<float4>(t, f[1].x, f[1].y, 1);
  f[4] = tex2DLod<float4>(t, f[1].x, f[1].y, 1.f);
  f[5] = surf2Dread<float4>(s, 4, 5);
  surf2Dwrite(f[6], s, 5, 6);
}
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
extern "C" __global__ void warpgroup(float *f, int *i, unsigned long long a, unsigned long long b) {
  asm volatile("wgmma.fence.sync.aligned;");
  asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%0,%1,%2,%3}, %4, %5, 1, 1, 1, 0, 0;"
               : "+f"(f[0]), "+f"(f[1]), "+f"(f[2]), "+f"(f[3])
               : "l"(a), "l"(b));
  asm volatile("wgmma.mma_async.sync.aligned.m64n8k32.s32.s8.s8 {%0,%1,%2,%3}, %4, %5, 1;"
               : "+r"(i[0]), "+r"(i[1]), "+r"(i[2]), "+r"(i[3])
               : "l"(a), "l"(b));
  asm volatile("wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 {%0,%1,%2,%3}, %4, %5, 1, 1, 1;"
               : "+f"(f[4]), "+f"(f[5]), "+f"(f[6]), "+f"(f[7])
               : "l"(a), "l"(b));
  asm volatile("wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;");
  asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
}
#endif
#ifdef __CUDA_ARCH_FEAT_SM100_ALL
extern "C" __global__ void tensor_memory(unsigned *u, unsigned long long a, unsigned long long b, unsigned form) {
  __shared__ unsigned at;
  __shared__ unsigned long long gate;
  unsigned p = (unsigned)__cvta_generic_to_shared(&at);
  unsigned g = (unsigned)__cvta_generic_to_shared(&gate), x, y;
  asm volatile("tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%0], 32;" ::"r"(p));
  asm volatile(
      "{.reg .pred q; setp.ne.u32 q, %3, 0; tcgen05.mma.cta_group::1.kind::f16 [%0], %1, %2, %3, q;}" ::"r"(at), "l"(a),
      "l"(b), "r"(form));
  asm volatile("{.reg .pred q; setp.ne.u32 q, %3, 0; tcgen05.mma.cta_group::1.kind::i8 [%0], %1, %2, %3, q;}" ::"r"(at),
               "l"(a), "l"(b), "r"(form));
  asm volatile("tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%0];" ::"r"(g));
  asm volatile("tcgen05.ld.sync.aligned.32x32b.x2.b32 {%0,%1}, [%2]; tcgen05.wait::ld.sync.aligned;"
               : "=r"(x), "=r"(y)
               : "r"(at));
  asm volatile("tcgen05.st.sync.aligned.32x32b.x1.b32 [%0], {%1}; tcgen05.wait::st.sync.aligned;" ::"r"(at),
               "r"(x + y));
  asm volatile("tcgen05.cp.cta_group::1.128x256b [%0], %1;" ::"r"(at), "l"(a));
  asm volatile("tcgen05.dealloc.cta_group::1.sync.aligned.b32 %0, 32;" ::"r"(at));
  u[0] = x ^ y;
}
#endif
