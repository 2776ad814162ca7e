/* Launches a kernel by OpenCL, on whatever platform is here (PoCL in the tests): opencl COUNT [GLOBAL LOCAL].
 * Prints its pid, waits for a line on its input, launches, and prints how often it did.
 */
#define CL_TARGET_OPENCL_VERSION 120
#include <CL/cl.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static void check(cl_int status, const char *what) {
	if (status) {
		fprintf(stderr, "%s: %d\n", what, status);
		exit(3);
	}
}

int main(int argc, char **argv) {
	const char *source = "__kernel void search_nonce(__global int *x) { x[get_global_id(0)] += 1; }";
	long count = argc > 1 ? atol(argv[1]) : 10;
	size_t global[2] = {argc > 2 ? strtoul(argv[2], NULL, 0) : 64, 1};
	size_t local[2] = {argc > 3 ? strtoul(argv[3], NULL, 0) : 0, 1};
	cl_platform_id platform;
	cl_device_id device;
	cl_int status;

	printf("%d\n", (int)getpid());
	fflush(stdout);
	getchar();
	check(clGetPlatformIDs(1, &platform, NULL), "clGetPlatformIDs");
	check(clGetDeviceIDs(platform, CL_DEVICE_TYPE_ALL, 1, &device, NULL), "clGetDeviceIDs");
	cl_context context = clCreateContext(NULL, 1, &device, NULL, NULL, &status);
	check(status, "clCreateContext");
	cl_command_queue queue = clCreateCommandQueue(context, device, 0, &status);
	check(status, "clCreateCommandQueue");
	cl_program program = clCreateProgramWithSource(context, 1, &source, NULL, &status);
	check(status, "clCreateProgramWithSource");
	check(clBuildProgram(program, 1, &device, "", NULL, NULL), "clBuildProgram");
	cl_kernel none = clCreateKernel(program, "no_such_kernel", &status);
	cl_kernel kernel = clCreateKernel(program, "search_nonce", &status);
	check(status, "clCreateKernel");
	cl_mem memory = clCreateBuffer(context, CL_MEM_READ_WRITE, 4 * global[0], NULL, &status);
	check(status, "clCreateBuffer");
	check(clSetKernelArg(kernel, 0, sizeof memory, &memory), "clSetKernelArg");
	for (long i = 0; i < count; i++)
		check(clEnqueueNDRangeKernel(queue, kernel, 2, NULL, global, local[0] ? local : NULL, 0, NULL, NULL), "launch");
	check(clFinish(queue), "clFinish");
	printf("%ld %s\n", count, none ? "?" : "ok");
	return 0;
}
