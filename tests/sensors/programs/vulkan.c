/* Submits empty work to a Vulkan queue, on whatever device is here (lavapipe in the tests): vulkan COUNT [pointer].
 * With `pointer` it asks the loader for the driver's own function, as most programs do, and submits past the loader.
 * Prints its pid, waits for a line on its input, submits, and prints how often it did.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <vulkan/vulkan.h>

static void check(VkResult result, const char *what) {
	if (result < 0) {
		fprintf(stderr, "%s: %d\n", what, result);
		exit(3);
	}
}

int main(int argc, char **argv) {
	long count = argc > 1 ? atol(argv[1]) : 10;
	float priority = 1;
	uint32_t devices = 1;
	VkInstance instance;
	VkPhysicalDevice physical;
	VkDevice device;
	VkQueue queue;
	VkApplicationInfo application = {.sType = VK_STRUCTURE_TYPE_APPLICATION_INFO, .apiVersion = VK_API_VERSION_1_1};
	VkInstanceCreateInfo instance_info = {
		.sType = VK_STRUCTURE_TYPE_INSTANCE_CREATE_INFO, .pApplicationInfo = &application};
	VkDeviceQueueCreateInfo queue_info = {
		.sType = VK_STRUCTURE_TYPE_DEVICE_QUEUE_CREATE_INFO, .queueCount = 1, .pQueuePriorities = &priority};
	VkDeviceCreateInfo device_info = {
		.sType = VK_STRUCTURE_TYPE_DEVICE_CREATE_INFO, .queueCreateInfoCount = 1, .pQueueCreateInfos = &queue_info};
	VkSubmitInfo twice[2] = {{.sType = VK_STRUCTURE_TYPE_SUBMIT_INFO}, {.sType = VK_STRUCTURE_TYPE_SUBMIT_INFO}};
	PFN_vkQueueSubmit submit = vkQueueSubmit;

	printf("%d\n", (int)getpid());
	fflush(stdout);
	getchar();
	check(vkCreateInstance(&instance_info, NULL, &instance), "vkCreateInstance");
	check(vkEnumeratePhysicalDevices(instance, &devices, &physical), "vkEnumeratePhysicalDevices");
	if (!devices)
		check(VK_ERROR_DEVICE_LOST, "no device");
	check(vkCreateDevice(physical, &device_info, NULL, &device), "vkCreateDevice");
	vkGetDeviceQueue(device, 0, 0, &queue);
	vkGetDeviceProcAddr(device, "vkCreateFence");
	if (argc > 2 && !strcmp(argv[2], "pointer"))
		submit = (PFN_vkQueueSubmit)vkGetDeviceProcAddr(device, "vkQueueSubmit");
	for (long i = 0; i < count; i++)
		check(submit(queue, 2, twice, VK_NULL_HANDLE), "vkQueueSubmit");
	check(vkQueueWaitIdle(queue), "vkQueueWaitIdle");
	printf("%ld\n", 2 * count);
	return 0;
}
