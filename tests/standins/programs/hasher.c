/* STAND-IN for a GPU miner: it makes a miner's driver calls (load, look up, launch one or two kernels at one geometry,
 * one stream synchronisation a launch, read a few bytes of result) and computes no hash at all.
 *
 *   hasher [--kernel NAME]... [--image FILE] [--api kernel|ptsz|ex|coop] [--library] [--grid N] [--block N]
 *          [--shared BYTES] [--interval-us N] [--jitter-us N] [--delay-ms N] [--launches N] [--seconds S] [--vary-grid]
 *          [--stepwise]
 *
 * Launches go round the kernels in order, with --vary-grid each at a grid one larger than the last. Ends after
 * --launches or --seconds (0: never), and then prints one JSON line with the launches made, when the first was, and how
 * long all took. With --stepwise it prints "waits" and waits for a line of its input before it loads its code, before
 * each launch and before it ends; once its input is closed it waits no more.
 */
#include <getopt.h>
#include <signal.h>

#include "driver_api.h"

enum { KERNELS_MAX = 16 };

static volatile sig_atomic_t stopped;
static void stop(int signal) { (void)signal; stopped = 1; }

static int stepwise;
static void wait_for_a_line(void) {
    if (!stepwise) return;
    puts("waits");
    fflush(stdout);
    for (int one = 0; one != '\n';)
        if ((one = getchar()) == EOF) { stepwise = 0; return; }
}

int main(int argc, char **argv) {
    enum { KERNEL = 256, IMAGE, API, LIBRARY, GRID, BLOCK, SHARED, INTERVAL, JITTER, DELAY, LAUNCHES, SECONDS, VARY,
           STEPWISE };
    static const struct option options[] = {
        {"kernel", 1, 0, KERNEL}, {"image", 1, 0, IMAGE}, {"api", 1, 0, API}, {"library", 0, 0, LIBRARY},
        {"grid", 1, 0, GRID}, {"block", 1, 0, BLOCK}, {"shared", 1, 0, SHARED}, {"interval-us", 1, 0, INTERVAL},
        {"jitter-us", 1, 0, JITTER}, {"delay-ms", 1, 0, DELAY}, {"launches", 1, 0, LAUNCHES},
        {"seconds", 1, 0, SECONDS}, {"vary-grid", 0, 0, VARY}, {"stepwise", 0, 0, STEPWISE}, {0}};
    char *names[KERNELS_MAX];
    void *kernels[KERNELS_MAX];
    const char *path = NULL, *api = "kernel";
    unsigned count = 0, grid = 8192, block = 128, shared = 0, library = 0, vary = 0;
    long interval_us = 20000, jitter_us = 200, delay_ms = 0, launches_max = 0;
    double seconds = 0;
    for (int option; (option = getopt_long(argc, argv, "", options, NULL)) != -1;) switch (option) {
        case KERNEL: if (count < KERNELS_MAX) names[count++] = optarg; break;
        case IMAGE: path = optarg; break;
        case API: api = optarg; break;
        case LIBRARY: library = 1; break;
        case GRID: grid = strtoul(optarg, NULL, 0); break;
        case BLOCK: block = strtoul(optarg, NULL, 0); break;
        case SHARED: shared = strtoul(optarg, NULL, 0); break;
        case INTERVAL: interval_us = strtol(optarg, NULL, 0); break;
        case JITTER: jitter_us = strtol(optarg, NULL, 0); break;
        case DELAY: delay_ms = strtol(optarg, NULL, 0); break;
        case LAUNCHES: launches_max = strtol(optarg, NULL, 0); break;
        case SECONDS: seconds = strtod(optarg, NULL); break;
        case VARY: vary = 1; break;
        case STEPWISE: stepwise = 1; break;
        default: return 2;
    }
    if (!count) names[count++] = "ethash_search";
    signal(SIGTERM, stop);
    signal(SIGINT, stop);

    int device;
    void *context, *module, *stream;
    uint64_t buffer;
    size_t size;
    check(cuInit(0), "cuInit");
    check(cuDeviceGet(&device, 0), "cuDeviceGet");
    check(cuCtxCreate_v2(&context, 0, device), "cuCtxCreate");
    check(cuStreamCreate(&stream, 0), "cuStreamCreate");
    check(cuMemAlloc_v2(&buffer, 4096), "cuMemAlloc");
    void *image = path ? read_whole(path, &size) : make_cubin(names, count, 4096, &size);
    sleep_until(now_ns() + delay_ms * 1000000LL);
    wait_for_a_line();
    if (library)
        check(cuLibraryLoadData(&module, image, 0, 0, 0, 0, 0, 0), "cuLibraryLoadData");
    else
        check(cuModuleLoadData(&module, image), "cuModuleLoadData");
    for (unsigned i = 0; i < count; i++) {
        if (library) {
            void *kernel;
            check(cuLibraryGetKernel(&kernel, module, names[i]), "cuLibraryGetKernel");
            check(cuKernelGetFunction(&kernels[i], kernel), "cuKernelGetFunction");
        } else {
            check(cuModuleGetFunction(&kernels[i], module, names[i]), "cuModuleGetFunction");
        }
    }

    struct timespec wall;
    clock_gettime(CLOCK_REALTIME, &wall);
    int64_t started = now_ns(), next = started;
    LaunchConfig config = {.grid = {grid, 1, 1}, .block = {block, 1, 1}, .shared = shared, .stream = stream};
    unsigned seed = 12345, results[4];
    long made = 0;
    int64_t end = seconds > 0 ? started + (int64_t)(seconds * 1e9) : INT64_MAX;
    while (!stopped && (!launches_max || made < launches_max) && now_ns() < end) {
        void *kernel = kernels[made % count];
        wait_for_a_line();
        if (!strcmp(api, "ex")) check(cuLaunchKernelEx(&config, kernel, NULL, NULL), "cuLaunchKernelEx");
        else if (!strcmp(api, "coop"))
            check(cuLaunchCooperativeKernel(kernel, grid, 1, 1, block, 1, 1, shared, stream, NULL),
                  "cuLaunchCooperativeKernel");
        else if (!strcmp(api, "ptsz"))
            check(cuLaunchKernel_ptsz(kernel, grid, 1, 1, block, 1, 1, shared, stream, NULL, NULL),
                  "cuLaunchKernel_ptsz");
        else check(cuLaunchKernel(kernel, grid, 1, 1, block, 1, 1, shared, stream, NULL, NULL), "cuLaunchKernel");
        made++;
        grid += vary;
        config.grid[0] = grid;
        check(cuStreamSynchronize(stream), "cuStreamSynchronize");
        check(cuMemcpyDtoH_v2(results, buffer, sizeof results), "cuMemcpyDtoH");
        if (interval_us) {
            seed = seed * 1103515245 + 12345;
            next += interval_us * 1000LL;
            sleep_until(next + (jitter_us ? (int64_t)(seed >> 8) % (jitter_us * 1000LL) : 0));
        }
    }
    wait_for_a_line();
    printf("{\"program\":\"hasher\",\"launches\":%ld,\"kernels\":%u,\"first_launch_ns\":%lld,\"elapsed_ns\":%lld}\n",
           made, count, wall.tv_sec * 1000000000LL + wall.tv_nsec, (long long)(now_ns() - started));
    return 0;
}
