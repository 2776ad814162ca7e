/* STAND-IN for a training job: it makes the driver calls of one data-parallel training step after another and computes
 * nothing. A step is: wait for data (a few ms to tens of ms), forward (a burst of about 110 launches of 14 kernels),
 * backward (about 100 of 12 others, NCCL all-reduce between), optimizer (one long burst of one kernel at many
 * geometries), now and then an evaluation or a checkpoint pause. Names and geometries are made up after the style of
 * PyTorch, cuBLAS, cuDNN and NCCL kernels.
 *
 *   trainer [--steps N] [--seconds S] [--step-ms N] [--layers N] [--delay-ms N]
 *
 * Ends after --steps or --seconds (0: never), and then prints one JSON line with the launches made.
 */
#include <getopt.h>
#include <signal.h>

#include "driver_api.h"

typedef struct { char *name; unsigned grid, block, shared; } Kernel;

/* Order is the order of use; the first FORWARD make a layer's forward, then BACKWARD, then the rest. */
static Kernel kernels[] = {
    {"vectorized_layer_norm_kernel_float_bf16", 4096, 128, 32},
    {"ampere_bf16_s16816gemm_bf16_128x256_ldg8_f2f_stages_64x3_tn", 192, 256, 98304},
    {"elementwise_kernel_with_index_add_bias", 9216, 128, 0},
    {"RotaryEmbeddingKernel_bf16", 2048, 256, 0},
    {"CatArrayBatchedCopy_aligned16_contig_bf16_3", 432, 512, 0},
    {"flash_fwd_kernel_hdim128_bf16_sm80", 1024, 128, 81920},
    {"ampere_bf16_s16816gemm_bf16_128x128_ldg8_f2f_stages_32x5_tn", 256, 128, 81920},
    {"vectorized_elementwise_kernel_4_CUDAFunctor_add_bf16", 16384, 128, 0},
    {"rms_norm_forward_kernel_4096", 4096, 256, 64},
    {"ampere_bf16_s16816gemm_bf16_256x128_ldg8_f2f_stages_64x3_tn", 448, 256, 147456},
    {"vectorized_elementwise_kernel_4_silu", 28672, 128, 0},
    {"vectorized_elementwise_kernel_4_BinaryFunctor_mul_bf16", 28672, 128, 0},
    {"cutlass_80_tensorop_bf16_s16816gemm_bf16_64x128_32x6_tn_align8", 512, 128, 73728},
    {"fused_dropout_kernel_vec_bf16", 2112, 256, 0},
    {"flash_bwd_dot_do_o_kernel_hdim128", 1024, 256, 0},
    {"flash_bwd_dq_dk_dv_loop_seqk_parallel_hdim128", 512, 256, 147456},
    {"flash_bwd_convert_dq_kernel_hdim128", 1024, 256, 0},
    {"ampere_bf16_s16816gemm_bf16_128x128_ldg8_f2f_stages_64x3_nt", 320, 128, 98304},
    {"ampere_bf16_s16816gemm_bf16_256x64_ldg8_f2f_stages_64x4_nn", 384, 256, 122880},
    {"silu_backward_kernel_bf16", 28672, 128, 0},
    {"layer_norm_grad_input_kernel_vectorized", 4096, 128, 64},
    {"GammaBetaBackwardCUDAKernel_bf16", 128, 512, 4096},
    {"reduce_kernel_512_1_sum_bf16", 256, 512, 16},
    {"splitKreduce_kernel_32_16_bf16", 1152, 128, 0},
    {"vectorized_elementwise_kernel_4_FillFunctor", 512, 128, 0},
    {"direct_copy_kernel_cuda_bf16_to_float", 8192, 128, 0},
    {"ncclDevKernel_AllReduce_Sum_bf16_RING_LL", 24, 512, 83072},
    {"ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL", 24, 512, 83072},
    {"ncclDevKernel_AllGather_RING_LL", 24, 512, 83072},
    {"multi_tensor_apply_kernel_L2NormFunctor", 320, 512, 0},
    {"lpnorm_cleanup_FunctionalNorm", 1, 512, 4096},
    {"multi_tensor_apply_kernel_FusedAdamMathFunctor", 640, 512, 0},
    {"multi_tensor_apply_kernel_BinaryOpScalarFunctor_mul", 320, 512, 0},
    {"indexSelectLargeIndex_bf16_embedding", 8192, 128, 0},
    {"embedding_dense_backward_kernel", 4096, 128, 0},
    {"cunn_SoftMaxForward_bf16_float", 4096, 1024, 128},
    {"cunn_SoftMaxBackward_bf16_float", 4096, 1024, 128},
    {"nll_loss_forward_reduce_cuda_kernel_2d", 1, 32, 0},
    {"nll_loss_backward_reduce_cuda_kernel_2d", 1, 32, 0},
    {"distribution_elementwise_grid_stride_kernel_uniform", 432, 256, 0},
    {"triton_poi_fused_add_mul_sigmoid_0", 1792, 128, 0},
    {"triton_red_fused_mean_pow_rsqrt_1", 4096, 256, 1024},
};
enum { COUNT = sizeof kernels / sizeof *kernels, FORWARD = 14, BACKWARD = 12, NCCL = 26, OPTIMIZER = 29, REST = 33 };

static void *handles[COUNT], *stream, *communication;
static unsigned seed = 2463534242u;
static long made;
static volatile sig_atomic_t stopped;
static void stop(int signal) { (void)signal; stopped = 1; }

static unsigned random_below(unsigned bound) {
    seed ^= seed << 13; seed ^= seed >> 17; seed ^= seed << 5;
    return seed % bound;
}

static void launch(unsigned i, unsigned scale, void *on) {
    const Kernel *k = &kernels[i];
    check(cuLaunchKernel(handles[i], k->grid * scale, 1, 1, k->block, 1, 1, k->shared, on, NULL, NULL),
          "cuLaunchKernel");
    made++;
    /* Host time between launches of eager mode: mostly 5-15 us, now and then a Python detour. */
    int64_t until = now_ns() + 4000 + random_below(11000) + (random_below(40) ? 0 : 150000);
    while (now_ns() < until) { }
}

static void forward(unsigned layers, unsigned scale) {
    launch(REST, scale, stream);
    for (unsigned layer = 0; layer < layers; layer++)
        for (unsigned i = 0; i < FORWARD; i++)
            if (random_below(16)) launch(i, scale, stream);
    launch(REST + 2, scale, stream);
    launch(REST + 4, 1, stream);
}

static void step(unsigned layers) {
    unsigned scale = 1 + random_below(3);
    uint64_t data = (uint64_t)1 << 41;
    unsigned batch[256] = {0};
    check(cuMemcpyHtoD_v2(data, batch, sizeof batch), "cuMemcpyHtoD");
    forward(layers, scale);
    launch(REST + 3, scale, stream);
    for (unsigned layer = 0; layer < layers; layer++) {
        for (unsigned i = 0; i < BACKWARD; i++) launch(FORWARD + i, scale, stream);
        if (layer % 2) launch(NCCL + random_below(3), 1, communication);
    }
    launch(REST + 1, scale, stream);
    for (unsigned i = 0; i < 24; i++) launch(OPTIMIZER + random_below(4), 1 + i % 6, stream);
    launch(REST + 6 + random_below(3), 1, stream);
    check(cuStreamSynchronize(stream), "cuStreamSynchronize");
}

int main(int argc, char **argv) {
    enum { STEPS = 256, SECONDS, STEP, LAYERS, DELAY };
    static const struct option options[] = {{"steps", 1, 0, STEPS}, {"seconds", 1, 0, SECONDS}, {"step-ms", 1, 0, STEP},
                                            {"layers", 1, 0, LAYERS}, {"delay-ms", 1, 0, DELAY}, {0}};
    long steps = 0, step_ms = 180, delay_ms = 0;
    unsigned layers = 8;
    double seconds = 0;
    for (int option; (option = getopt_long(argc, argv, "", options, NULL)) != -1;) switch (option) {
        case STEPS: steps = strtol(optarg, NULL, 0); break;
        case SECONDS: seconds = strtod(optarg, NULL); break;
        case STEP: step_ms = strtol(optarg, NULL, 0); break;
        case LAYERS: layers = strtoul(optarg, NULL, 0); break;
        case DELAY: delay_ms = strtol(optarg, NULL, 0); break;
        default: return 2;
    }
    signal(SIGTERM, stop);
    signal(SIGINT, stop);
    int device;
    void *context, *library;
    char *names[COUNT];
    size_t size;
    for (unsigned i = 0; i < COUNT; i++) names[i] = kernels[i].name;
    check(cuInit(0), "cuInit");
    check(cuDeviceGet(&device, 0), "cuDeviceGet");
    check(cuCtxCreate_v2(&context, 0, device), "cuCtxCreate");
    check(cuStreamCreate(&stream, 0), "cuStreamCreate");
    check(cuStreamCreate(&communication, 0), "cuStreamCreate");
    sleep_until(now_ns() + delay_ms * 1000000LL);
    check(cuLibraryLoadData(&library, make_cubin(names, COUNT, 2048, &size), 0, 0, 0, 0, 0, 0), "cuLibraryLoadData");
    for (unsigned i = 0; i < COUNT; i++) {
        void *kernel;
        check(cuLibraryGetKernel(&kernel, library, names[i]), "cuLibraryGetKernel");
        check(cuKernelGetFunction(&handles[i], kernel), "cuKernelGetFunction");
    }
    int64_t started = now_ns();
    int64_t end = seconds > 0 ? started + (int64_t)(seconds * 1e9) : INT64_MAX;
    for (long done = 0; !stopped && (!steps || done < steps) && now_ns() < end; done++) {
        int64_t next = now_ns() + (step_ms / 2 + (step_ms ? random_below(step_ms) : 0)) * 1000000LL;
        step(layers);
        if (done % 20 == 19) forward(layers, 1);             /* evaluation */
        if (done % 50 == 49) next += 5 * step_ms * 1000000LL; /* checkpoint */
        sleep_until(next);
    }
    printf("{\"program\":\"trainer\",\"launches\":%ld,\"kernels\":%d}\n", made, COUNT);
    return 0;
}
