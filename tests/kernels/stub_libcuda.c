/* A libcuda.so.1 for tests without a GPU: it records what it is asked to load and launch, as one line of text each.
 *
 * Compiled against cuda.h, so that its structures are CUDA's and not those of the code under test. Kernels do not run.
 * STUB_CUDA_LOG names the file that lines are appended to. stub_param_sizes tells how many bytes the parameters of the
 * kernels have that are launched next, since a launch does not say; stub_fail makes the next call of a function fail.
 */
#include "cuda.h"
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static size_t param_sizes[256];
static int num_params;
static char failing[64];
static CUresult failure;
static __thread CUcontext current;  /* per thread, as CUDA has it */
static uintptr_t modules;

void stub_param_sizes(int count, const size_t *sizes) {
  num_params = count;
  memcpy(param_sizes, sizes, count * sizeof(size_t));
}

void stub_fail(const char *function, CUresult code) {
  snprintf(failing, sizeof failing, "%s", function);
  failure = code;
}

static CUresult done(const char *function) {
  if (strcmp(function, failing)) return CUDA_SUCCESS;
  failing[0] = 0;
  return failure;
}

static void record(const char *format, ...) {
  const char *path = getenv("STUB_CUDA_LOG");
  FILE *file = path ? fopen(path, "a") : NULL;
  if (!file) return;
  va_list arguments;
  va_start(arguments, format);
  vfprintf(file, format, arguments);
  va_end(arguments);
  fclose(file);
}

static void hex(char *out, const void *bytes, size_t count) {
  for (size_t i = 0; i < count; i++) sprintf(out + 2 * i, "%02x", ((const unsigned char *)bytes)[i]);
  out[2 * count] = 0;
}

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { *version = 12080; return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { *device = ordinal; return CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int *count) { *count = 2; return CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = 227 * 1024; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = 228 * 1024; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 0; break;
    default: *value = 1;
  }
  return done("cuDeviceGetAttribute");
}

CUresult cuCtxGetCurrent(CUcontext *context) { *context = current; return done("cuCtxGetCurrent"); }
CUresult cuCtxSetCurrent(CUcontext context) {
  current = context;
  record("cuCtxSetCurrent context=%#zx\n", (size_t)context);
  return done("cuCtxSetCurrent");
}
CUresult cuCtxGetDevice(CUdevice *device) { *device = (int)((uintptr_t)current >> 8) - 1; return done("cuCtxGetDevice"); }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  *context = (CUcontext)(uintptr_t)((device + 1) << 8);
  record("cuDevicePrimaryCtxRetain device=%d\n", device);
  return done("cuDevicePrimaryCtxRetain");
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  *module = (CUmodule)__atomic_add_fetch(&modules, 1, __ATOMIC_SEQ_CST);
  record("cuModuleLoadData context=%#zx elf=%d\n", (size_t)current, !memcmp(image, "\177ELF", 4));
  return done("cuModuleLoadData");
}
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { *value = 0; return CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) { *status = 0; return CUDA_SUCCESS; }
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  *function = (CUfunction)((uintptr_t)module << 4);
  record("cuModuleGetFunction name=%s\n", name);
  return done("cuModuleGetFunction");
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : attribute == CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES ? 1024 : 16;
  return done("cuFuncGetAttribute");
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  if (attribute > 16) return CUDA_ERROR_INVALID_VALUE;  /* what this driver is too old for */
  record("cuFuncSetAttribute attribute=%d value=%d\n", attribute, value);
  return done("cuFuncSetAttribute");
}
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) {
  record("cuFuncSetCacheConfig config=%d\n", config);
  return done("cuFuncSetCacheConfig");
}
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)value = pointer;
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction function, void **params, void **extra) {
  if (getenv("STUB_CUDA_LOG")) {
    char *attributes = calloc(1, 1024), *values = calloc(1, 8192), text[256];
    for (unsigned i = 0; i < c->numAttrs; i++) {
      hex(text, &c->attrs[i].value, sizeof c->attrs[i].value);
      sprintf(attributes + strlen(attributes), "%d:%s,", c->attrs[i].id, text);
    }
    for (int i = 0; i < num_params; i++) {
      hex(text, params[i], param_sizes[i]);
      sprintf(values + strlen(values), "%s,", text);
    }
    record("cuLaunchKernelEx context=%#zx grid=%u,%u,%u block=%u,%u,%u shared=%u stream=%#zx attributes=%s params=%s extra=%p\n",
           (size_t)current, c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX, c->blockDimY, c->blockDimZ,
           c->sharedMemBytes, (size_t)c->hStream, attributes, values, (void *)extra);
    free(attributes);
    free(values);
  }
  if (!current) return CUDA_ERROR_INVALID_CONTEXT;
  return done("cuLaunchKernelEx");
}

CUresult cuGetErrorName(CUresult code, const char **name) {
  switch (code) {
    case CUDA_ERROR_OUT_OF_MEMORY: *name = "CUDA_ERROR_OUT_OF_MEMORY"; return CUDA_SUCCESS;
    case CUDA_ERROR_INVALID_CONTEXT: *name = "CUDA_ERROR_INVALID_CONTEXT"; return CUDA_SUCCESS;
    case CUDA_ERROR_ILLEGAL_ADDRESS: *name = "CUDA_ERROR_ILLEGAL_ADDRESS"; return CUDA_SUCCESS;
    case CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE: *name = "CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE"; return CUDA_SUCCESS;
    default: *name = NULL; return CUDA_ERROR_INVALID_VALUE;
  }
}
CUresult cuGetErrorString(CUresult code, const char **text) {
  switch (code) {
    case CUDA_ERROR_OUT_OF_MEMORY: *text = "out of memory"; return CUDA_SUCCESS;
    case CUDA_ERROR_ILLEGAL_ADDRESS: *text = "an illegal memory access was encountered"; return CUDA_SUCCESS;
    case CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE: *text = "too many blocks in cooperative launch"; return CUDA_SUCCESS;
    default: *text = NULL; return CUDA_ERROR_INVALID_VALUE;
  }
}
